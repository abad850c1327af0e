"""Keys without the channels that matter least, except those of the last tokens.

With ``D'`` the channels that stay, ``R`` the last tokens that keep all, and channels in an order of
each key/value head that begins with those that stay::

                     channels
                  0 .. D'-1  D' .. D-1
    every slot      keys         0
    position p      keys     recent[p % R]     of the last R tokens

Products of queries and keys do not depend on that order as long as both have the same.
"""

import torch
from torch import Tensor


def order_of(scores: Tensor, count: int) -> Tensor:
    """An order ``[B, H, D]`` int64 that begins with the ``count`` channels of highest score."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    parts = order[..., :count].sort(dim=-1).values, order[..., count:].sort(dim=-1).values
    return torch.cat(parts, dim=-1)


def ordered(x: Tensor, order: Tensor) -> Tensor:
    """Queries or keys ``[B, H * G | H, L, D]`` with their channels in ``order`` ``[B, H, D]``."""
    grouped = x.unflatten(1, (order.shape[1], -1))
    return grouped.gather(-1, order[:, :, None, None].expand_as(grouped)).flatten(1, 2)


def whole_keys(keys: Tensor, recent: Tensor, positions: Tensor, next_position: Tensor) -> Tensor:
    """All that is known of the keys in the slots, ``[B, H, S, D]``.

    Args:
        keys: ``[B, H, S, D']``.
        recent: ``[B, H, R, D - D']``, the ring with the other channels of the last tokens.
        positions: ``[B, H, S]`` int64.
        next_position: ``[B]`` int64, the first position that was not yet written.
    """
    size = recent.shape[2]
    place = (positions % size).unsqueeze(-1)
    others = recent.gather(2, place.expand(*place.shape[:3], recent.shape[3]))
    is_recent = positions >= (next_position - size)[:, None, None]
    return torch.cat([keys, others.where(is_recent.unsqueeze(-1), 0.0)], dim=-1)
