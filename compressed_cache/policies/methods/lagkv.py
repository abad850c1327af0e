"""Tokens that stand out from those that follow."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressed_cache.ops.attention import masked_softmax
from compressed_cache.policies.base import Defaults, Needs, Policy
from compressed_cache.policies.needs import usual_interval
from compressed_cache.policies.view import Slots


@dataclass(frozen=True, kw_only=True)
class LagKV(Policy):
    """Keeps the tokens whose keys and values vary most on the scale of the next ``lag`` tokens.

    LagKV (https://arxiv.org/abs/2504.04704), with the ranks of kvpress' implementation. The held
    tokens after the first ``num_sinks`` positions are cut, in the order of their positions, into
    blocks of ``lag``. Each channel of a block is scaled by the least and the largest value in the
    next block; the standard deviation over a token's channels, as a softmax over the block, is its
    score, the mean of that of its key and that of its value. The last full block, which has no full
    one after it, and the tokens after it are kept as long as any other can go, and so are the
    first positions, which ``sinks`` (``num_sinks`` by default) protects for good. Where fewer than
    ``num_sinks + 2 * lag`` tokens are held, and so at any smaller budget, the newest are kept.

    Differs from the authors' code in four points: the blocks are formed anew from what is held at
    every ranking, under a fixed budget, where the authors compress each block once and let the
    cache grow; by default each block gives up its lowest tokens in turn, as in kvpress
    (``cross_scoring=True`` compares the scores themselves between blocks); a channel that is
    constant in the next block counts as 0 (there it is a division by zero); and ``lag`` is 32 by
    default, as theirs of 1,024 and that of kvpress of 128 are too long for small budgets.
    """

    name: ClassVar[str] = "lagkv"
    lag: int = 32
    """Tokens of a block, at least 2 (the authors use 1024, kvpress 128)."""
    num_sinks: int = 4
    """Positions at the start of the text that belong to no block (kvpress'; the authors use 16)."""
    cross_scoring: bool = False
    """``True``: scores decide between tokens of different blocks; ``False``: ranks in the block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lag < 2:
            raise ValueError(f"lag must be >= 2, got {self.lag}")
        if self.num_sinks < 0:
            raise ValueError(f"num_sinks must be >= 0, got {self.num_sinks}")

    @property
    def needs(self) -> Needs:
        return Needs(values=True)

    def defaults(self, budget: int) -> Defaults:
        return Defaults(interval=usual_interval(budget, longest=self.lag), sinks=self.num_sinks)

    def scores(self, slots: Slots) -> Tensor:
        positions, lag = slots.positions, self.lag
        # In a block no score is above 1.
        newest = 2 + positions.float()
        num_blocks = positions.shape[2] // lag
        if num_blocks < 2:
            return newest
        after_sinks = positions >= self.num_sinks
        last = torch.iinfo(torch.int64).max
        order = positions.masked_fill(~after_sinks, last).argsort(dim=-1, stable=True)
        order = order[..., : num_blocks * lag]
        in_block = (_spread(slots.keys, order, lag) + _spread(slots.values, order, lag)) / 2
        if not self.cross_scoring:
            ranks = in_block.argsort(dim=-1, stable=True).argsort(dim=-1)
            in_block = torch.where(in_block < 0, in_block, ranks / lag)
        ends = lag * torch.arange(2, num_blocks + 1, device=positions.device)
        has_next = ends <= after_sinks.sum(dim=-1, keepdim=True)
        index = order[..., :-lag]
        fallback = newest.gather(-1, index).unflatten(-1, (-1, lag))
        in_block = torch.where(has_next.unsqueeze(-1), in_block, fallback)
        return newest.scatter(-1, index, in_block.flatten(-2))


def _spread(states: Tensor, order: Tensor, lag: int) -> Tensor:
    """Scores of all blocks but the last, ``[B, H, blocks - 1, lag]``; -1 at broken tokens."""
    states = states.float().gather(2, order.unsqueeze(-1).expand(-1, -1, -1, states.shape[3]))
    blocks = states.unflatten(2, (-1, lag))
    block, following = blocks[:, :, :-1], blocks[:, :, 1:]
    broken = following.isnan()
    low = following.masked_fill(broken, torch.inf).amin(dim=3, keepdim=True)
    width = following.masked_fill(broken, -torch.inf).amax(dim=3, keepdim=True) - low
    scaled = torch.where(width > 0, (block - low) / width, 0.0 * block)
    spread = scaled.std(dim=-1)
    whole = ~spread.isnan()
    return masked_softmax(spread, whole).masked_fill(~whole, -1.0)
