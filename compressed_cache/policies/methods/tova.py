"""The attention of the current token decides."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compressed_cache.policies.base import Policy, Rows, Slots


@dataclass(frozen=True, kw_only=True)
class TOVA(Policy):
    """Evicts the token that the last query attended least, averaged over all heads of the layer.

    TOVA (https://arxiv.org/abs/2401.06104). All heads of a layer keep the same tokens. Differs in
    one point: the paper drops a token right after a step, this cache right before the next, by the
    same row of attention; so attention sees ``budget`` tokens where the paper sees one more.
    """

    name: ClassVar[str] = "tova"
    observes_attention: ClassVar = True
    scores_attention: ClassVar = True
    mixes_heads: ClassVar = True
    prompt_queries: ClassVar = 1

    def accumulate(self, attention: Tensor, rows: Rows) -> Tensor:
        return rows.weights[:, :, :, -1].mean(dim=(1, 2)).unsqueeze(1).expand_as(attention)

    def scores(self, slots: Slots) -> Tensor:
        return slots.attention
