"""Eviction at random: the null hypothesis."""

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from compressed_cache.policies.base import Policy, Slots

_MASK = 0xFFFFFFFF
_Hashable = TypeVar("_Hashable", int, Tensor)


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Evicts a uniformly random token, drawn for each key/value head on its own.

    With ``protect_prompt=True`` this is the baseline of "Random Attention"
    (https://arxiv.org/abs/2609.03430), which most scorers do not beat.

    Scores are a hash of seed, layer, head, position and, with ``redraw``, the position of the
    incoming token. The global generator is never touched, and a row of a batch does not depend on
    its neighbours. Differs from the paper in one point: the victim is drawn anew at every ranking
    (``interval=1``) where the paper draws one set of victims every 64 tokens.
    """

    name: ClassVar[str] = "random"
    seed: int = 0
    """Any int >= 0; another seed gives another sequence of victims."""
    redraw: bool = True
    """``True``: new scores at every ranking, so survival fades with age. ``False``: one score per
    token for its whole life, which is a uniform sample of the past (reservoir sampling)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")

    def scores(self, slots: Slots) -> Tensor:
        num_heads = slots.keys.shape[1]
        heads = slots.first_head + torch.arange(num_heads, device=slots.keys.device)[None, :, None]
        drawn = _mix(heads + _mix(_mix(self.seed) + slots.layer))
        if self.redraw:
            drawn = _mix(drawn + slots.next_position[:, None, None])
        # 24 bits are what float32 holds exactly.
        return (_mix(drawn + slots.positions) >> 8).float()


def _mix(x: _Hashable) -> _Hashable:
    """32-bit integer hash; the factors stay below 2**31 so that no int64 product overflows."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x6C8E9CF5) & _MASK
    return x ^ (x >> 16)
