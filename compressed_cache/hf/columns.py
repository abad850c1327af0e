"""Which columns of a text are padding, as masks of later calls count them."""

from typing import Any

import torch
from torch import Tensor

from compressed_cache.hf import checks
from compressed_cache.ops.masks import check_left, own_entry, positions_without


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
        self.hold_text(None)
        self.is_built = self.is_asked = False
        self.announced: Any = None
        self.announced_at = -1
        self._has_begun = False
        self._step: tuple[Any, Tensor | None] | None = None

    def begin_call(self) -> None:
        """A call begins."""
        self.is_built, self.is_asked = self.is_asked, False
        self._has_begun = False
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

    def hold_text(self, text: Tensor | None) -> None:
        """Takes ``[B, C]`` for the ids of the first columns, padding included; None: unknown."""
        self._text, self._expected = text, None

    def expect_text(self, ids: Tensor, seen: int) -> None:
        """Notes the ids ``[B, T + L]`` of a text of which ``seen`` tokens are read, before a call
        that reads the others."""
        self._text, self._expected = self.text_until(seen), ids

    def forget_expected(self) -> None:
        """That call failed, so it is not known what was read of it."""
        self._expected = None

    def text_until(self, seen: int) -> Tensor | None:
        """The ids of the first ``seen`` columns, or of fewer where the others were not told."""
        expected = self._expected
        if expected is not None and expected.shape[1] <= seen:
            return expected
        return None if self._text is None else self._text[:, :seen]

    def rows_of(
        self, ids: Tensor, mask: Tensor | None, *, seen: int, next_position: Tensor
    ) -> Tensor | None:
        """The rows that hold the beginnings of texts. Beams are not in the order of their texts.

        Args:
            ids: ``[B, T + L]`` int64.
            mask: ``[B, T + L]``, where it is zero nothing is compared; None: it is nowhere.
            seen: ``T``.
            next_position: ``[B]`` int64, real tokens before the call.

        Returns:
            ``[B]`` int64; None where each text is in its own row, as far as was told.

        Raises:
            ValueError: a text that begins with other tokens than were read.
        """
        text = self.text_until(seen)
        if text is None or not len(text) == len(ids) == len(next_position):
            # The call of another batch is refused when it begins.
            return None
        width, device = text.shape[1], ids.device
        text, ids = text.to(device), ids[:, :width]
        known = self.until(seen, next_position)[:, :width].to(device)
        shown = torch.ones_like(known) if mask is None else mask[:, :width].to(device, torch.bool)
        is_other = (ids != text) & known & shown
        moves = is_other.any(dim=1)
        if not bool(moves.any()):
            return None
        differs = torch.stack(
            [
                (((own != text) | ~known) & own_shown).any(dim=1)
                for own, own_shown in zip(ids, shown, strict=True)
            ]
        )
        checks.check_text_held(is_other & differs.all(dim=1, keepdim=True), seen)
        rows = torch.arange(len(ids), device=device)
        return torch.where(moves, differs.int().argmin(dim=1), rows)

    def announce(
        self, attention_mask: Any, tokens: int, *, seen: int, like: Tensor
    ) -> Tensor | None:
        """What the mask of a call that begins says of all columns.

        Args:
            attention_mask: as the model was given it.
            tokens: of each row in this call.
            seen: columns before these.
            like: a tensor of the first layer.

        Returns:
            ``[B | 1, T + L]`` bool; None where it says nothing, where that was told before, or
            where it would have to be waited for.

        Raises:
            ValueError: a mask that is shorter than the text.
        """
        is_new = self.announced is not attention_mask or self.announced_at != seen
        # What generate has built for the call before comes without the text.
        width = 0 if attention_mask is None else attention_mask.shape[-1]
        if not is_new or (self.is_asked and width == tokens):
            return None
        self.announced, self.announced_at = attention_mask, seen
        if self.known is not None and self.known.shape[1] > seen:
            self.known = self.known[:, :seen]
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            return None
        checks.check_mask(attention_mask, seen, tokens)
        if tokens == 1 and like.device.type != "cpu":
            return None
        return attention_mask[:, : seen + tokens].to(like.device, torch.bool)

    def moved_by(self, real: Tensor, *, seen: int, next_position: Tensor) -> Tensor | None:
        """Where tokens are once those columns that are not ``real`` any more count as padding.

        Args:
            real: ``[B | 1, T + L]`` bool.
            seen: ``T``.
            next_position: ``[B]`` int64, real tokens before the call.

        Returns:
            ``[B, T]`` int64 as of :func:`~compressed_cache.ops.masks.positions_without`; None where
            all are where they were.

        Raises:
            ValueError: a mask that shows what was read as padding.
        """
        past = real[:, :seen]
        known = self.known
        if known is not None and known.shape == past.shape and torch.equal(known, past):
            return None
        known = self.until(seen, next_position)
        past = past.expand(len(known), -1)
        checks.check_shown(known, past)
        hidden = known & ~past
        return positions_without(hidden, known) if bool(hidden.any()) else None

    def begin_text(self, real: Tensor) -> None:
        """Notes the columns ``[B, L]`` bool of a first prompt, for all layers by the first of them.

        Raises:
            ValueError: padding after a real token.
        """
        # Each look at it waits for the device.
        if not self._has_begun:
            check_left(real)
            self.known, self._has_begun = real, True

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
        # A row that ended is padded after its last token.
        later = torch.arange(seen - known.shape[1], device=known.device)
        return torch.cat([known, later < (next_position - known.sum(dim=1))[:, None]], dim=1)

    def select(self, rows: Any, *, all_stay: bool = False) -> Tensor:
        """Row ``b`` becomes a copy of row ``rows[b]``.

        Args:
            rows: their indices, or a bool for each row that is held.
            all_stay: whether there must be as many as before.

        Returns:
            The indices ``[B]`` int64.

        Raises:
            TypeError: what is no index of a row.
            ValueError: no rows, other ones than are held, or another number where all must stay.
        """
        rows = torch.as_tensor(rows)
        if self.known is not None:
            rows = checks.rows_held(rows, len(self.known), all_stay=all_stay)
            self.known = self.known[rows.to(self.known.device)]
        if self._text is not None:
            self._text = self._text[rows.to(self._text.device)]
        if self._expected is not None:
            self._expected = self._expected[rows.to(self._expected.device)]
        return rows
