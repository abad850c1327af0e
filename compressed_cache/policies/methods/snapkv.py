"""The last queries vote."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressed_cache.ops.attention import masked_softmax
from compressed_cache.ops.eviction import pool_by_position
from compressed_cache.policies.methods.window_votes import (
    WindowVotes,
    causal,
    check_choice,
    window_logits,
)
from compressed_cache.policies.view import Slots


@dataclass(frozen=True, kw_only=True)
class SnapKV(WindowVotes):
    """Keeps what the last ``window`` queries attend to, smoothed over neighbouring tokens.

    SnapKV, section 4 (https://arxiv.org/abs/2404.14469), at prefill; while decoding the same score
    is taken again at every ranking from the last ``window`` queries, each rotated at its own
    position (the variant "Hold Onto That Thought", https://arxiv.org/abs/2512.12008, reports as
    SnapKV-D without defining it). The window itself is kept through ``recent``, whose default is
    ``window``, and is not pooled. The rows of the paper have ``pool="max"`` and ``kernel_size=7``.

    Differs from the authors' code in one point: query heads that share a key are averaged before
    they are pooled (they repeat the keys instead).
    """

    name: ClassVar[str] = "snapkv"
    scores_attention: ClassVar = True
    window: int = 32
    """Queries that vote (the authors' patched models use 32)."""
    kernel_size: int = 5
    """Odd width of the pooling, in held tokens; 1 switches it off."""
    pool: str = "mean"
    """``"mean"``, in which what is missing at the ends counts as zero, or ``"max"``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("pool", self.pool, "mean", "max")

    def scores(self, slots: Slots) -> Tensor:
        logits = window_logits(slots)
        visible = causal(slots)[:, :, None]
        votes = masked_softmax(logits, visible, slots.transform.sink_logits(logits)).sum(dim=3)
        votes = votes.mean(dim=2)
        before = slots.positions < slots.oldest_recent[:, None, None]
        pooled = pool_by_position(
            votes,
            slots.positions.masked_fill(~before, -1),
            kernel_size=self.kernel_size,
            reduce=self.pool,
        )
        return torch.where(before, pooled, votes)
