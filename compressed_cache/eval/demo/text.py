"""Generation with a model of the user's, once per policy."""

import argparse
import sys
import time

import torch
from rich.console import Console
from rich.table import Table

from compressed_cache.cache import CompressedCache
from compressed_cache.hf.loading import load
from compressed_cache.versions import cache_argument


def generate(
    console: Console,
    name_or_path: str,
    prompt: str,
    policies: list[str],
    budgets: list[int],
    options: argparse.Namespace,
) -> int:
    """Prints what the model writes under each policy, and what it cost."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer, model = load(name_or_path, device=device)
    except ValueError as error:
        print(f"--model {name_or_path}: {error}", file=sys.stderr)
        return 1
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    costs = Table("policy", "budget", "tokens", "tok/s", "cache", "evicted")
    runs = [("full", None)] if "full" in policies else []
    runs += [(policy, budget) for budget in budgets for policy in policies if policy != "full"]
    try:
        for policy, budget in runs:
            shown = "" if budget is None else str(budget)
            console.rule(f"{policy} {shown}", align="left")
            # Each policy takes graphs of its own, and torch makes only a few of one function.
            torch._dynamo.reset()
            started = time.perf_counter()
            try:
                cache = CompressedCache(policy, budget or 1)
                output = model.generate(
                    **inputs,
                    **cache_argument(cache),
                    max_new_tokens=options.max_new_tokens,
                    do_sample=False,
                )[0, inputs.input_ids.shape[1] :]
            except (NotImplementedError, ValueError) as error:
                console.print(f"refused: {error}", markup=False, highlight=False)
                costs.add_row(policy, shown, *"-" * 4)
                continue
            seconds = time.perf_counter() - started
            console.print(tokenizer.decode(output, skip_special_tokens=True), markup=False)
            costs.add_row(
                policy,
                shown,
                str(len(output)),
                f"{len(output) / seconds:.0f}",
                f"{cache.nbytes / 2**20:.1f} MiB",
                str(cache.evicted_tokens),
            )
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    finally:
        console.print(costs)
    return 0
