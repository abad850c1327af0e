"""Random numbers without a state: hashes of integers."""

from typing import TypeVar

from torch import Tensor

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
