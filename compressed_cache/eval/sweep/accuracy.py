"""Accuracy of one cell, as the harness grades it."""

import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import lm_eval

from compressed_cache.eval.results.row import Result
from compressed_cache.eval.sweep import loaded, tasks
from compressed_cache.eval.sweep.group import Finished, Group
from compressed_cache.eval.sweep.plan import Plan
from compressed_cache.integrations.harness import adapter
from compressed_cache.integrations.harness.preflight import check_tasks
from compressed_cache.tasks import metrics
from compressed_cache.wording import listing


def measure(plan: Plan, group: Group) -> list[Finished | Exception]:
    """Runs the harness on the only cell of a group, in this process."""
    (cell,) = group.cells
    started = time.perf_counter()
    model = loaded.model(plan)
    press = cell.press
    adapter.change_press(model, press)
    run = tasks.evaluation(plan, cell.task)
    check_tasks(model, plan.model_args, run)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    # Its decorator hides its parameters.
    simple_evaluate: Any = lm_eval.simple_evaluate
    results = simple_evaluate(
        model=model, bootstrap_iters=0, log_samples=True, **run, **dict.fromkeys(seeds, cell.seed)
    )
    samples = results["samples"][cell.task]
    metric, correct = scores(samples, results["higher_is_better"][cell.task])
    low, high = (end(list(correct.values())) for end in (metrics.low, metrics.high))
    meter, drafts = model.compressed_cache.meter, model.compressed_cache.drafts
    result = Result(
        model=plan.model,
        task=cell.task,
        policy=cell.policy,
        options=press.options(),
        budget=cell.budget,
        seed=cell.seed,
        documents=len(correct),
        accuracy=fmean(correct.values()),
        accuracy_low=low,
        accuracy_high=high,
        tokens=fmean(record.tokens for record in meter.records),
        truncated=fmean(record.truncated for record in meter.records),
        evicted_tokens=fmean(record.evicted_tokens for record in meter.records),
        held_tokens=fmean(record.held_tokens for record in meter.records),
        cache_bytes=fmean(record.cache_bytes for record in meter.records),
        tokens_per_s=sum(record.tokens for record in meter.records) / meter.seconds,
        seconds=time.perf_counter() - started,
        correct=correct,
        metric=metric,
        drafts=drafts.to_json() if drafts else None,
        versions=loaded.versions(),
        machine=loaded.machine(model.model),
        given=plan.given(cell.setting),
        setting=cell.setting,
        weights=loaded.digest(model.model),
    )
    return [Finished(result, samples)]


def scores(
    samples: Sequence[dict[str, Any]], higher_is_better: Mapping[str, bool]
) -> tuple[str, dict[str, float]]:
    """Of each document what the task grades first, under its first filter.

    Args:
        samples: as the harness logs them: one for each document and filter.
        higher_is_better: of each metric.

    Returns:
        What the harness calls the metric, and the scores by what identifies a document.

    Raises:
        ValueError: there is no metric which every document has as a share, 0 to 1.
    """
    filter_ = samples[0]["filter"]
    own = [sample for sample in samples if sample["filter"] == filter_]
    for metric in own[0]["metrics"]:
        values: list[Any] = [sample.get(metric) for sample in own]
        if higher_is_better.get(metric, True) and all(map(_is_share, values)):
            return f"{metric},{filter_}", {
                _identity(sample): float(value) for sample, value in zip(own, values, strict=True)
            }
    raise ValueError(
        f"the task must have a metric that is a share of each document, 0 to 1, has "
        f"{listing(own[0]['metrics'])}. Use lm_eval itself: compressed-cache eval"
    )


def _is_share(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and 0 <= value <= 1


def _identity(sample: dict[str, Any]) -> str:
    # Its place alone would pair different documents, once the data has changed.
    return f"{sample['doc_id']}-{sample['doc_hash'][:8]}"
