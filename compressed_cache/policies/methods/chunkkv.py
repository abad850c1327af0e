"""Neighbouring tokens stay or go together."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressed_cache.policies.modifier import Modifier
from compressed_cache.policies.view import Slots

_NOWHERE = -2


@dataclass(frozen=True, kw_only=True)
class ChunkKV(Modifier):
    """Ranks chunks of ``chunk_length`` neighbouring positions by the mean score of their tokens.

    ChunkKV (https://arxiv.org/abs/2502.00299): scores are averaged over the heads of the layer and
    over the tokens held of each chunk, so that phrases survive as a whole and all heads hold the
    same tokens. What the other policy always keeps in one head stays in all and counts for nothing
    in its chunk.

    Differs in four points: the budget is met exactly, so the last chunk to go loses its oldest
    tokens only; the same happens while decoding, where the paper leaves new tokens alone; an
    incomplete chunk competes by the mean of the tokens it has; and no layer takes over the choice
    of another one.
    """

    name: ClassVar[str] = "chunkkv"
    scores_attention: ClassVar = True
    same_for_all_heads: ClassVar = True
    chunk_length: int = 10
    """Positions of a chunk, counted from the start of the text (the paper's; kvpress has 20)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk_length < 1:
            raise ValueError(f"chunk_length must be >= 1, got {self.chunk_length}")

    def scores(self, slots: Slots) -> Tensor:
        # In the order of positions all heads are alike, whatever slots they use.
        order = slots.positions.argsort(dim=-1)
        positions = slots.positions.gather(-1, order)[:, 0]
        base = super().scores(slots).gather(-1, order)
        always = (base == torch.inf).any(dim=1)
        counted = base.isfinite().all(dim=1) & (positions >= 0)
        means = self._means(base.mean(dim=1), positions, counted)
        means = means.masked_fill(~counted, -torch.inf).masked_fill(always, torch.inf)
        return torch.empty_like(base).scatter(-1, order, means.unsqueeze(1).expand_as(order))

    def _means(self, scores: Tensor, positions: Tensor, counted: Tensor) -> Tensor:
        """The mean over the chunk of each token, ``[B, S]`` in the order of positions."""
        chunks = positions.div(self.chunk_length, rounding_mode="floor")
        scores = scores.masked_fill(~counted, 0.0)
        # Summed from the first token of a chunk on, in one order for all its tokens: equal to the
        # last bit, on every device.
        same = self._following(chunks, _NOWHERE) == chunks.unsqueeze(-1)
        sums = (self._following(scores, 0.0) * same).sum(dim=-1)
        sizes = (self._following(counted.int(), 0) * same).sum(dim=-1)
        first = torch.searchsorted(chunks, chunks)
        return (sums / sizes.clamp(min=1)).gather(-1, first)

    def _following(self, values: Tensor, fill: float) -> Tensor:
        """Each value and those after it, as far as a chunk reaches: ``[B, S, chunk_length]``."""
        return pad(values, (0, self.chunk_length - 1), value=fill).unfold(-1, self.chunk_length, 1)
