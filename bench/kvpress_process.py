"""Generates in the environment of kvpress, as far as ``KvpressGeneration`` asks line by line.

The first line holds the settings, each further one a number of tokens. Each is answered, in JSON,
with the seconds that those tokens took and the most tokens that a layer has held after a step.
"""

import importlib
import json
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer


class Rounds(BaseStreamer):
    """Holds generation up until more tokens are asked for.

    As each round may follow a pause, its first token is not timed.
    """

    def __init__(self, cache: DynamicCache) -> None:
        self.cache = cache
        self.held_tokens = 0  # at most so far
        self.at: list[float] = []
        self.awaited = 1  # The prompt is handed over first.

    def put(self, value: torch.Tensor) -> None:
        self.at.append(time.perf_counter())
        self.held_tokens = max(self.held_tokens, self.cache.get_seq_length())
        if len(self.at) < self.awaited:
            return
        seconds = [after - before for before, after in zip(self.at, self.at[1:], strict=False)]
        print(json.dumps({"seconds": seconds, "held_tokens": self.held_tokens}), flush=True)
        request = sys.stdin.readline()
        if not request:
            sys.exit()
        self.at, self.awaited = [], int(request) + 1

    def end(self) -> None:
        pass


def pressing(
    model: Any, *, scorer: str, interval: int, budget: int, prompt: int
) -> AbstractContextManager[None]:
    """Cuts the prompt to the budget, and what is decoded too, every ``interval`` tokens."""
    # Not above: the import wraps the attention functions, which no plain cache needs.
    kvpress: Any = importlib.import_module("kvpress")
    score = getattr(kvpress, scorer)
    press = kvpress.PrefillDecodingPress(
        prefilling_press=score(compression_ratio=1 - budget / prompt),
        decoding_press=kvpress.DecodingPress(
            score(), compression_interval=interval, target_size=budget
        ),
    )
    return press(model)


def main() -> None:
    """Serves one text."""
    settings = json.loads(sys.stdin.readline())
    device, dtype = settings["device"], getattr(torch, settings["dtype"])
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**settings["config"])).to(device, dtype).eval()
    ids = torch.tensor(settings["ids"], device=device)
    prompt = ids.shape[1]
    press = settings["press"]
    cache = DynamicCache(config=model.config)
    under = pressing(model, **press, prompt=prompt) if press else nullcontext()
    with torch.inference_mode(), under:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=model.config.max_position_embeddings - prompt,
            do_sample=False,
            disable_compile=True,
            streamer=Rounds(cache),
        )


if __name__ == "__main__":
    main()
