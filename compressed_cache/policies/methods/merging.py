"""What is evicted lives on in the token that resembles it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from compressed_cache.ops.tokens import expand, gather
from compressed_cache.policies.modifier import Modifier

_BLOCK_ELEMENTS = 1 << 24
"""Similarities held at once while a prompt is cut."""


@dataclass(frozen=True, kw_only=True)
class Merging(Modifier):
    """Merges the value of each evicted token into the kept token with the most similar key.

    The merging of kvpress (https://github.com/NVIDIA/kvpress), after D2O
    (https://arxiv.org/abs/2406.13035): ``v <- (v + sum(w * v_e)) / (1 + sum(w))`` with
    ``w = cosine * |v_e| / (|v_e| + |v|)``; keys stay as they are.

    Differs in two points: it goes on while decoding, where each token is merged at the moment its
    slot is taken, into a value that may hold others already; and what ``merge_fraction`` asks for
    is found by rank, where kvpress interpolates between two cosines, and may merge nothing if one
    of them is below ``merge_threshold``.
    """

    name: ClassVar[str] = "merging"
    merge_threshold: float = 0.0
    """Cosine, 0 to 1, up to which an evicted token resembles none and is lost (kvpress's)."""
    merge_fraction: float = 1.0
    """Share, above 0 and up to 1, of the tokens that go at once of which the most similar are
    merged, the others are lost (kvpress's): of ``n``, ``1 + int(merge_fraction * (n - 1))`` and
    their equals, so that a token that goes alone, as in a decode step, is always merged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.merge_threshold <= 1:
            raise ValueError(f"merge_threshold must be from 0 to 1, got {self.merge_threshold}")
        if not 0 < self.merge_fraction <= 1:
            raise ValueError(
                f"merge_fraction must be above 0 and at most 1, got {self.merge_fraction}"
            )

    def merged(
        self, keys: Tensor, values: Tensor, kept: Tensor, evicted: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        exact = torch.promote_types(values.dtype, torch.float32)
        # What is broken stays in a row and a column of its own, which count for nothing.
        kept, directions, own, lengths = _usable(keys, values, kept, exact)
        present, their_directions, theirs, their_lengths = _usable(*evicted, exact)
        theirs = theirs.masked_fill(~present.unsqueeze(-1), 0.0)
        places = torch.arange(keys.shape[2], device=keys.device)
        sums, totals = torch.zeros_like(own), torch.zeros_like(lengths)
        block = max(1, _BLOCK_ELEMENTS // kept.numel())
        blocks = [slice(start, start + block) for start in range(0, present.shape[2], block)]
        cosine, target = (
            torch.zeros_like(their_lengths),
            torch.zeros_like(present, dtype=torch.long),
        )
        for here in blocks:
            cosines = their_directions[:, :, here] @ directions.mT
            cosines = cosines.masked_fill(~kept[:, :, None], -1.0)
            cosine[:, :, here], target[:, :, here] = cosines.max(dim=-1)
        weight = cosine * their_lengths
        weight = weight / (their_lengths + lengths.gather(2, target)).clamp(min=1e-12)
        weight = weight.masked_fill(~self._resembles(cosine, present), 0.0)
        if present.shape[2] == 1:
            old = gather(own, target)
            new = (old + weight.unsqueeze(-1) * theirs) / (1 + weight).unsqueeze(-1)
            new = torch.where((weight > 0).unsqueeze(-1), new, old).to(values.dtype)
            return values.scatter(2, expand(target, values), new)
        for here in blocks:
            # A product of matrices: sums by index have no fixed order on CUDA.
            is_target = target[:, :, here, None] == places
            weights = torch.where(is_target, weight[:, :, here, None], 0.0).mT
            sums += weights @ theirs[:, :, here]
            totals += weights.sum(dim=-1)
        merged = ((own + sums) / (1 + totals).unsqueeze(-1)).to(values.dtype)
        return torch.where((totals > 0).unsqueeze(-1), merged, values)

    def _resembles(self, cosine: Tensor, present: Tensor) -> Tensor:
        """Which evicted tokens are merged, of their largest cosines, both ``[B, H, E]``."""
        enough = present & (cosine > self.merge_threshold)
        if self.merge_fraction == 1 or cosine.shape[2] == 1:
            return enough
        ranked = cosine.masked_fill(~present, -torch.inf).sort(dim=-1, descending=True).values
        others = (present.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
        return enough & (cosine >= ranked.gather(-1, (self.merge_fraction * others).long()))


def _usable(
    keys: Tensor, values: Tensor, present: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which tokens are there and not broken, the directions of their keys, values and lengths."""
    # On a CPU several times as fast as to ask each number whether it is finite.
    largest = [tensor.abs().amax(dim=-1) for tensor in (keys, values)]
    present = present & (largest[0] < torch.inf) & (largest[1] < torch.inf)
    keys, values = keys.to(dtype), values.to(dtype)
    return present, normalize(keys, dim=-1), values, values.norm(dim=-1)
