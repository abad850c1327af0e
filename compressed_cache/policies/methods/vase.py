"""Values that stand out, and chance in proportion to attention."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressed_cache.ops.attention import masked_softmax
from compressed_cache.ops.eviction import keep_best
from compressed_cache.policies.base import Defaults, Needs, usual_interval
from compressed_cache.policies.draws import check_seed, token_hash, uniform
from compressed_cache.policies.methods.window_votes import (
    WindowVotes,
    causal,
    window_logits,
)
from compressed_cache.policies.view import Slots

_LARGE = 1e9
"""Above all logarithms, below infinity: what the cache protects must outlive it."""


@dataclass(frozen=True, kw_only=True)
class VaSE(WindowVotes):
    """Keeps the values of largest range, and draws the others in proportion to their attention.

    VaSE (https://arxiv.org/abs/2606.03928), with attention. Among the tokens that can be evicted,
    the ``large_share * (budget - recent)`` whose values have the largest range (maximum minus
    minimum over the channels) stay; of the others as many as there is room for are drawn without
    replacement. Their weight is the attention of the last ``window`` queries: softmax over all
    tokens that are not recent, mean over the queries and over the query heads that share a key. The
    draw is the top of log-weight plus Gumbel noise, a hash of seed, layer, head, position and
    incoming position.

    Differs in five points: the noise is a hash, and never runs out of tokens to draw; the first
    four tokens stay through ``sinks`` and are not counted among those of large range; slots are
    overwritten one by one in the order of the ranking, where the authors let the cache grow by 64
    tokens and cut it back, so the budget here includes that buffer; a long prompt is cut to the
    budget by the same rule, where they keep it whole until decoding starts; and the pooling that
    their code offers is left out.
    """

    name: ClassVar[str] = "vase"
    window: int = 64
    """Queries that vote, and tokens protected by default as far as half the budget allows."""
    large_share: float = 0.25
    """Share of the budget without the recent tokens, 0 to 1, for the values of largest range (the
    authors' scripts; the class in their code has 200 tokens)."""
    seed: int = 0
    """Any int >= 0; another seed gives another sequence of draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        if not 0 <= self.large_share <= 1:
            raise ValueError(f"large_share must be from 0 to 1, got {self.large_share}")

    @property
    def needs(self) -> Needs:
        return Needs(queries=self.window, values=True)

    def defaults(self, budget: int) -> Defaults:
        return Defaults(
            interval=usual_interval(budget), sinks=4, recent=min(self.window, budget // 2)
        )

    def scores(self, slots: Slots) -> Tensor:
        before = slots.positions < (slots.next_position - slots.recent)[:, None, None]
        visible = causal(slots) & before[:, :, None]
        votes = masked_softmax(window_logits(slots), visible[:, :, None]).mean(dim=2).sum(dim=2)
        seen = (slots.query_positions >= 0).sum(dim=1)[:, None, None]
        weights = (votes / seen).clamp(min=torch.finfo(torch.float32).tiny)
        gumbel = -(-uniform(token_hash(slots, self.seed)).log()).log()
        values = slots.values.float()
        ranges = (values.amax(dim=-1) - values.amin(dim=-1)).nan_to_num(-1.0, posinf=-1.0)
        large = self._largest(ranges, slots, before)
        return torch.where(large, _LARGE * (1 + ranges), weights.log() + gumbel)

    def _largest(self, ranges: Tensor, slots: Slots, before: Tensor) -> Tensor:
        free = before & (slots.positions >= slots.protected_prefix[:, None, None])
        free = free & (slots.positions >= 0)
        count = min(int(self.large_share * (slots.budget - slots.recent)), slots.positions.shape[2])
        if count == 0:
            return torch.zeros_like(free)
        largest = keep_best(ranges.masked_fill(~free, -torch.inf), slots.positions, count=count)
        return torch.zeros_like(free).scatter(-1, largest, True) & free
