"""Which combinations of parameters are tested where all of them would take too long."""

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few combinations, one value of each axis, in which any two values of two axes meet.

    Always the same ones: the first of those that bring most new pairs, until none is missing.
    """
    grid = list(product(*(range(len(axis)) for axis in axes)))
    missing = {pair for point in grid for pair in _pairs(point)}
    chosen: list[tuple[Any, ...]] = []
    while missing:
        best = max(grid, key=lambda point: len(missing & _pairs(point)))
        missing -= _pairs(best)
        chosen.append(tuple(axis[index] for axis, index in zip(axes, best, strict=True)))
    return chosen


def alternating(names: Iterable[Any], values: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Each name with one of the values, in turn."""
    return [(name, values[number % len(values)]) for number, name in enumerate(names)]


def slow_but(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Cases, all of them slow but those that begin with one of these values, or tuples of them."""
    starts = [_tuple(start) for start in quick]
    marked = []
    for case in map(_tuple, cases):
        is_quick = any(case[: len(start)] == start for start in starts)
        marked.append(pytest.param(*case, marks=[] if is_quick else pytest.mark.slow))
    return marked


def _tuple(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)


def _pairs(point: tuple[int, ...]) -> set[Any]:
    return set(combinations(enumerate(point), 2))
