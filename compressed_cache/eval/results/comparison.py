"""Two policies on the same documents, which tells more than their two intervals."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, bootstrap

from compressed_cache.eval.results.row import Measured, Result
from compressed_cache.wording import listing, nearest

_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A first and a second policy on one task."""

    measure: str
    """Which the accuracies below are of."""
    model: str
    task: str
    budget: int | None
    """Of whichever has one; None if neither has."""
    seeds: int
    """How often each document was asked. Documents, not replies, are the sample."""
    documents: int
    accuracies: tuple[float, float]
    difference: float
    """Accuracy of the first minus that of the second."""
    difference_low: float
    """Lower end of its 95% bootstrap interval."""
    difference_high: float
    better: tuple[int, int]
    """Documents on which the first scored higher, and on which the second did."""
    p: float
    """Exact McNemar test: how often so uneven a split, or a worse one, comes by chance."""


def compare(results: Sequence[Measured], first: str, second: str) -> list[Comparison]:
    """Every pair of rows that differ in the policy, seeds together.

    Args:
        results: rows of any policies.
        first: a policy, or a setting of one, as a sweep was given it.
        second: another; one that has no budget is compared at each budget of the other.

    Raises:
        ValueError: a policy without rows, one with several rows of the same task, budget and seed,
            or rows that have no documents in common.
    """
    ours, theirs = _by_cell(results, first), _by_cell(results, second)
    found = []
    for key, rows in ours.items():
        for other, rows_ in theirs.items():
            if key[:3] == other[:3] and (key[3] == other[3] or None in (key[3], other[3])):
                budget = other[3] if key[3] is None else key[3]
                found.append(_compared(rows, rows_, budget))
    if not found:
        raise ValueError(
            f"{first!r} and {second!r} must have rows of the same model, task and budget, there "
            "are none. Sweep both of them over the same tasks."
        )
    return found


def _by_cell(
    results: Sequence[Measured], policy: str
) -> dict[tuple[str, str, str, int | None], dict[int, Measured]]:
    """Rows by measure, model, task and budget, then by seed."""
    found: dict[tuple[str, str, str, int | None], dict[int, Measured]] = defaultdict(dict)
    for row in results:
        if row.name != policy:
            continue
        rows = found[row.measure, row.model, row.task, row.budget]
        if row.seed in rows:
            several = [rows[row.seed].options, row.options]
            # Of two folders, for example.
            got = "two with the same options" if several[0] == several[1] else f"{several}"
            raise ValueError(
                f"{policy!r} must have one row of {row.task}, budget {row.budget} and seed "
                f"{row.seed}, got more: {got}. Keep one of them."
            )
        rows[row.seed] = row
    if not found:
        names = {row.name for row in results}
        raise ValueError(
            f"there are no rows of {policy!r}, only of {listing(names)}{nearest(policy, names)}"
        )
    # Where nothing was evicted, there is no agreement to compare.
    scored = {
        key: rows
        for key, rows in found.items()
        if key[0] == Result.measure or all(row.scores for row in rows.values())
    }
    if not scored:
        raise ValueError(
            f"the rows of {policy!r} must have evicted something to be compared, none has. Use "
            "smaller budgets, or longer texts; the full cache is what all are compared with"
        )
    return scored


def _compared(
    first: dict[int, Measured], second: dict[int, Measured], budget: int | None
) -> Comparison:
    row = next(iter(first.values()))
    seeds = sorted(first.keys() & second.keys())
    each = [first[seed].scores.keys() & second[seed].scores.keys() for seed in seeds]
    documents = sorted(set.intersection(*map(set, each))) if each else []
    if not documents:
        raise ValueError(
            f"{row.task}, budget {budget}: the rows must have documents in common, they have none. "
            "Sweep both policies with the same seeds and limit over the same data."
        )
    scores = [
        np.array([[rows[seed].scores[name] for seed in seeds] for name in documents]).mean(axis=1)
        for rows in (first, second)
    ]
    differences = scores[0] - scores[1]
    better = int((differences > 0).sum()), int((differences < 0).sum())
    low, high = _interval(differences)
    return Comparison(
        measure=row.measure,
        model=row.model,
        task=row.task,
        budget=budget,
        seeds=len(seeds),
        documents=len(documents),
        accuracies=(float(scores[0].mean()), float(scores[1].mean())),
        difference=float(differences.mean()),
        difference_low=low,
        difference_high=high,
        better=better,
        p=float(binomtest(better[0], sum(better)).pvalue) if sum(better) else 1.0,
    )


def _interval(differences: np.ndarray) -> tuple[float, float]:
    if len(set(differences)) == 1:
        # All resamples are the same, which scipy has no interval for.
        return float(differences[0]), float(differences[0])
    interval = bootstrap(
        (differences,), np.mean, method="percentile", rng=np.random.default_rng(_SEED)
    ).confidence_interval
    return float(interval.low), float(interval.high)
