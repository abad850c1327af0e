"""Keys that differ from the rest."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressed_cache.policies.base import Policy
from compressed_cache.policies.view import Slots


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Policy):
    """Evicts the token whose key is most like the mean direction of all held keys.

    KeyDiff (https://arxiv.org/abs/2504.15364), with the anchor over normalised keys.
    Differs in one point: the prompt is scored at once, not in blocks of 128 tokens.
    """

    name: ClassVar[str] = "keydiff"

    def scores(self, slots: Slots) -> Tensor:
        keys = slots.keys.float()
        norms = keys.norm(dim=-1).clamp(min=1e-12)
        counted = (slots.positions >= 0) & norms.isfinite()
        shares = torch.where(counted, 1 / norms, 0.0).unsqueeze(2)
        anchor = shares @ torch.where(counted.unsqueeze(-1), keys, 0.0)
        anchor = torch.nn.functional.normalize(anchor, dim=-1)
        return -(keys * anchor).sum(dim=-1) / norms
