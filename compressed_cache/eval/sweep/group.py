"""Cells that one process runs together."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from compressed_cache.eval.agreement.text import Text
from compressed_cache.eval.results.row import Row
from compressed_cache.eval.sweep.plan import Cell

MOST = 8
"""Cells that read beside one full cache: the more, the less it costs, and the more is lost when a
process is killed."""


@dataclass(frozen=True)
class Group:
    """They begin and end at the same time, but each of them may fail alone."""

    cells: tuple[Cell, ...]
    texts: tuple[Text, ...] = ()
    """What they read; none where they write."""

    def singly(self) -> Iterator["Group"]:
        """A group for each cell."""
        return (Group((cell,), self.texts) for cell in self.cells)


class Finished(NamedTuple):
    """What came of a cell."""

    row: Row
    samples: list[dict[str, Any]]
    texts: Sequence[Text] = ()
    """What it wrote, for others to read."""


def together(cells: Iterable[Cell], texts: Sequence[Text], *, processes: int) -> Iterator[Group]:
    """Cells of one task in as few groups as keep all processes at work."""
    cells = list(cells)
    size = max(1, min(MOST, -(-len(cells) // processes)))
    starts = range(0, len(cells), size)
    return (Group(tuple(cells[start : start + size]), tuple(texts)) for start in starts)
