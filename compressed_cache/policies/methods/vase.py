"""Values that stand out, and chance in proportion to attention."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressed_cache.ops.attention import masked_softmax
from compressed_cache.ops.eviction import per_head, places, pool_by_position
from compressed_cache.policies.base import Defaults, Needs
from compressed_cache.policies.draws import check_seed, token_hash, uniform
from compressed_cache.policies.methods.window_votes import (
    WindowVotes,
    causal,
    window_logits,
)
from compressed_cache.policies.needs import usual_interval
from compressed_cache.policies.view import Slots

_LARGE = 1e9
"""Above all logarithms, below infinity: what the cache protects must outlive it."""
_SINKS = 4
"""Of what is protected for good, as many first tokens count as large."""


@dataclass(frozen=True, kw_only=True)
class VaSE(WindowVotes):
    """Keeps the values of largest range, and draws the others in proportion to their attention.

    VaSE (https://arxiv.org/abs/2606.03928), with attention. Among the tokens that are not recent,
    the ``large_share * budget`` whose values have the largest range (maximum minus minimum over the
    channels) stay, the first four tokens counted among them as far as ``sinks`` protects them; of
    the others as many as there is room for are drawn without replacement. Their weight is the
    attention of the last ``window`` queries: softmax over all tokens that are not recent, mean over
    the queries and over the query heads that share a key, mean over ``kernel_size`` neighbours. The
    draw is the top of log-weight plus Gumbel noise, a hash of seed, layer, head, position and
    incoming position.

    Differs in four points: the noise is a hash, and never runs out of tokens to draw; neighbours
    are those in the order of positions, where the authors' cache is in the order of the last draw
    after its first cut; slots are overwritten one by one in the order of the ranking, where they
    let the cache grow by 64 tokens and cut it back, so the budget here includes that buffer; and a
    long prompt is cut to the budget by the same rule, where they keep it whole until decoding
    starts.
    """

    name: ClassVar[str] = "vase"
    window: int = 64
    """Queries that vote, and tokens protected by default as far as half the budget allows."""
    large_share: float = 0.25
    """Share of the budget, 0 to 1, for the values of largest range (``n_large`` in the authors'
    scripts is a quarter of ``token_budget``; the class in their code has 200 tokens)."""
    kernel_size: int = 5
    """Odd width of the pooling, in held tokens; 5 is the authors' ``smooth``, 1 switches it off."""
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
        before = slots.positions < slots.oldest_recent[:, None, None]
        visible = causal(slots) & before[:, :, None]
        votes = masked_softmax(window_logits(slots), visible[:, :, None]).mean(dim=2).sum(dim=2)
        seen = (slots.query_positions >= 0).sum(dim=1)[:, None, None]
        pooled = pool_by_position(
            votes / seen,
            slots.positions,
            kernel_size=self.kernel_size,
            reduce="mean",
        )
        weights = pooled.clamp(min=torch.finfo(torch.float32).tiny)
        gumbel = -(-uniform(token_hash(slots, self.seed)).log()).log()
        values = slots.values.float()
        ranges = (values.amax(dim=-1) - values.amin(dim=-1)).nan_to_num(-1.0, posinf=-1.0)
        large = self._largest(ranges, slots, before)
        return torch.where(large, _LARGE * (1 + ranges), weights.log() + gumbel)

    def _largest(self, ranges: Tensor, slots: Slots, before: Tensor) -> Tensor:
        protected_prefix = slots.protected_prefix[:, None, None]
        held = slots.positions >= 0
        free = before & held & (slots.positions >= protected_prefix)
        sinks = before & held & (slots.positions < protected_prefix.clamp(max=_SINKS))
        counts = [int(self.large_share * budget) for budget in slots.budgets]
        ranges = ranges.masked_fill(~free, -torch.inf).masked_fill(sinks, torch.inf)
        place = places(ranges, slots.positions)
        return (place >= place.shape[2] - per_head(counts, place)) & free
