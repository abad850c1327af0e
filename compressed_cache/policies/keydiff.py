"""Keys that differ from the rest."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressed_cache.policies.base import Policy, Slots


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Policy):
    """Evicts the token whose key is most like the mean direction of all held keys.

    KeyDiff (https://arxiv.org/abs/2504.15364), with the anchor over normalised keys.
    Differs in one point: the prompt is scored at once, not in blocks of 128 tokens.
    """

    name: ClassVar[str] = "keydiff"

    def scores(self, slots: Slots) -> Tensor:
        keys = torch.nn.functional.normalize(slots.keys.float(), dim=-1)
        counted = (slots.positions >= 0).unsqueeze(-1) & ~keys.isnan()
        anchor = keys.masked_fill(~counted, 0.0).sum(dim=2, keepdim=True)
        return -torch.nn.functional.cosine_similarity(keys, anchor, dim=-1)
