"""The last queries vote."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compressed_cache.ops.attention import masked_softmax
from compressed_cache.ops.eviction import pool_by_position
from compressed_cache.policies.methods.window_votes import WindowVotes, causal, window_logits
from compressed_cache.policies.view import Slots


@dataclass(frozen=True, kw_only=True)
class SnapKV(WindowVotes):
    """Keeps what the last ``window`` queries attend to, smoothed over neighbouring tokens.

    SnapKV, section 4 (https://arxiv.org/abs/2404.14469), at prefill; while decoding the same score
    is taken again at every ranking from the last ``window`` queries, each rotated at its own
    position (the variant "Hold Onto That Thought", https://arxiv.org/abs/2512.12008, reports as
    SnapKV-D without defining it). The window itself is kept through ``recent``, whose default is
    ``window``.

    Differs from the authors' code in three points: query heads that share a key are averaged (they
    repeat the keys instead); pooling runs over all held tokens, window included, in the order of
    their positions; and the mean at both ends of that list is over the neighbours that exist
    (theirs counts padding zeros).
    """

    name: ClassVar[str] = "snapkv"
    scores_attention: ClassVar = True
    window: int = 32
    """Queries that vote (the authors' patched models use 32)."""
    kernel_size: int = 5
    """Odd width of the average pooling, in held tokens; 1 switches it off."""

    def scores(self, slots: Slots) -> Tensor:
        logits = window_logits(slots)
        visible = causal(slots)[:, :, None]
        votes = masked_softmax(logits, visible, slots.transform.sink_logits(logits)).sum(dim=3)
        # The mean over the group commutes with the mean over neighbours.
        return pool_by_position(
            votes.mean(dim=2), slots.positions, kernel_size=self.kernel_size, reduce="mean"
        )
