"""The shipped model's problems in lm-evaluation-harness, under every policy.

    python -m bench.harness

Writes ``bench/results/harness.json``. Each cell is what this command prints::

    lm_eval --model hf --tasks reasoning_shipped --batch_size 50 \\
        --include_path "$(python -m compressed_cache.tasks)" \\
        --model_args pretrained=$(compressed-cache model),kv_press=h2o,kv_budget=256
"""

import argparse
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.tasks import TaskManager

from compressed_cache.eval.demo.measure import CORE
from compressed_cache.integrations.harness.autoload import install
from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.tasks import PATH

OUT = Path(__file__).resolve().parent / "results" / "harness.json"
BUDGETS = (128, 256, 384)
TASKS = ("reasoning_shipped_easy", "reasoning_shipped_long")
METRICS = (
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "answered",
    "tokens",
    "truncated",
    "evicted_share",
    "held_tokens",
    "cache_bytes",
)
BATCH = 50


def measure(policy: str, budget: int | None) -> list[dict[str, Any]]:
    """One row per task."""
    arguments: dict[str, Any] = {"pretrained": str(MODEL_PATH), "kv_press": policy}
    if budget is not None:
        arguments["kv_budget"] = budget
    # Its decorator hides its parameters.
    simple_evaluate: Any = lm_eval.simple_evaluate
    results = simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=["reasoning_shipped"],
        task_manager=TaskManager(include_path=str(PATH), include_defaults=False),
        batch_size=BATCH,
        device="cpu",
        bootstrap_iters=0,
        log_samples=False,
    )
    return [
        {"policy": policy, "budget": budget, "task": task, "documents": summary["sample_len"]}
        | {metric: summary[f"{metric},none"] for metric in METRICS}
        for task, summary in results["results"].items()
        if task in TASKS
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measures all cells and writes them."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.harness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=OUT, help="the file of all numbers")
    options = parser.parse_args(arguments)
    install()
    settings = [("full", None), *((p, b) for b in BUDGETS for p in CORE if p != "full")]
    packages = ("compressed-cache", "lm-eval", "torch", "transformers")
    document = {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "machine": {"device": "cpu", "architecture": platform.machine()},
        "threads": torch.get_num_threads(),
        "batch_size": BATCH,
        "rows": [row for setting in settings for row in measure(*setting)],
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
