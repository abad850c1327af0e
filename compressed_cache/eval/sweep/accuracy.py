"""Accuracy of one cell, as the harness grades it."""

import time
from typing import Any

import lm_eval

from compressed_cache.eval.results.row import Result
from compressed_cache.eval.sweep import loaded, tasks
from compressed_cache.eval.sweep.group import Finished, Group
from compressed_cache.eval.sweep.plan import Plan
from compressed_cache.integrations.harness import adapter
from compressed_cache.integrations.harness.arguments import PressArguments
from compressed_cache.integrations.harness.preflight import check_tasks


def measure(plan: Plan, group: Group) -> list[Finished | Exception]:
    """Runs the harness on the only cell of a group, in this process."""
    (cell,) = group.cells
    started = time.perf_counter()
    model = loaded.model(plan)
    press = PressArguments(cell.policy, cell.cache_arguments)
    adapter.change_press(model, press)
    run = tasks.evaluation(plan, cell.task)
    check_tasks(model, plan.model_args, run)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    # Its decorator hides its parameters.
    simple_evaluate: Any = lm_eval.simple_evaluate
    results = simple_evaluate(
        model=model, bootstrap_iters=0, log_samples=True, **run, **dict.fromkeys(seeds, cell.seed)
    )
    found, samples = results["results"][cell.task], results["samples"][cell.task]
    meter = model.compressed_cache.meter
    result = Result(
        model=plan.model,
        task=cell.task,
        policy=cell.policy,
        options=press.options(),
        budget=cell.budget,
        seed=cell.seed,
        documents=found["sample_len"],
        accuracy=found["accuracy,none"],
        accuracy_low=found["accuracy_low,none"],
        accuracy_high=found["accuracy_high,none"],
        tokens=found["tokens,none"],
        truncated=found["truncated,none"],
        evicted_tokens=found["evicted_tokens,none"],
        held_tokens=found["held_tokens,none"],
        cache_bytes=found["cache_bytes,none"],
        tokens_per_s=sum(record.tokens for record in meter.records) / meter.seconds,
        seconds=time.perf_counter() - started,
        correct={_identity(sample): sample["accuracy"] for sample in samples},
        versions=loaded.versions(),
        machine=loaded.machine(),
        given=plan.given(cell.setting),
        setting=cell.setting,
    )
    return [Finished(result, samples)]


def _identity(sample: dict[str, Any]) -> str:
    # Its place alone would pair different documents, once the data has changed.
    return f"{sample['doc_id']}-{sample['doc_hash'][:8]}"
