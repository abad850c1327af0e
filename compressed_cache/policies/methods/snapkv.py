"""The last queries vote."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compressed_cache.ops.attention import masked_softmax
from compressed_cache.ops.eviction import pool_by_position
from compressed_cache.policies.base import Defaults, Needs, Policy, usual_interval
from compressed_cache.policies.view import Slots


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window, self.kernel_size)

    @property
    def needs(self) -> Needs:
        return Needs(queries=self.window)

    def defaults(self, budget: int) -> Defaults:
        return Defaults(interval=usual_interval(budget), recent=min(self.window, budget // 2))

    def scores(self, slots: Slots) -> Tensor:
        logits = window_logits(slots)
        visible = causal(slots)[:, :, None]
        votes = masked_softmax(logits, visible, slots.transform.sink_logits(logits)).sum(dim=3)
        # The mean over the group commutes with the mean over neighbours.
        return pool_by_position(
            votes.mean(dim=2), slots.positions, kernel_size=self.kernel_size, reduce="mean"
        )


def check_window(window: int, kernel_size: int) -> None:
    """Raises ``ValueError`` for a window or a pooling width that cannot work."""
    if window < 1:
        raise ValueError(f"window must be >= 1, got {window}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and >= 1, got {kernel_size}")


def window_logits(slots: Slots) -> Tensor:
    """Logits of the last ``W`` queries: ``[B, H, G, W, S]`` float32, nothing masked."""
    return slots.transform.logits(slots.queries, slots.keys.unsqueeze(2)).float()


def causal(slots: Slots) -> Tensor:
    """Which held tokens each of the last ``W`` queries may see: ``[B, H, W, S]`` bool."""
    held = slots.positions[:, :, None, :]
    return (held >= 0) & (held <= slots.query_positions[:, None, :, None])
