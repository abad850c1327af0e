"""Rings with what the last ``W`` tokens of a row bring: that of position ``p`` at ``p % W``."""

import torch
from torch import Tensor

from compressed_cache.ops.tokens import scatter


def write_one(ring: Tensor, dim: int, new: Tensor, position: Tensor, real: Tensor | None) -> None:
    """Writes what one token per row brings, in place.

    Args:
        ring: ``W`` places along ``dim``.
        dim: that of the places.
        new: the same with one place.
        position: ``[B]`` int64, of the token.
        real: ``[B]`` bool, rows that are written; None: all.
    """
    place = (position % ring.shape[dim]).view(-1, *[1] * (ring.dim() - 1))
    scatter(ring, dim, place.expand_as(new), new.to(ring.dtype), real)


def write_last(ring: Tensor, new: Tensor, positions: Tensor, next_position: Tensor) -> None:
    """Writes what the last of many tokens bring, in place, each row by its own positions.

    Args:
        ring: ``[B, H, G, W, D]``.
        new: ``[B, H, G, L, D]`` of all tokens that were read.
        positions: ``[B, L]`` int64 of these, ``-1`` at padding.
        next_position: ``[B]`` int64, the position after these.
    """
    window = ring.shape[3]
    # A further prompt may have padding in its middle, after the last token of an answer.
    newest = (positions >= 0).int().argsort(dim=1, stable=True)[:, -window:]
    positions = positions.gather(1, newest)
    before = torch.arange(-positions.shape[1], 0, device=positions.device)
    # At padding this is the place of an older token, which is written back.
    place = (next_position[:, None] + before) % window
    column = newest[:, None, None, :, None]
    new = new.gather(3, column.expand(*new.shape[:3], -1, new.shape[4]))
    index = place[:, None, None, :, None].expand_as(new)
    real = (positions >= 0)[:, None, None, :, None]
    ring.scatter_(3, index, torch.where(real, new, ring.gather(3, index)))


def moved_to(positions: Tensor, moved: Tensor) -> Tensor:
    """Where ``moved`` ``[B, P]`` puts positions ``[B, ...]``; negative ones stay."""
    new = moved.gather(1, positions.clamp(min=0).flatten(1)).view_as(positions)
    return torch.where(positions >= 0, new, positions)


def places_of(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Which token of a ring belongs to each place, and whether there is one.

    Args:
        positions: ``[B, W]`` int64 of the tokens in it, negative where there is none.

    Returns:
        ``[B, W]`` int64 and bool.
    """
    window = positions.shape[1]
    place = torch.where(positions >= 0, positions % window, window)
    found = positions.new_full((len(positions), window + 1), window)
    here = torch.arange(window, device=place.device).expand_as(place)
    found = found.scatter(1, place, here)[:, :window]
    return found.clamp(max=window - 1), found < window
