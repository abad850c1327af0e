"""Two policies on the same documents."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, bootstrap

from compressed_cache.report.rows import Row


@dataclass(frozen=True)
class Comparison:
    """A row beside another on the documents they share."""

    row: Row
    against: str
    documents: int
    difference: float
    """In accuracy."""
    low: float
    """Lower end of the 95% bootstrap interval over documents."""
    high: float
    p: float
    """McNemar's exact test of no difference."""


def comparisons(rows: Sequence[Row]) -> Iterator[Comparison]:
    """Each row against the full cache, and against `random` at the same setting.

    Where two documents at least are shared: of one there is no interval.
    """
    for row in rows:
        if row.is_full:
            continue
        others = {
            "full": [other for other in rows if other.is_full],
            "random": [r for r in rows if r.policy == "random" and r.setting == row.setting],
        }
        for against, candidates in others.items():
            shared = [r for r in candidates if len(row.correct.keys() & r.correct.keys()) > 1]
            if shared and row.policy != against:
                # That of the same seed, if there is one.
                other = max(shared, key=lambda other: other.seed == row.seed)
                yield _compare(row, other, against)


def _compare(row: Row, other: Row, against: str) -> Comparison:
    documents = sorted(row.correct.keys() & other.correct.keys())
    differences = np.array([row.correct[each] - other.correct[each] for each in documents])
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    interval = bootstrap(
        (differences,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Comparison(
        row=row,
        against=against,
        documents=len(documents),
        difference=float(differences.mean()),
        low=float(interval.low),
        high=float(interval.high),
        p=float(binomtest(better, better + worse).pvalue) if better + worse else 1.0,
    )
