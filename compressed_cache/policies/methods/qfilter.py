"""Along the direction that most queries share."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compressed_cache.policies.base import Defaults, Needs
from compressed_cache.policies.methods.calibrated import Calibrated
from compressed_cache.policies.view import LayerContext, Slots


@dataclass(frozen=True, kw_only=True)
class QFilter(Calibrated):
    """Keeps the keys that lie furthest along the main direction of the queries.

    Q-Filters (https://arxiv.org/abs/2503.02812): the first right singular vector of many queries of
    a head after RoPE, found beforehand over a text and turned so that queries are mostly positive
    along it; the mean over the query heads that share a key is its filter. A key is projected on it
    once, and neither queries nor positions are needed. The last 64 tokens are kept through
    ``recent``, as in the authors' code, where the budget is at least twice as large.

    Differs in two points: all queries of the calibration text count, not a sample of 3000; and the
    direction is turned to their mean, not to the side with more of them.
    """

    name: ClassVar[str] = "qfilter"

    @property
    def needs(self) -> Needs:
        return Needs(model=("calibration",))

    def defaults(self, budget: int) -> Defaults:
        return Defaults(recent=min(64, budget // 2))

    def constants(self, context: LayerContext) -> dict[str, Tensor]:
        return {"filters": self.statistics(context)["filters"]}

    def scores(self, slots: Slots) -> Tensor:
        filters = slots.constants["filters"].unsqueeze(-1)
        return -(slots.keys.float() @ filters).squeeze(-1)
