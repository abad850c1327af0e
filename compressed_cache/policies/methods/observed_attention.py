"""The mean attention received."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compressed_cache.policies.base import Needs, Policy
from compressed_cache.policies.view import Slots


@dataclass(frozen=True, kw_only=True)
class ObservedAttention(Policy):
    """Keeps the tokens that received most attention per query that could see them.

    Observed attention, a scorer of kvpress (https://github.com/NVIDIA/kvpress) close to H2O
    (https://arxiv.org/abs/2306.14048): the mean where H2O takes the sum, so old tokens have no
    advantage, and new ones the large weight a token gives itself.

    Differs in one point: kvpress scores the prompt alone, and here the same mean over all queries
    since the token came in is taken again at every ranking while decoding.
    """

    name: ClassVar[str] = "observed_attention"
    scores_attention: ClassVar = True

    @property
    def needs(self) -> Needs:
        return Needs(attention=True)

    def scores(self, slots: Slots) -> Tensor:
        return slots.attention_state / (slots.next_position[:, None, None] - slots.positions)
