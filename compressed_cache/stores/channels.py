"""Keys without the channels that matter least, except those of the last tokens.

With ``D'`` the channels that stay, ``R`` the last tokens that keep all, and channels in an order of
each key/value head that begins with those that stay::

                     channels
                  0 .. D'-1  D' .. D-1
    every slot      keys         0
    position p      keys     tails[p % R]     of the last R tokens

Products of queries and keys do not depend on that order as long as both have the same.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from compressed_cache.layer import CompressedLayer


def choose(layer: "CompressedLayer", query: Tensor, key: Tensor, real: Tensor) -> None:
    """Settles the order of channels by a prompt ``[B, H * G | H, L, D]``."""
    if not layer.policy.prunes_channels:
        return
    count = layer.keys.shape[3]
    grouped = query.unflatten(1, (key.shape[1], -1))
    scores = layer.policy.channel_scores(grouped, key, real)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    parts = order[..., :count].sort(dim=-1).values, order[..., count:].sort(dim=-1).values
    layer.channels.copy_(torch.cat(parts, dim=-1))


def ordered(layer: "CompressedLayer", x: Tensor) -> Tensor:
    """Queries or keys ``[B, H * G | H, L, D]`` with their channels in the layer's order."""
    if not layer.policy.prunes_channels:
        return x
    grouped = x.unflatten(1, (layer.keys.shape[1], -1))
    index = layer.channels[:, :, None, None].expand_as(grouped)
    return grouped.gather(-1, index).flatten(1, 2)


def kept(layer: "CompressedLayer", x: Tensor) -> Tensor:
    """Of channels in the layer's order those that stay, ``[..., D']``."""
    return x[..., : layer.keys.shape[3]]


def whole_keys(layer: "CompressedLayer", tokens_before: Tensor) -> Tensor:
    """All that is known of the keys in the slots, ``[B, H, S, D]`` in the layer's order.

    Args:
        layer: a filled layer.
        tokens_before: ``[B]`` int64, the first position that was not yet written.
    """
    if not layer.policy.prunes_channels:
        return layer.keys
    recent = layer.tails.shape[2]
    place = (layer.positions % recent).unsqueeze(-1)
    tails = layer.tails.gather(2, place.expand(*place.shape[:3], layer.tails.shape[3]))
    is_recent = layer.positions >= (tokens_before - recent)[:, None, None]
    return torch.cat([layer.keys, tails.where(is_recent.unsqueeze(-1), 0.0)], dim=-1)
