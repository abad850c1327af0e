"""Random draws that depend on where they are used, and on nothing else.

They are hashes of seed, layer, head and positions, so the global generator is never touched and a
row of a batch does not depend on its neighbours or on padding.
"""

import math
from typing import TypeVar

import torch
from torch import Tensor

from compressed_cache.policies.view import Slots

_MASK = 0xFFFFFFFF
_Hashable = TypeVar("_Hashable", int, Tensor)


def mix(x: _Hashable) -> _Hashable:
    """32-bit integer hash; the factors stay below 2**31 so that no int64 product overflows."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x6C8E9CF5) & _MASK
    return x ^ (x >> 16)


def uniform(hashes: Tensor) -> Tensor:
    """Float32 numbers within 0 and 1, both excluded, of hashes below ``2**32``."""
    # With the half that keeps zero out, 24 bits, which is what float32 holds exactly.
    return ((hashes >> 9).float() + 0.5) * 2.0**-23


def token_hash(slots: Slots, seed: int, *, redraw: bool = True) -> Tensor:
    """A hash of each token ``[B, H, S]`` int64, below ``2**32``.

    Args:
        slots: the tokens.
        seed: another seed gives other hashes.
        redraw: whether the position of the incoming token is hashed too.
    """
    num_heads = slots.keys.shape[1]
    heads = slots.first_head + torch.arange(num_heads, device=slots.keys.device)[None, :, None]
    drawn = mix(heads + mix(mix(seed) + slots.layer))
    if redraw:
        drawn = mix(drawn + slots.next_position[:, None, None])
    return mix(drawn + slots.positions)


def check_seed(seed: int) -> None:
    """Raises ``ValueError`` for a seed that cannot be hashed."""
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")


def gauss(slots: Slots, seed: int, *, count: int, redraw: bool = True) -> Tensor:
    """Numbers of the standard normal distribution ``[B, count]`` float32.

    Args:
        slots: the tokens; all heads of their layer share the numbers.
        seed: another seed gives other numbers.
        count: how many.
        redraw: whether they are drawn anew at each ranking, else they are always the same.
    """
    drawn = torch.full_like(slots.next_position, mix(mix(seed) + slots.layer))[:, None]
    if redraw:
        drawn = mix(drawn + slots.next_position[:, None])
    pairs = uniform(mix(drawn + torch.arange(2 * count, device=drawn.device)))
    length, angle = pairs.unflatten(1, (count, 2)).unbind(dim=2)
    return (-2 * length.log()).sqrt() * (2 * math.pi * angle).cos()
