"""Agreement of one policy under other options, on texts that ``agree`` has written.

    compressed-cache agree --model MODEL --dtype bfloat16 --chat --task reasoning_gsm8k \\
        --metadata '{"rows": "0:50"}' --policies random --budgets 96 --batch-size 50 --out FOLDER
    python -m bench.variants --model MODEL --texts FOLDER/cells/reasoning_gsm8k.full.0

Defaults are chosen by it, so on rows that no table reports.
"""

import argparse
import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from compressed_cache import CompressedCache
from compressed_cache.eval.agreement import text
from compressed_cache.eval.agreement.reading import read
from compressed_cache.eval.agreement.statistics import Document, summary
from compressed_cache.eval.sweep.group import MOST

RESULTS = Path(__file__).resolve().parent / "results" / "variants.json"
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"interval": 8},
    {"protect_prompt": True},
    {"protect_prompt": True, "interval": 8},
    {"protect_prompt": True, "recent": 16, "interval": 8},
    {"recent": 16},
    {"window": 8, "recent": 32},
    {"pool": "max"},
    {"interval": 1},
    {"interval": 32},
    {"recent": 4},
    {"recent": 48},
    {"window": 8},
    {"window": 16, "recent": 32},
    {"window": 8, "recent": 32, "interval": 8},
    {"sinks": 4},
    {"kernel_size": 1},
    {"protect_prompt": True, "recent": 16},
)
"""What is changed, beside the defaults."""
_KEPT = (
    "documents",
    "late_positions",
    *(f"{name}{end}" for name in ("agreement", "divergence", "lost") for end in ("", "_se")),
)


def main(arguments: list[str] | None = None) -> None:
    """Reads the texts once beside all variants of a budget, and writes a row for each."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.variants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=Path, required=True, help="the folder of the cell of full")
    parser.add_argument("--policy", default="snapkv")
    parser.add_argument("--budgets", default="96,128,176")
    parser.add_argument(
        "--dtype", default="bfloat16", help="float32 where the processor multiplies no bfloat16"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    texts = text.read(options.texts)
    document: dict[str, Any] = {
        "model": Path(options.model).name,
        "weights": texts[0].weights,
        "dtype": options.dtype,
        "policy": options.policy,
        "torch": torch.__version__,
        "rows": [],
    }
    budgets = [int(part) for part in options.budgets.split(",")]
    # All variants at once would fill the memory of many a machine.
    groups = [VARIANTS[start : start + MOST] for start in range(0, len(VARIANTS), MOST)]
    for group, budget in tqdm([(group, budget) for group in groups for budget in budgets]):
        document["rows"] += _read(model, texts, options.policy, budget, group)
        options.out.write_text(json.dumps(document, indent=1) + "\n")


def _cache(policy: str, budget: int, options: dict[str, Any]) -> CompressedCache:
    cache = CompressedCache(policy, budget, **options)
    # As if it were the default, which yields to prompts that do not fit.
    cache.eviction = replace(cache.eviction, prompt_yields=cache.eviction.protect_prompt)
    return cache


def _read(
    model: Any,
    texts: list[text.Text],
    policy: str,
    budget: int,
    group: tuple[dict[str, Any], ...],
) -> list[dict[str, Any]]:
    """A row of each variant."""
    caches = {
        str(number): functools.partial(_cache, policy, budget, options)
        for number, options in enumerate(group)
    }
    rows = []
    for number, one in read(model, text.batch(texts, "cpu"), caches).items():
        row = {"budget": budget, "options": group[int(number)]}
        if isinstance(one, Exception):
            row["error"] = str(one)
        else:
            documents = [Document.of(own, one, index, budget) for index, own in enumerate(texts)]
            means = summary(documents)
            row |= {key: means[key] for key in _KEPT}
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
