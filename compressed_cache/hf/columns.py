"""Which tokens of the text are padding, so that masks of later calls can be mapped to slots.

A *column* of a mask is a token of the text as the model counts it, padding included. A layer knows
its tokens by their positions, which leave padding out::

    column       0    1    2    3    4    5    6    7
    token        .    a    b    c    .    .    d    e      . is padding
    position    -1    0    1    2   -1   -1    3    4
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compressed_cache.ops.masks import Mask, own_entry

See = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor | None]]
"""What :func:`~compressed_cache.ops.attention.attention_rows` asks for what queries see."""


class Columns:
    """What is known of the columns of a text, for all layers of a cache.

    Attributes:
        known: ``[B, C]`` bool, ``True`` at real tokens. Columns from ``C`` on were read in decode
            steps that said nothing of padding, or they are padding of rows that had ended.
        is_built: whether transformers built the masks of the running call, which then may be of
            the new tokens alone.
        is_asked: whether transformers has asked for the size of a mask since the last call.
        announced, announced_at: the last mask that a call was announced with, and how many columns
            were read before it.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Back to before the prompt."""
        self.known: Tensor | None = None
        self.is_built = self.is_asked = False
        self.announced: Any = None
        self.announced_at = -1
        self._step: tuple[Any, Tensor | None] | None = None

    def begin_call(self) -> None:
        """A call begins."""
        self.is_built, self.is_asked = self.is_asked, False
        self._step = None

    def real_of_step(self, attention_mask: Any, batch: int) -> Tensor | None:
        """In which rows ``[B]`` bool the token of a decode step is real; None where it is in all,
        as far as the host can tell without waiting for a device."""
        if torch.compiler.is_compiling():
            # The only token of a batch of one is real, and a mask built inside of the graph is not
            # of this column.
            readable = batch > 1 and self.is_built
            return own_entry(attention_mask, batch) if readable else None
        if self._step is None or self._step[0] is not attention_mask:
            real = own_entry(attention_mask, batch)
            if real is not None and real.device.type == "cpu" and bool(real.all()):
                real = None
            self._step = attention_mask, real
        return self._step[1]

    def __getstate__(self) -> dict[str, Any]:
        # Masks of the running call are nobody's business but its own.
        return {**vars(self), "announced": None, "announced_at": -1, "_step": None}

    def known_until(self, seen: int) -> Tensor | None:
        """What is known of the first ``seen`` columns."""
        return None if self.known is None else self.known[:, :seen]

    def truncate(self, seen: int) -> None:
        """Forgets columns from this one on."""
        if self.known is not None and self.known.shape[1] > seen:
            self.known = self.known[:, :seen]

    def extend(self, real: Tensor, *, seen: int, next_position: Tensor) -> None:
        """Notes new columns ``[B, L]`` bool that follow ``seen`` ones; known ones stay.

        Args:
            real: ``True`` at real tokens.
            seen: columns before these.
            next_position: ``[B]`` int64, real tokens before these.
        """
        if self.known is None or self.known.shape[1] < seen + real.shape[1]:
            self.known = torch.cat([self.until(seen, next_position), real], dim=1)

    def until(self, seen: int, next_position: Tensor) -> Tensor:
        """The first ``seen`` columns ``[B, T]`` bool, with ``next_position`` ``[B]`` real ones."""
        known = self.known
        if known is None:
            known = next_position.new_empty(len(next_position), 0, dtype=torch.bool)
        known = known[:, :seen].to(next_position.device)
        # A row that ended is padded behind its last token.
        later = torch.arange(seen - known.shape[1], device=known.device)
        return torch.cat([known, later < (next_position - known.sum(dim=1))[:, None]], dim=1)

    def see(
        self,
        mask: Mask | None,
        positions: Tensor,
        *,
        next_position: Tensor,
        groups: int,
        window: int | None,
    ) -> See | None:
        """What a mask shows of tokens at ``positions`` ``[B, H, S]`` and of the new ones after
        them; None where there is no mask.

        Args:
            mask: of the running call.
            positions: int64, negative where there is no token.
            next_position: ``[B]`` int64, real tokens before the call.
            groups: ``G``.
            window: that of the layer, in tokens.
        """
        if mask is None:
            return None
        columns = torch.zeros_like(positions)
        if mask.past is not None:
            columns = columns_of(positions, self.until(mask.past.shape[3], next_position))
        return functools.partial(mask.see, columns=columns, groups=groups, window=window)

    def select(self, rows: Tensor) -> None:
        """Row ``b`` becomes a copy of row ``rows[b]``."""
        if self.known is not None:
            self.known = self.known[rows.to(self.known.device)]


def columns_of(positions: Tensor, real: Tensor) -> Tensor:
    """The columns of tokens.

    Args:
        positions: ``[B, H, S]`` int64, negative where there is no token.
        real: ``[B, T]`` bool.

    Returns:
        ``[B, H, S]`` int64, 0 where there is no token.
    """
    order = (~real).to(torch.int8).argsort(dim=1, stable=True)
    index = positions.clamp(min=0).flatten(1)
    return order.gather(1, index).view_as(positions).masked_fill(positions < 0, 0)


def positions_without(hidden: Tensor, real: Tensor) -> Tensor:
    """Where tokens are once some of them count as padding.

    Args:
        hidden: ``[B, T]`` bool, columns that do not count any more.
        real: ``[B, T]`` bool, those that counted.

    Returns:
        ``[B, T]`` int64, by the position of a token its new position, -1 where it is hidden; any
        from the number of real tokens on.
    """
    order = (~real).to(torch.int8).argsort(dim=1, stable=True)
    stays = (real & ~hidden).gather(1, order)
    return torch.where(stays, stays.cumsum(dim=1) - 1, -1)
