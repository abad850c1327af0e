"""Small keys attract attention."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compressed_cache.policies.base import Policy
from compressed_cache.policies.view import Slots


@dataclass(frozen=True, kw_only=True)
class KNorm(Policy):
    """Evicts the token whose key has the largest L2 norm.

    "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression"
    (https://arxiv.org/abs/2406.11430). As there, nothing is protected by default.
    Differs in two points: every layer is compressed (the authors leave the first one or two alone,
    but ``budget`` is a cap for all), and from the first token over the budget (the authors wait
    until 2,048 tokens).
    """

    name: ClassVar[str] = "knorm"

    def scores(self, slots: Slots) -> Tensor:
        return -slots.keys.float().norm(dim=-1)
