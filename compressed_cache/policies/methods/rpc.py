"""The last queries vote on the reasoning alone."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressed_cache.ops.attention import masked_softmax
from compressed_cache.ops.eviction import places, pool_by_position
from compressed_cache.policies.base import Defaults
from compressed_cache.policies.methods.window_votes import WindowVotes, check_choice, window_logits
from compressed_cache.policies.needs import usual_interval
from compressed_cache.policies.view import Slots


@dataclass(frozen=True, kw_only=True)
class RPC(WindowVotes):
    """Keeps the prompt, and of the generated tokens what the last ``window`` queries attend to.

    Reasoning Path Compression (https://arxiv.org/abs/2505.13866). The attention of the last
    ``window`` queries among the generated tokens before the window is averaged over all heads of
    the layer, which keep the same tokens, and smoothed over neighbouring tokens. Tokens of the
    prompt, and then of the window, go only when no other is left, the oldest first;
    ``protect_prompt=True`` and ``recent``, whose default is ``window``, keep them for good.

    With ``compression=4`` the cache grows as in the paper: at every ranking the generated tokens
    before the window are cut to a quarter of the number generated so far and their slots are freed
    at once. ``interval`` is then the paper's period, 1024 by default, and ``budget`` must have room
    for the prompt, a quarter of the longest answer, the window and one period; beyond that it is
    still a hard cap, and the lowest votes go.

    Differs in two points: by default the budget is fixed (the paper's cache grows by a
    ``compression``-th of the text); and slots are overwritten one by one in the order of the
    ranking.
    """

    name: ClassVar[str] = "rpc"
    same_for_all_heads: ClassVar = True
    window: int = 32
    """Queries that vote."""
    kernel_size: int = 7
    """Odd width of the pooling, in held tokens; 1 switches it off."""
    pool: str = "mean"
    """``"mean"``, in which what is missing at the ends counts as zero, or ``"max"``."""
    compression: float = 0.0
    """Generated tokens per one that is kept, above 1 (the paper's 4); 0: as many as fit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("pool", self.pool, "mean", "max")
        if self.compression and not self.compression > 1:
            raise ValueError(f"compression must be 0 or above 1, got {self.compression}")

    def defaults(self, budget: int) -> Defaults:
        interval = 1024 if self.compression else usual_interval(budget)
        return Defaults(interval=interval, recent=min(self.window, budget // 2))

    def scores(self, slots: Slots) -> Tensor:
        positions, voted = slots.positions, self._voted(slots)
        votes = masked_softmax(window_logits(slots), voted[:, :, None, None])
        seen = (slots.query_positions >= 0)[:, None, None, :, None]
        votes = (votes * seen).sum(dim=3).mean(dim=(1, 2)).unsqueeze(1).expand(positions.shape)
        among = positions.masked_fill(~voted, -1)
        scores = pool_by_position(votes, among, kernel_size=self.kernel_size, reduce=self.pool)
        # No vote is above the window.
        return torch.where(voted, scores, self.window + 1 + positions.float())

    @property
    def drops(self) -> bool:
        return bool(self.compression)

    def dropped(self, slots: Slots, scores: Tensor) -> Tensor:
        quota = (slots.next_position - slots.prompt_length) // self.compression
        voted = self._voted(slots)
        place = places(scores.masked_fill(~voted, -torch.inf), slots.positions)
        better = scores.shape[-1] - 1 - place
        return voted & (better >= quota[:, None, None])

    def _voted(self, slots: Slots) -> Tensor:
        """Generated tokens before the window, ``[B, H, S]`` bool."""
        generated = slots.positions >= slots.prompt_length[:, None, None]
        return generated & (slots.positions < (slots.next_position - self.window)[:, None, None])
