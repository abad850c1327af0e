"""R-KV with redundancy guessed from hashes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressed_cache.policies.base import Needs
from compressed_cache.policies.methods.rkv import ImportanceAndRedundancy, as_shares, directions
from compressed_cache.policies.view import LayerContext, Slots


@dataclass(frozen=True, kw_only=True)
class RKVLSH(ImportanceAndRedundancy):
    """Trades the attention of the last queries against redundancy guessed from hashes of the keys.

    R-KV (https://arxiv.org/abs/2505.24133) with the buckets of locality-sensitive hashing in place
    of pairs of keys, as a study of reasoning models has it (https://arxiv.org/abs/2512.12008):
    ``bits`` random hyperplanes give each key a code, the cosine of two keys is taken to be
    ``cos(pi * different bits / bits)``, and redundancy is a softmax over its mean over all other
    keys. Everything else is as in :class:`~compressed_cache.policies.methods.rkv.RKV`.

    It is here for comparison: the mean it guesses is ``(k . u - 1) / S`` for a key ``k`` of length
    1 and the sum ``u`` of all ``S`` such keys, exact at the cost of ``S * D`` and ranked as by
    :class:`~compressed_cache.policies.methods.keydiff.KeyDiff`, so the hashes buy nothing.

    Differs from the study's code by following R-KV in all but the hashes, and in four points of
    these: redundancy is subtracted (there it is added, which
    prefers duplicates); the factor pi, without which no two keys are ever dissimilar; hyperplanes
    are drawn once from ``seed`` (there anew at every ranking); and no key counts as its own
    duplicate.
    """

    name: ClassVar[str] = "rkv_lsh"
    bits: int = 6
    """Hyperplanes, 1 to 12; there are ``2 ** bits`` buckets (the study's code uses 6)."""
    seed: int = 0
    """Any int >= 0; another seed draws other hyperplanes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.bits <= 12:
            raise ValueError(f"bits must be from 1 to 12, got {self.bits}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")

    @property
    def needs(self) -> Needs:
        return Needs(queries=self.window, recent=self.window)

    def constants(self, context: LayerContext) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        hyperplanes = torch.randn(context.dim, self.bits, generator=generator)
        codes = torch.arange(2**self.bits)[:, None] >> torch.arange(self.bits) & 1
        signs = (2 * codes - 1).float()
        # The cosine of pi * h / bits, in a form that is exactly odd.
        cosines = (torch.pi / 2 * (signs @ signs.mT / self.bits)).sin()
        return {
            "hyperplanes": hyperplanes.to(context.device),
            "cosines": cosines.to(context.device),
        }

    def redundancy(self, slots: Slots) -> Tensor:
        keys, counted = directions(slots)
        above = (keys @ slots.constants["hyperplanes"]) > 0
        codes = (above.long() << torch.arange(self.bits, device=keys.device)).sum(dim=-1)
        sizes = keys.new_zeros(*codes.shape[:2], 2**self.bits)
        sizes = sizes.scatter_add(-1, codes, counted.float())
        similarity = (sizes @ slots.constants["cosines"]).gather(-1, codes) - 1
        return as_shares(similarity, slots, counted)
