"""What is measured: one model, one prompt, and a way to generate for each kind of cache."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CompileConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from compressed_cache import CompressedCache
from compressed_cache.versions import cache_argument

BUDGET = 128
PROMPT = 2048  # tokens
LONGEST = PROMPT + 512  # tokens that the static cache has room for
SHORTEST = 16  # slots of the floor


def make_model(device: str) -> Any:
    """Four random layers: float32 on a CPU, bfloat16 on CUDA."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=2000,
        max_position_embeddings=65536,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model: Any = LlamaForCausalLM(config)
    return model.to(device, dtype).eval()


@dataclass(frozen=True)
class Contender:
    """A cache, and whether ``generate`` compiles the decode step."""

    name: str
    make_cache: Callable[[Any], Cache]
    compiled: bool = False
    capacity: int | None = None
    """Tokens after which the text starts anew, for a cache that cannot hold more."""

    def __str__(self) -> str:
        return f"{self.name}-{'compiled' if self.compiled else 'eager'}"


def compressed(policy: str, *, compiled: bool) -> Contender:
    return Contender(policy, lambda _: CompressedCache(policy, BUDGET), compiled)


BASELINE = Contender("DynamicCache", lambda model: DynamicCache(config=model.config))
STATIC = Contender(
    "StaticCache", lambda model: StaticCache(model.config, max_cache_len=LONGEST), compiled=True
)
FLOOR = Contender(
    f"StaticCache of {SHORTEST} slots",
    lambda model: StaticCache(model.config, max_cache_len=SHORTEST),
    compiled=True,
    capacity=SHORTEST,
)
"""The model with next to no cache: what no cache can beat."""


class Generation:
    """A text that ``generate`` continues call by call, timed token by token.

    Each call reads one token eagerly, as generation does after a prompt, and decodes the others;
    only those count. Everything that a user waits for is included: the model, the cache, and what
    ``generate`` itself does between two tokens.
    """

    def __init__(
        self, contender: Contender, model: Any, *, batch: int, prompt: int = PROMPT
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        self.capacity = contender.capacity
        if self.capacity is not None:
            prompt = 1
        ids = torch.randint(1, model.config.vocab_size, (batch, prompt), generator=generator)
        self.model, self.ids = model, ids.to(model.device)
        self.cache = contender.make_cache(model)
        self.options: dict[str, Any] = {"disable_compile": not contender.compiled}
        if contender.compiled and model.device.type == "cpu":
            config: Any = CompileConfig(fullgraph=True, mode="default")
            config._compile_all_devices = True
            self.options["compile_config"] = config

    def continue_by(self, tokens: int) -> list[float]:
        """Generates so many tokens after an untimed first one; seconds of each."""
        if self.capacity is None:
            return self._continue_by(tokens)
        seconds: list[float] = []
        while len(seconds) < tokens:
            with torch.inference_mode():
                self.cache.reset()
            self.ids = self.ids[:, :1]
            seconds += self._continue_by(min(self.capacity - 2, tokens - len(seconds)))
        return seconds

    def _continue_by(self, tokens: int) -> list[float]:
        clock = _TokenClock()
        with torch.inference_mode():
            self.ids = self.model.generate(
                self.ids,
                attention_mask=torch.ones_like(self.ids),
                **cache_argument(self.cache),
                max_new_tokens=tokens + 1,
                do_sample=False,
                streamer=clock,
                **self.options,
            )
        # The first call to the streamer hands over the prompt, the second the untimed token.
        return [after - before for before, after in zip(clock.at[1:], clock.at[2:], strict=False)]


class _TokenClock(BaseStreamer):
    """Notes when each token reaches the user, which on CUDA includes waiting for it."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass
