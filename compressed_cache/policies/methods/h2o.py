"""Heavy hitters."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compressed_cache.policies.base import Defaults, Needs, Policy
from compressed_cache.policies.view import Slots


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """Keeps the tokens that received most attention in total, and half a budget of recent ones.

    H2O, section 4 and algorithm 1 (https://arxiv.org/abs/2306.14048): the sum, not the mean, of the
    attention probabilities over all queries so far, prompt included. Differs in two points: query
    heads that share a key are averaged (the paper has no grouped queries), and an evicted token is
    gone (the authors' simulation only masks it and may revive it).
    """

    name: ClassVar[str] = "h2o"
    scores_attention: ClassVar = True

    @property
    def needs(self) -> Needs:
        return Needs(attention=True)

    def defaults(self, budget: int) -> Defaults:
        return Defaults(recent=budget // 2)

    def scores(self, slots: Slots) -> Tensor:
        return slots.attention_state
