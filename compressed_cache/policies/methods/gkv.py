"""Attended by the last queries or once before, and not said before."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressed_cache.ops.attention import masked_softmax
from compressed_cache.ops.eviction import pool_by_position
from compressed_cache.policies.base import Defaults, Needs
from compressed_cache.policies.methods.rkv import check_mix, check_similarity, spared_redundancy
from compressed_cache.policies.methods.window_votes import (
    WindowVotes,
    causal,
    window_logits,
)
from compressed_cache.policies.needs import usual_interval
from compressed_cache.policies.view import Slots


@dataclass(frozen=True, kw_only=True)
class GKV(WindowVotes):
    """Trades attention, remembered with decay over all rankings, against redundancy of the keys.

    G-KV (https://arxiv.org/abs/2512.00504), in the form of the authors' code (microsoft/G-KV):
    ``mix_lambda * global - (1 - mix_lambda) * redundancy``. The local score of a token before the
    window is the attention of the last ``window`` queries to it (softmax over all held tokens,
    group maximum, mean), divided by the largest of its head; its global score is the larger of that
    and ``alpha`` times the global score of the ranking before, where rankings that evict nothing do
    not count. Redundancy is that of ``rkv``, divided by its largest. The window goes only when no
    other token is left; ``recent``, whose default is ``window``, keeps it for good.

    Differs in two points: slots are overwritten one by one in the order of the ranking, where the
    authors let the cache grow by 128 tokens and cut it back; and redundancy spares one duplicate
    per key, as in R-KV and the authors' plain PyTorch version (their Triton kernel spares one in
    every tile).
    """

    name: ClassVar[str] = "gkv"
    window: int = 16
    """Queries that vote (the authors'; their command line has 64 by default)."""
    kernel_size: int = 1
    """Odd width of the max pooling of global scores, in held tokens (the authors' option uses 5);
    1 switches it off."""
    alpha: float = 0.8
    """What a global score keeps of itself from one ranking to the next, 0 to 1."""
    mix_lambda: float = 0.5
    """Weight of attention against redundancy, 0 to 1."""
    similarity_threshold: float = 0.5
    """Cosine above which two keys count as near-duplicates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mix(self.mix_lambda)
        check_similarity(self.similarity_threshold)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {self.alpha}")

    @property
    def needs(self) -> Needs:
        return Needs(queries=self.window, notes=1)

    def defaults(self, budget: int) -> Defaults:
        return Defaults(
            interval=usual_interval(budget, longest=128), recent=min(self.window, budget // 2)
        )

    def revise(self, slots: Slots) -> Tensor:
        logits = window_logits(slots)
        visible = causal(slots)[:, :, None]
        votes = masked_softmax(logits, visible, slots.transform.sink_logits(logits)).amax(dim=2)
        # How many queries there are is the same for all tokens, and is divided out.
        local = _of_largest(votes.sum(dim=2).masked_fill(~self._before(slots), 0.0))
        return torch.maximum(self.alpha * slots.notes, local.unsqueeze(-1))

    def scores(self, slots: Slots) -> Tensor:
        before = self._before(slots)
        prefix = slots.positions.masked_fill(~before, -1)
        attended = pool_by_position(
            slots.notes.squeeze(-1), prefix, kernel_size=self.kernel_size, reduce="max"
        )
        redundancy = spared_redundancy(slots, self.similarity_threshold)
        redundancy = _of_largest(redundancy.masked_fill(~before, 0.0))
        scores = self.mix_lambda * attended - (1 - self.mix_lambda) * redundancy
        # No other score is above 1.
        return torch.where(before, scores, 2 + slots.positions.float())

    def _before(self, slots: Slots) -> Tensor:
        """Held tokens before the window, ``[B, H, S]`` bool."""
        first = slots.next_position - self.window
        return (slots.positions >= 0) & (slots.positions < first[:, None, None])


def _of_largest(values: Tensor) -> Tensor:
    """Values from 0 divided by the largest finite one of their head; infinite ones stay."""
    largest = values.masked_fill(values.isinf(), 0.0).amax(dim=-1, keepdim=True)
    return values / largest.clamp(min=torch.finfo(torch.float32).tiny)
