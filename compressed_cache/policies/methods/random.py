"""Eviction at random: the null hypothesis."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compressed_cache.policies.base import Policy
from compressed_cache.policies.draws import check_seed, token_hash
from compressed_cache.policies.view import Slots


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
        check_seed(self.seed)

    def scores(self, slots: Slots) -> Tensor:
        # 24 bits are what float32 holds exactly.
        return (token_hash(slots, self.seed, redraw=self.redraw) >> 8).float()
