"""The last few queries vote on everything older."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressed_cache.ops.attention import masked_softmax
from compressed_cache.policies.base import Defaults, Needs
from compressed_cache.policies.methods.window_votes import WindowVotes, check_choice, window_logits
from compressed_cache.policies.view import Slots


@dataclass(frozen=True, kw_only=True)
class MorphKV(WindowVotes):
    """Keeps the last ``window`` tokens, and of older ones what their queries attend to.

    MorphKV, section 3 (https://arxiv.org/abs/2503.00979), in the form of the authors' code: of each
    of the last ``window`` queries the logits are summed over the query heads that share a key, then
    softmaxed over all held tokens older than the window. These rows are fused by maximum or sum.
    The window is always kept; ``recent`` can only extend it.

    Differs in two points: the paper drops a token right after a step, this cache right before the
    next, by the same rows, so that attention sees ``budget`` tokens where the paper sees one more;
    and a prompt is cut to the budget at once, by its last queries.
    """

    name: ClassVar[str] = "morphkv"
    window: int = 3
    """Queries that vote (the default of the authors' code; their experiments use up to 200)."""
    fuse: str = "max"
    """How the rows become one score: ``"max"`` or ``"sum"``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("fuse", self.fuse, "max", "sum")

    @property
    def needs(self) -> Needs:
        return Needs(queries=self.window, recent=self.window)

    def defaults(self, budget: int) -> Defaults:
        return Defaults(recent=self.window)

    def scores(self, slots: Slots) -> Tensor:
        old = slots.positions < (slots.next_position - self.window)[:, None, None]
        seen = (slots.query_positions >= 0)[:, None, :, None]
        voted = (old & (slots.positions >= 0))[:, :, None] & seen
        rows = masked_softmax(window_logits(slots).sum(dim=2), voted)
        fused = rows.amax(dim=2) if self.fuse == "max" else rows.sum(dim=2)
        return torch.where(old, fused, torch.inf)
