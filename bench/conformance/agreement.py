"""How much of what two caches keep is the same, and what makes the difference."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

Kept = list[list[list[int]]]
"""Positions by layer and key/value head."""


class Agreement(NamedTuple):
    """Heads and positions that were compared, and those that are equal."""

    heads: int = 0
    equal_heads: int = 0
    positions: int = 0
    """Of each head as many as the one that keeps more of them keeps."""
    equal_positions: int = 0

    @property
    def is_complete(self) -> bool:
        return self.equal_heads == self.heads

    @property
    def different_positions(self) -> int:
        return self.positions - self.equal_positions

    def plus(self, other: "Agreement") -> "Agreement":
        """Both together."""
        return Agreement(*(a + b for a, b in zip(self, other, strict=True)))


def agreement(ours: Sequence[Kept], theirs: Sequence[Kept]) -> Agreement:
    """That of what was kept at one cut after the other.

    Raises:
        ValueError: other numbers of cuts, layers or heads.
    """
    total = Agreement()
    for one, other in zip(ours, theirs, strict=True):
        for layer, its in zip(one, other, strict=True):
            for head, head_of_theirs in zip(layer, its, strict=True):
                a, b = set(head), set(head_of_theirs)
                total = total.plus(Agreement(1, a == b, max(len(a), len(b)), len(a & b)))
    return total


class Explained(NamedTuple):
    """What agrees as it is, what agrees once some causes are undone, and which these are."""

    as_is: Agreement
    undone: Agreement
    causes: tuple[str, ...]


def explain(run: Callable[[tuple[str, ...]], Agreement], causes: Sequence[str]) -> Explained:
    """Tells by trial which causes keep two caches from agreeing.

    A cause is one if more differs without undoing it than with all of them undone; where no single
    one is missed, all are.

    Args:
        run: compares with the given causes undone.
        causes: what can be undone, by name.
    """
    as_is = run(())
    if as_is.is_complete:
        return Explained(as_is, as_is, ())
    undone = run(tuple(causes))
    if undone.different_positions >= as_is.different_positions:
        return Explained(as_is, as_is, ())
    needed = []
    for cause in causes:
        without = run(tuple(other for other in causes if other != cause))
        if without.different_positions > undone.different_positions:
            needed.append(cause)
    return Explained(as_is, undone, tuple(needed or causes))
