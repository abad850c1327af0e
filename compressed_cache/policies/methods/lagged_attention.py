"""The last few rows of attention, without what was recent to them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressed_cache.ops.attention import masked_softmax
from compressed_cache.policies.base import Defaults, Needs, Policy
from compressed_cache.policies.methods.window_votes import check_choice, check_window
from compressed_cache.policies.view import AttentionRows, Slots


@dataclass(frozen=True, kw_only=True)
class LaggedAttention(Policy):
    """Keeps what the last ``window`` queries attended to among the tokens old to each of them.

    Ours, after MorphKV (https://arxiv.org/abs/2503.00979). At its own step each query leaves one
    row per key/value head: a softmax of the logits summed over the query heads that share the head,
    without its own token and the ``window`` before it. The rows of the last ``window`` queries are
    fused by maximum or sum. The last ``window + 1`` tokens are always kept; ``recent`` can only
    extend that.

    Differs from ``morphkv`` in one point: a query votes for what was older than its own window, so
    a token that has just left the window has the votes of one query, and of more with every step.
    """

    name: ClassVar[str] = "lagged_attention"
    window: int = 32
    """Queries that vote, and tokens that are recent to each of them. Fewer keep little of worth."""
    fuse: str = "max"
    """How the rows become one score: ``"max"`` or ``"sum"``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window, 1)
        check_choice("fuse", self.fuse, "max", "sum")

    @property
    def needs(self) -> Needs:
        return Needs(
            attention=True,
            prompt_queries=self.window,
            state_width=self.window,
            recent=self.window + 1,
        )

    def defaults(self, budget: int) -> Defaults:
        return Defaults(recent=self.window + 1)

    def accumulate(self, state: Tensor, rows: AttentionRows) -> Tensor:
        own = rows.query_positions
        old = rows.positions[:, :, None] < (own - self.window)[:, None, :, None]
        old = old & (rows.positions >= 0)[:, :, None] & (rows.weights > 0).all(dim=2)
        # Logarithms of weights are logits but for a number that the softmax takes out again.
        new = masked_softmax(rows.weights.log().sum(dim=2), old)
        register = torch.cat([state.view(*new.shape[:2], new.shape[3], -1), new.mT], dim=-1)
        # Padding must not push out what real queries left.
        real = torch.nn.functional.pad((own >= 0).int(), (self.window, 0), value=1)
        newest = real.argsort(dim=1, stable=True)[:, -self.window :]
        index = newest[:, None, None].expand(*register.shape[:3], -1)
        return register.gather(-1, index).view_as(state)

    def scores(self, slots: Slots) -> Tensor:
        register = slots.attention_state.view(*slots.positions.shape, -1)
        fused = register.amax(dim=-1) if self.fuse == "max" else register.sum(dim=-1)
        window = slots.positions >= (slots.next_position - self.needs.recent)[:, None, None]
        return fused.masked_fill(window, torch.inf)
