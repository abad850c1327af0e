"""The attention of the current token decides."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compressed_cache.policies.base import Needs, Policy
from compressed_cache.policies.view import AttentionRows, Slots


@dataclass(frozen=True, kw_only=True)
class TOVA(Policy):
    """Evicts the token that the last query attended least, averaged over all heads of the layer.

    TOVA (https://arxiv.org/abs/2401.06104). All heads of a layer keep the same tokens. Differs in
    one point: the paper drops a token right after a step, this cache right before the next, by the
    same row of attention; so attention sees ``budget`` tokens where the paper sees one more.
    """

    name: ClassVar[str] = "tova"
    scores_attention: ClassVar = True

    @property
    def needs(self) -> Needs:
        return Needs(attention=True, prompt_queries=1, all_heads=True)

    def accumulate(self, state: Tensor, rows: AttentionRows) -> Tensor:
        return rows.weights[:, :, :, -1].mean(dim=(1, 2)).unsqueeze(1).expand_as(state)

    def scores(self, slots: Slots) -> Tensor:
        return slots.attention_state
