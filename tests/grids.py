"""Which combinations of parameters are tested where all of them would take too long."""

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any


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


def _pairs(point: tuple[int, ...]) -> set[Any]:
    return set(combinations(enumerate(point), 2))
