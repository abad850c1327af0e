"""How many drafts of each policy a language model accepts, and whether the text stays the same.

    python -m bench.drafts --model FOLDER --data ROWS

Problems of GSM8K are answered greedily in float32 with a DynamicCache, then with ``lossless`` under
each policy, always with as many drafts, so that their number depends on no clock. It writes a row
for each policy as soon as it is there, leaves out what the file has, and can be stopped and gone on
with; ``python -m bench.real_models page`` shows them in ``docs/results.md``.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from bench.results_page import DRAFTS, read_lines
from compressed_cache import CompressedCache, DraftStatistics, lossless
from compressed_cache.eval.sweep.loaded import digest
from compressed_cache.ops.masks import left_padded
from compressed_cache.versions import cache_argument

POLICIES = "streaming_llm,snapkv,h2o,tova,rkv,random,lagkv,expected_attention"


@dataclass(frozen=True)
class Drafts:
    """One row: a policy at a budget."""

    model: str
    weights: str
    policy: str
    budget: int
    batch: int
    drafts: int
    endless: bool
    """Whether texts go on after their end."""
    refresh: int | None
    """As for ``lossless``."""
    texts: int
    tokens: int
    """Of all texts."""
    same: int
    """Texts that are those of the DynamicCache, token for token."""
    gap: float
    """Between the best two logits where a text begins to differ, the most of all; 0 for none."""
    acceptance: float
    per_verification: float
    torch: str


def main(arguments: list[str] | None = None) -> None:
    """Measures, or goes on where it was."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.drafts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="the folder of gsm8k.jsonl")
    parser.add_argument("--first", type=int, default=50, help="problem")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of a text, at most")
    parser.add_argument("--endless", action="store_true", help="texts go on after their end")
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--refresh", type=int, help="as for lossless")
    parser.add_argument("--budgets", default="96")
    parser.add_argument("--policies", default=POLICIES)
    parser.add_argument("--out", type=Path, default=DRAFTS)
    measure(parser.parse_args(arguments))


class Writer:
    """A model that answers batches of problems."""

    def __init__(self, options: argparse.Namespace) -> None:
        # Typed by transformers as what it is not.
        self.model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
        lines = (options.data / "gsm8k.jsonl").read_text().splitlines()
        asked = [json.loads(line)["question"] for line in lines[options.first :][: options.texts]]
        prompts = [self._prompt(question) for question in asked]
        size = options.batch_size
        self.pad: int = self.tokenizer.pad_token_id or 0
        self.batches = [
            left_padded(prompts[start : start + size], pad=self.pad)
            for start in range(0, len(prompts), size)
        ]
        least = {"min_new_tokens": options.tokens} if options.endless else {}
        self._options = {"max_new_tokens": options.tokens, "do_sample": False, **least}

    def write(self, make_cache: Any, **more: Any) -> list[Tensor]:
        """The texts of each batch, prompts included."""
        return [
            self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                pad_token_id=self.pad,
                **cache_argument(make_cache()),
                **self._options,
                **more,
            )
            for ids, mask in self.batches
        ]

    @torch.inference_mode()
    def gap(self, batch: int, row: int, text: Tensor, place: int) -> float:
        """Between the best two logits before the token at a place of a row."""
        real = self.batches[batch][1][row].bool()
        prompt, new = text[: len(real)][real], text[len(real) : place]
        logits = self.model(input_ids=torch.cat([prompt, new])[None]).logits[0, -1]
        best, second = logits.topk(2).values.tolist()
        return best - second

    def _prompt(self, question: str) -> list[int]:
        if not self.tokenizer.chat_template:
            return self.tokenizer(f"Question: {question}\nAnswer:").input_ids
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]


def measure(options: argparse.Namespace) -> None:
    """Appends what the file has not."""
    logging.disable_progress_bar()
    writer = Writer(options)
    name, weights = Path(options.model).name, digest(writer.model)
    setting = {
        "model": name,
        "batch": options.batch_size,
        "drafts": options.drafts,
        "endless": options.endless,
        "refresh": options.refresh,
        "texts": options.texts,
    }
    known = [
        (row["policy"], row["budget"])
        for row in read_lines(options.out)
        if all(row[key] == value for key, value in setting.items())
    ]
    cells = [
        (policy, int(budget))
        for budget in options.budgets.split(",")
        for policy in options.policies.split(",")
        if (policy, int(budget)) not in known
    ]
    full = writer.write(lambda: DynamicCache(config=writer.model.config)) if cells else []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for policy, budget in tqdm(cells, unit="cell"):
        statistics, started = DraftStatistics(), time.perf_counter()
        texts = writer.write(
            lambda policy=policy, budget=budget: CompressedCache(policy, budget),
            custom_generate=lossless,
            num_draft_tokens=options.drafts,
            adaptive=False,
            refresh=options.refresh,
            statistics=statistics,
        )
        gaps = _gaps(writer, full, texts)
        row = Drafts(
            **setting,
            weights=weights,
            policy=policy,
            budget=budget,
            # The first token of each is of no verification.
            tokens=statistics.tokens + options.texts,
            same=options.texts - len(gaps),
            gap=max(gaps, default=0.0),
            acceptance=statistics.acceptance_rate,
            per_verification=statistics.tokens_per_verification,
            torch=torch.__version__,
        )
        with options.out.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        tqdm.write(f"{row} in {time.perf_counter() - started:.0f} s")


def _gaps(writer: Writer, full: list[Tensor], texts: list[Tensor]) -> list[float]:
    """Of each text that differs."""
    found = []
    for batch, (one, other) in enumerate(zip(full, texts, strict=True)):
        width = max(one.shape[1], other.shape[1])
        one, other = (
            torch.nn.functional.pad(text, (0, width - text.shape[1]), value=writer.pad)
            for text in (one, other)
        )
        for row in (one != other).any(dim=1).nonzero().flatten().tolist():
            place = int((one[row] != other[row]).nonzero()[0])
            found.append(writer.gap(batch, row, one[row], place))
    return found


if __name__ == "__main__":
    main()
