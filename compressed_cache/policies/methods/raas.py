"""Least recently attended."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressed_cache.policies.base import Defaults, Needs, Policy
from compressed_cache.policies.view import AttentionRows, Slots


@dataclass(frozen=True, kw_only=True)
class RaaS(Policy):
    """Evicts the token that has not been among the most attended for longest, prompt excepted.

    RaaS (https://arxiv.org/abs/2502.11147). A query stamps the tokens in the top ``share`` of its
    attention; a new token carries the stamp of its arrival, and the oldest stamp goes first. What
    is remembered is the age of the stamp, counted in queries. The prompt is kept by default.

    Differs in three points: single tokens carry stamps and are evicted, where the paper does both
    by pages of 16 tokens with one representative key, so as to read less; each key/value head has
    stamps of its own, by the mean weight of the query heads that share it; and of a prompt that
    leaves no room only the first ``budget // 2`` tokens are protected.
    """

    name: ClassVar[str] = "raas"
    share: float = 0.5
    """Share of the tokens that a query stamps, rounded up, above 0 and at most 1 (the paper's)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")

    @property
    def needs(self) -> Needs:
        return Needs(attention=True)

    def defaults(self, budget: int) -> Defaults:
        return Defaults(protect_prompt=True)

    def accumulate(self, state: Tensor, rows: AttentionRows) -> Tensor:
        own = rows.query_positions[:, None, :, None]
        held = rows.positions[:, :, None]
        visible = (held >= 0) & (held <= own)
        weights = rows.weights.mean(dim=2).masked_fill(~visible, -1.0)
        stamped = (visible.sum(dim=-1, keepdim=True) * self.share).ceil().long()
        ranked = weights.sort(dim=-1, descending=True).values
        least = ranked.gather(-1, (stamped - 1).clamp(min=0))
        important = visible & (weights >= least)
        last = own.amax(dim=2)
        age = (last[:, :, None] - own).float().masked_fill(~important, torch.inf).amin(dim=2)
        # A token is no older than its arrival.
        age = torch.minimum(age, (last - rows.positions).float())
        age = torch.minimum(age, state + (own >= 0).sum(dim=2))
        return torch.where(last >= 0, age, state)

    def scores(self, slots: Slots) -> Tensor:
        return -slots.attention_state
