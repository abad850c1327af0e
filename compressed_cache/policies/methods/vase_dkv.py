"""Sizes of keys and values as seen in a random subspace."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compressed_cache.policies.base import Defaults, Needs, Policy
from compressed_cache.policies.draws import check_seed, gauss
from compressed_cache.policies.needs import usual_interval
from compressed_cache.policies.view import Slots


@dataclass(frozen=True, kw_only=True)
class VaSEDKV(Policy):
    """Keeps the tokens whose key and value are long in a random subspace, drawn at each ranking.

    VaSE (https://arxiv.org/abs/2606.03928) without attention: the squared length of the key times
    that of the value, both multiplied with one matrix of ``rank`` Gaussian columns, which is fresh
    at every ranking and shared by the heads of a layer. Entries are hashes of seed, layer and
    incoming position.

    Differs in three points: the matrix comes from a hash; slots are overwritten one by one in the
    order of the ranking, where the authors let the cache grow by 64 tokens and cut it back, so the
    budget here includes that buffer; and a long prompt is cut to the budget by the same rule, where
    they keep it whole until decoding starts.
    """

    name: ClassVar[str] = "vase_dkv"
    rank: int = 20
    """Columns of the matrix, >= 1 (the authors'); fewer are more random."""
    seed: int = 0
    """Any int >= 0; another seed gives another sequence of matrices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        if self.rank < 1:
            raise ValueError(f"rank must be >= 1, got {self.rank}")

    @property
    def needs(self) -> Needs:
        return Needs(values=True)

    def defaults(self, budget: int) -> Defaults:
        return Defaults(interval=usual_interval(budget), sinks=4, recent=min(64, budget // 2))

    def scores(self, slots: Slots) -> Tensor:
        dim = max(slots.keys.shape[3], slots.values.shape[3])
        drawn = gauss(slots, self.seed, count=dim * self.rank) * self.rank**-0.5
        matrix = drawn.unflatten(1, (1, dim, self.rank))

        def size(vectors: Tensor) -> Tensor:
            projected = vectors.float() @ matrix[:, :, : vectors.shape[3]]
            return projected.square().sum(dim=-1)

        return size(slots.keys) * size(slots.values)
