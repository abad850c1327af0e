"""What is evicted lives on in the token that resembles it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from compressed_cache.policies.modifier import Modifier

_BLOCK_ELEMENTS = 1 << 24
"""Similarities held at once while a prompt is cut."""


@dataclass(frozen=True, kw_only=True)
class Merging(Modifier):
    """Merges the value of each evicted token into the kept token with the most similar key.

    The merging of kvpress (https://github.com/NVIDIA/kvpress), after D2O
    (https://arxiv.org/abs/2406.13035): ``v <- (v + sum(w * v_e)) / (1 + sum(w))`` with
    ``w = cosine * |v_e| / (|v_e| + |v|)``; keys stay as they are.

    Differs in one point: it goes on while decoding, where each token is merged at the moment its
    slot is taken, into a value that may hold others already.
    """

    name: ClassVar[str] = "merging"
    merge_threshold: float = 0.0
    """Cosine, 0 to 1, up to which an evicted token resembles none and is lost (kvpress's)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.merge_threshold <= 1:
            raise ValueError(f"merge_threshold must be from 0 to 1, got {self.merge_threshold}")

    def merged(
        self, keys: Tensor, values: Tensor, kept: Tensor, evicted: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        exact = torch.promote_types(values.dtype, torch.float32)
        kept, directions, own, lengths = _usable(keys, values, kept, exact)
        present, their_directions, theirs, their_lengths = _usable(*evicted, exact)
        places = torch.arange(keys.shape[2], device=keys.device)
        sums, totals = torch.zeros_like(own), torch.zeros_like(lengths)
        block = max(1, _BLOCK_ELEMENTS // kept.numel())
        for start in range(0, present.shape[2], block):
            here = slice(start, start + block)
            cosines = their_directions[:, :, here] @ directions.mT
            cosines = cosines.masked_fill(~kept[:, :, None], -1.0)
            cosine, target = cosines.max(dim=-1)
            length = their_lengths[:, :, here]
            weight = cosine * length / (length + lengths.gather(2, target)).clamp(min=1e-12)
            weight = weight.masked_fill(~(present[:, :, here] & (cosine > self.merge_threshold)), 0)
            # A product of matrices: sums by index have no fixed order on CUDA.
            weights = torch.where(target.unsqueeze(-1) == places, weight.unsqueeze(-1), 0.0).mT
            sums += weights @ theirs[:, :, here]
            totals += weights.sum(dim=-1)
        merged = ((own + sums) / (1 + totals).unsqueeze(-1)).to(values.dtype)
        return torch.where((totals > 0).unsqueeze(-1), merged, values)


def _usable(
    keys: Tensor, values: Tensor, present: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which tokens are there and not broken, the directions of their keys, values and lengths."""
    broken = ~(keys.isfinite().all(dim=-1) & values.isfinite().all(dim=-1))
    present = present & ~broken
    keys, values = (
        tensor.to(dtype).masked_fill(~present.unsqueeze(-1), 0.0) for tensor in (keys, values)
    )
    return present, normalize(keys, dim=-1), values, values.norm(dim=-1)
