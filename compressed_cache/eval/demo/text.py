"""Generation with a model of the user's, once per policy."""

import argparse
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressed_cache.cache import CompressedCache
from compressed_cache.versions import cache_argument


def generate(
    console: Console,
    name_or_path: str,
    prompt: str,
    policies: list[str],
    budgets: list[int],
    options: argparse.Namespace,
) -> None:
    """Prints what the model writes under each policy, and what it cost."""
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(name_or_path, dtype="auto")
    model = model.to(device).eval()
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    costs = Table("policy", "budget", "tokens", "tok/s", "cache", "evicted")
    runs = [("full", None)] if "full" in policies else []
    runs += [(policy, budget) for budget in budgets for policy in policies if policy != "full"]
    for policy, budget in runs:
        # Each policy takes graphs of its own, and torch makes only a few of one function.
        torch._dynamo.reset()
        cache = CompressedCache(policy, budget or 1)
        started = time.perf_counter()
        output = model.generate(
            **inputs,
            **cache_argument(cache),
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
        )[0, inputs.input_ids.shape[1] :]
        seconds = time.perf_counter() - started
        shown = "" if budget is None else str(budget)
        console.rule(f"{policy} {shown}", align="left")
        console.print(tokenizer.decode(output, skip_special_tokens=True), markup=False)
        costs.add_row(
            policy,
            shown,
            str(len(output)),
            f"{len(output) / seconds:.0f}",
            f"{cache.nbytes / 2**20:.1f} MiB",
            str(cache.evicted_tokens),
        )
    console.print(costs)
