"""Pure tensor steps on slots: protect, rank, keep the best, pool by position.

One legend for all shapes of this library: ``B`` batch, ``H`` key/value heads, ``G`` query heads per
key/value head, ``S`` slots (static capacity), ``L`` new tokens in one call, ``W`` observed queries,
``D`` head dimension. A *token* is an element of the text, its *position* the index there counted
from the left end of its own row, a *slot* a place in the cache. ``positions[b, h, s] == -1`` means
that the slot is empty.

Slots are in no particular order::

    slot         0    1    2    3    4    5
    positions    0    1   17   -1   16    9      sinks=2, recent=2, incoming token at position 18
    protected  sink sink  new   .   new   .
    score      +inf +inf  max -inf  max  0.3     the empty slot is used first, then position 9
"""

from collections.abc import Sequence

import torch
from torch import Tensor

RECENT_SCORE = torch.finfo(torch.float32).max
"""That of a recent token: where a protected prompt leaves less room than ``recent``, the oldest
recent ones go."""
HIGHEST_SCORE = RECENT_SCORE - 2.0**104  # the next lower float32
"""The most that a policy can say of a token: what is protected ranks above it."""
_NO_POSITION = torch.iinfo(torch.int64).max


def protect(
    scores: Tensor,
    positions: Tensor,
    *,
    next_position: Tensor,
    protected_prefix: Tensor,
    recent: int,
) -> Tensor:
    """Scores with protected slots at the top and empty slots at ``-inf``.

    Scores of ``+inf``, by which a policy says what it always keeps, become :data:`HIGHEST_SCORE`:
    these tokens go after all others and before any that is protected.

    A score that is not a number is the lowest there is, so that what a model computed wrongly goes
    first and nothing protected goes with it.

    Args:
        scores: ``[B, H, S]`` float32, larger is kept longer.
        positions: ``[B, H, S]`` int64.
        next_position: ``[B]`` int64, position of the incoming token of each row.
        protected_prefix: ``[B]`` or ``[B, H]`` int64, positions below it are never evicted: sinks
            or prompt.
        recent: tokens right before the incoming one that are never evicted.

    Returns:
        ``[B, H, S]`` float32: ``+inf`` below the prefix, :data:`RECENT_SCORE` where recent.
    """
    oldest_recent = (next_position - recent)[:, None, None]
    protected = positions < _of_heads(protected_prefix)
    scores = scores.masked_fill(scores.isnan(), -torch.inf).clamp(max=HIGHEST_SCORE)
    scores = scores.masked_fill(positions >= oldest_recent, RECENT_SCORE)
    return scores.masked_fill(protected, torch.inf).masked_fill(positions < 0, -torch.inf)


def lowest_slot(scores: Tensor, positions: Tensor) -> Tensor:
    """The slot with the lowest score; among equals the one with the oldest token.

    Args:
        scores: ``[B, H, S]`` float32.
        positions: ``[B, H, S]`` int64.

    Returns:
        ``[B, H, 1]`` int64 slot numbers.
    """
    lowest = scores.amin(dim=-1, keepdim=True)
    return positions.masked_fill(scores != lowest, _NO_POSITION).argmin(dim=-1, keepdim=True)


def sort_slots(scores: Tensor, positions: Tensor) -> Tensor:
    """All slots from the lowest to the highest score; among equals the oldest token first.

    Args:
        scores: ``[B, H, S]`` float32.
        positions: ``[B, H, S]`` int64.

    Returns:
        ``[B, H, S]`` int64 slot numbers.
    """
    by_position = positions.argsort(dim=-1, stable=True)
    by_score = scores.gather(-1, by_position).argsort(dim=-1, stable=True)
    return by_position.gather(-1, by_score)


def ranks_by_position(positions: Tensor) -> Tensor:
    """How many held tokens are before each one.

    Args:
        positions: ``[B, H, S]`` int64.

    Returns:
        ``[B, H, S]`` int64, negative at empty slots.
    """
    before = positions.argsort(dim=-1, stable=True).argsort(dim=-1)
    return before - (positions < 0).sum(dim=-1, keepdim=True)


def places(scores: Tensor, positions: Tensor) -> Tensor:
    """Where each slot is in the order of :func:`sort_slots`: 0 is the lowest.

    Args:
        scores: ``[B, H, S]`` float32.
        positions: ``[B, H, S]`` int64.

    Returns:
        ``[B, H, S]`` int64.
    """
    order = sort_slots(scores, positions)
    place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, place)


def next_victims(
    scores: Tensor,
    positions: Tensor,
    *,
    next_position: Tensor,
    protected_prefix: Tensor,
    count: int,
) -> Tensor:
    """The slots to overwrite in the next ``count`` steps, in that order.

    Lowest score first. Should these not suffice, the tokens that are protected as recent follow,
    the oldest first: by then they are recent no more. Then it starts over, for the same reason, but
    after the slots of tokens that are below the prefix themselves.

    Args:
        scores: ``[B, H, S]`` float32 with protection applied.
        positions: ``[B, H, S]`` int64.
        next_position: ``[B]`` int64, that of the first token to come.
        protected_prefix: ``[B]`` or ``[B, H]`` int64, positions below it are never evicted.
        count: how many steps.

    Returns:
        ``[B, H, count]`` int64 slot numbers.
    """
    prefix = _of_heads(protected_prefix)
    for_good = (positions >= 0) & (positions < prefix)
    order = sort_slots(scores, positions.masked_fill(for_good, _NO_POSITION))
    num_slots = (~for_good).sum(dim=-1, keepdim=True)
    # Of a prompt that is shorter than the prefix.
    first = (prefix - _of_heads(next_position)).clamp(min=0).minimum(num_slots - 1)
    step = torch.arange(count, device=order.device)
    return order.gather(
        -1, torch.where(step < first, step, first + (step - first) % (num_slots - first))
    )


def next_open_victims(
    is_open: Tensor,
    scores: Tensor,
    positions: Tensor,
    *,
    next_position: Tensor,
    protected_prefix: Tensor,
    count: int,
) -> Tensor:
    """As :func:`next_victims`, restricted to open slots.

    Args:
        is_open: ``[B, H, S]`` bool.
        scores: ``[B, H, S]`` float32.
        positions: ``[B, H, S]`` int64.
        next_position: ``[B]`` int64.
        protected_prefix: ``[B]`` or ``[B, H]`` int64.
        count: how many steps.
    """
    # The others are made to look protected for good, as if below the prefix.
    ages = torch.where(positions >= 0, positions + 1, -1)
    return next_victims(
        scores.where(is_open, torch.inf),
        ages.where(is_open, 0),
        next_position=next_position + 1,
        protected_prefix=protected_prefix + 1,
        count=count,
    )


def protect_best(scores: Tensor, positions: Tensor, *, count: int) -> Tensor:
    """Scores with the best tokens of each head at ``+inf`` too.

    Args:
        scores: ``[B, H, S]`` float32 with protection applied.
        positions: ``[B, H, S]`` int64.
        count: how many tokens of a head; none below 1.

    Returns:
        ``[B, H, S]`` float32.
    """
    if count <= 0:
        return scores
    best = sort_slots(scores, positions)[..., -count:]
    return scores.scatter(-1, best, torch.inf).masked_fill(positions < 0, -torch.inf)


def as_one_head(scores: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The slots of all heads as those of one; of equal positions that of the first head is lowest.

    Args:
        scores: ``[B, H, S]`` float32.
        positions: ``[B, H, S]`` int64.

    Returns:
        Scores ``[B, 1, H * S]`` and, in the same shape, what stands for positions elsewhere.
    """
    heads = torch.arange(positions.shape[1], device=positions.device)[:, None]
    ages = positions * positions.shape[1] + heads
    return scores.flatten(1, 2).unsqueeze(1), ages.flatten(1, 2).unsqueeze(1)


def tokens_of_heads(scores: Tensor, positions: Tensor, *, floor: int, count: int) -> Tensor:
    """How many tokens each head keeps where the best of all heads stay.

    Args:
        scores: ``[B, H, S]`` float32 with protection applied.
        positions: ``[B, H, S]`` int64.
        floor: how many each head keeps at least.
        count: how many stay in all.

    Returns:
        ``[B, H, 1]`` int64.
    """
    place = places(*as_one_head(protect_best(scores, positions, count=floor), positions))
    stays = (place >= place.shape[-1] - count).view_as(positions) & (positions >= 0)
    return stays.sum(dim=-1, keepdim=True)


def _of_heads(numbers: Tensor) -> Tensor:
    """Numbers ``[B]`` or ``[B, H]`` as ``[B, H | 1, 1]``."""
    return numbers.view(numbers.shape[0], -1, 1)


def per_head(numbers: Sequence[int], like: Tensor) -> Tensor:
    """A number of each head, ``[H, 1]`` in the dtype and on the device of ``like``."""
    # A tensor made of the list would be copied from the host in every step.
    return torch.cat([like.new_full((1, 1), number) for number in numbers])


def keep_best(scores: Tensor, positions: Tensor, *, count: int) -> Tensor:
    """The ``count`` highest-ranked slots, in the order of their positions.

    Args:
        scores: ``[B, H, S]`` float32.
        positions: ``[B, H, S]`` int64.
        count: slots to keep, at most ``S``.

    Returns:
        ``[B, H, count]`` int64 slot numbers, positions ascending.
    """
    kept = sort_slots(scores, positions)[..., -count:]
    return kept.gather(-1, positions.gather(-1, kept).argsort(dim=-1, stable=True))


def pool_by_position(values: Tensor, positions: Tensor, *, kernel_size: int, reduce: str) -> Tensor:
    """Each value pooled with its neighbours, where neighbours are adjacent in position order.

    Empty slots are nobody's neighbours. In a mean, what is missing at the ends of the list counts
    as zero, as in SnapKV's code.

    Args:
        values: ``[B, H, S]`` float32.
        positions: ``[B, H, S]`` int64.
        kernel_size: odd width of the pooling window, in held tokens.
        reduce: ``"mean"`` or ``"max"``.

    Returns:
        ``[B, H, S]`` float32, zero at empty slots.
    """
    held = positions >= 0
    if kernel_size == 1:
        return values.masked_fill(~held, 0.0)
    order = positions.argsort(dim=-1, stable=True)
    sorted_held = held.gather(-1, order)
    sorted_values = values.gather(-1, order)
    if reduce == "mean":
        held_values = sorted_values.masked_fill(~sorted_held, 0.0)
        pooled = torch.nn.functional.avg_pool1d(held_values, kernel_size, 1, kernel_size // 2)
    else:
        lowest = sorted_values.masked_fill(~sorted_held, -torch.inf)
        pooled = torch.nn.functional.max_pool1d(lowest, kernel_size, 1, kernel_size // 2)
    pooled = pooled.masked_fill(~sorted_held, 0.0)
    return torch.zeros_like(values).scatter(-1, order, pooled)
