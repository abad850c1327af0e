"""What the mask of a call says: which new tokens are real, and what each of them sees.

A *column* of a mask is a token of the text as the model counts it, padding included. A layer knows
its tokens by their positions, which leave padding out::

    column       0    1    2    3    4    5    6    7
    token        .    a    b    c    .    .    d    e      . is padding
    position    -1    0    1    2   -1   -1    3    4
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from compressed_cache.ops.attention import group_queries


class Mask(NamedTuple):
    """What the new tokens of one call see: bool, or float that is added to their logits."""

    own: Tensor | None
    """``[B | 1, H * G | 1, L, L]``, of the new tokens; None: each sees those before it."""
    past: Tensor | None = None
    """``[B | 1, H * G | 1, L, T]``, of the columns before them; None: whatever is held."""
    is_built: bool = False
    """Whether transformers built it for this call, so that a sliding window is part of it, counted
    in columns."""
    real: Tensor | None = None
    """``[B, T + L]`` bool, columns of real tokens; there with ``past``."""

    def first(self, count: int) -> "Mask":
        """That of the first ``count`` new tokens."""
        own = None if self.own is None else self.own[:, :, :count, :count]
        return self._replace(own=own, past=None if self.past is None else self.past[:, :, :count])

    def over_slots(self) -> "Mask":
        """The same once the new tokens are in slots too."""
        assert self.own is not None and self.past is not None
        return self._replace(own=None, past=torch.cat([self.past, self.own], dim=3))

    def see(
        self,
        causal: Tensor,
        exists: Tensor,
        start: int = 0,
        *,
        positions: Tensor,
        groups: int,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What ``Q`` of the new tokens see of ``S`` slots and of the ``L`` new tokens after them.

        Args:
            causal: ``[B, H | 1, Q, S + L]`` bool, what they see where this mask says nothing.
            exists: the same, what there is to see.
            start: the first of these queries among the new tokens.
            positions: ``[B, H, S]`` int64, of the token in each slot, negative where there is none.
            groups: ``G``.
            window: that of the layer, in tokens.

        Returns:
            ``[B, H | 1, G | 1, Q, S + L]`` bool, and what is added to the logits, None where
            nothing is.
        """
        slots, queries = positions.shape[2], slice(start, start + causal.shape[2])
        seen: list[Tensor] = list(causal.unsqueeze(2).split_with_sizes(_parts(causal, slots), 4))
        there = exists.unsqueeze(2).split_with_sizes(_parts(exists, slots), 4)
        bias: list[Tensor | None] = [None, None]
        if self.past is not None and slots:
            assert self.real is not None
            columns = columns_of(positions, self.real[:, : self.past.shape[3]])
            past = _grouped(self.past[:, :, queries], groups)
            shape = torch.broadcast_shapes(past.shape[:4], (*columns.shape[:2], 1, 1))
            index = columns[:, :, None, None].expand(*shape, -1)
            past = past.expand(*shape, -1).gather(4, index)
            seen[0], bias[0] = is_visible(past) & there[0], _bias(past)
        if self.own is not None:
            own = _grouped(self.own[:, :, queries], groups)
            shown = is_visible(own)
            if self.is_built and window is not None:
                # Padding between two tokens does not move them apart.
                column = torch.arange(own.shape[4], device=own.device)
                is_far = column[queries, None] - column >= window
                shown = shown | (is_far & seen[1])
            seen[1], bias[1] = shown & there[1], _bias(own)
        return _cat(seen), None if bias == [None, None] else _cat_bias(bias, seen)


def read_mask(attention_mask: Any, keys: Tensor, *, seen: int, is_built: bool) -> Mask | None:
    """What a mask says beyond padding.

    Args:
        attention_mask: what transformers passes to an attention function: None, a bool or additive
            mask ``[B | 1, H * G | 1, L, K]`` (sdpa, eager), a 2-D mask (flash attention) or a
            ``BlockMask`` (flex attention); of the new tokens alone (``K = L``) or of the whole
            text (``K = T + L``).
        keys: ``[B, H, L, D]`` the new keys.
        seen: ``T``, tokens of the text before these, padding included.
        is_built: whether transformers built it for this call.

    Returns:
        None where every token sees those before it, as far as can be told.

    Raises:
        TypeError: a 4-D mask that is neither bool nor float.
        ValueError: a mask of another number of tokens.
    """
    length = keys.shape[2]
    if isinstance(attention_mask, BlockMask):
        if not seen:
            # All of it would be as large as the attention weights.
            return None
        batch, heads, _, width = attention_mask.shape
        attention_mask = create_mask(
            attention_mask.mask_mod, batch, heads, length, width, device=str(keys.device)
        )
    if attention_mask is None or attention_mask.dim() != 4:
        return None
    if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
        raise TypeError(
            f"attention_mask of four dimensions must be bool or float, got {attention_mask.dtype}"
        )
    if not seen:
        return Mask(attention_mask[..., -length:, -length:], None, is_built)
    check_width(attention_mask.shape[-1], length, seen, is_own=is_built)
    past = attention_mask[..., :seen] if attention_mask.shape[-1] > length else None
    return Mask(attention_mask[..., -length:], past, is_built)


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


def is_wide(attention_mask: Any) -> bool:
    """Whether the mask of a decode step says more than whether its token is padding."""
    if attention_mask is None:
        return False
    return len(attention_mask.shape) == 4 and attention_mask.shape[-1] > 1


def own_entry(attention_mask: Any, batch: int) -> Tensor | None:
    """Whether the token of a decode step is real, ``[B]`` bool; None where nothing is said of it.

    Flex attention says nothing: its mask is a function of numbers that change with each step.
    """
    if attention_mask is None or isinstance(attention_mask, BlockMask):
        return None
    if attention_mask.dim() == 2:
        return attention_mask[:, -1].bool().expand(batch)
    own = is_visible(attention_mask[:, :, -1, -1])
    return (own.squeeze(1) if own.shape[1] == 1 else own.any(dim=1)).expand(batch)


def check_width(width: int, length: int, seen: int, *, is_own: bool) -> None:
    """Raises ``ValueError`` unless a 4-D mask has a column for each token.

    Args:
        width: of the mask.
        length: new tokens.
        seen: tokens before them.
        is_own: whether it may be of the new tokens alone.
    """
    if width != seen + length and not (is_own and width == length):
        raise ValueError(
            f"attention_mask of four dimensions must have {seen + length} columns, for the {seen} "
            f"tokens the cache has seen (padding included) and {length} new ones, got {width}"
        )


def real_tokens(attention_mask: Any, keys: Tensor) -> Tensor:
    """``True`` where a new token is real, ``False`` at padding.

    Args:
        attention_mask: as for :func:`read_mask`. A token is padding where it does not see itself:
            its own entry is ``False``, the least number of the mask's dtype or ``-inf``. A number
            between is a bias. Only the last ``L`` columns are read.
        keys: ``[B, H, L, D]`` the new keys.

    Returns:
        ``[B, L]`` bool.
    """
    batch, _, length, _ = keys.shape
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=keys.device)
    if isinstance(attention_mask, BlockMask):
        row = torch.arange(batch, device=keys.device)[:, None]
        own = torch.arange(length, device=keys.device)[None]
        before = attention_mask.shape[-1] - length
        real = attention_mask.mask_mod(row, torch.zeros_like(own), own, own + before)
    elif attention_mask.dim() == 2:
        real = attention_mask[:, -length:].bool()
    else:
        own = attention_mask[:, :, -length:, -length:].diagonal(dim1=2, dim2=3)
        real = is_visible(own).any(dim=1)
    return real.expand(batch, length)


def is_visible(mask: Tensor) -> Tensor:
    """Where a mask, bool or additive, hides nothing."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to logits where a bool ``mask`` is to hide the same."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def is_causal(mask: Mask | None, real: Tensor) -> bool:
    """Whether each real token ``[B, L]`` of a first prompt sees exactly those before it."""
    if mask is None or mask.own is None:
        return True
    length = real.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=real.device).tril()
    pairs = (real[:, None, :, None] & real[:, None, None, :]).expand(-1, mask.own.shape[1], -1, -1)
    own = mask.own.expand(real.shape[0], -1, -1, -1)
    if own.dtype == torch.bool:
        return bool((~pairs | (own == causal)).all())
    return bool((~pairs | torch.where(causal, own == 0, ~is_visible(own))).all())


def check_left(real: Tensor) -> None:
    """Raises ``ValueError`` if a row of ``[B, L]`` has padding after a real token."""
    if bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise ValueError(
            "attention_mask must pad on the left, got padding after a real token. Set "
            "tokenizer.padding_side = 'left'."
        )


def first_tokens(attention_mask: Any, count: int, *, of: int) -> Any:
    """The mask of the first ``count`` of ``of`` new tokens, in the kind that was given.

    Raises:
        NotImplementedError: a part of a ``BlockMask``.
    """
    if attention_mask is None or count == of:
        return attention_mask
    if isinstance(attention_mask, BlockMask):
        raise NotImplementedError(
            "assisted decoding with attn_implementation='flex_attention' is not supported. Use "
            "'sdpa' or 'eager'."
        )
    if attention_mask.dim() == 2:
        return attention_mask[:, : attention_mask.shape[1] - of + count]
    held = attention_mask.shape[-1] - of
    return attention_mask[:, :, :count, : held + count]


def _parts(visible: Tensor, slots: int) -> list[int]:
    return [slots, visible.shape[3] - slots]


def _grouped(mask: Tensor, groups: int) -> Tensor:
    """``[B | 1, H | 1, G | 1, Q, K]``."""
    if mask.shape[1] == 1:
        return mask.unsqueeze(2)
    return group_queries(mask, mask.shape[1] // groups)


def _bias(mask: Tensor) -> Tensor | None:
    return None if mask.dtype == torch.bool else mask.masked_fill(~is_visible(mask), 0.0).float()


def _cat(parts: list[Tensor]) -> Tensor:
    shape = torch.broadcast_shapes(*(part.shape[:4] for part in parts))
    return torch.cat([part.expand(*shape, -1) for part in parts], dim=4)


def _cat_bias(parts: list[Tensor | None], like: list[Tensor]) -> Tensor:
    return _cat(
        [
            torch.zeros_like(other, dtype=torch.float32) if part is None else part
            for part, other in zip(parts, like, strict=True)
        ]
    )


def left_padded(
    rows: Sequence[Sequence[int]], *, pad: int = 0, least: int = 1
) -> tuple[Tensor, Tensor]:
    """Token ids and mask ``[B, L]`` int64 of texts, padded on the left.

    Args:
        rows: the ids of each text.
        pad: the id that padding has.
        least: columns there are at least.
    """
    width = max(least, *map(len, rows))
    ids = [[pad] * (width - len(row)) + [*row] for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)
