"""Positions without gaps."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compressed_cache.ops.rotary import rotary_of
from compressed_cache.policies.base import Needs
from compressed_cache.policies.modifier import Modifier
from compressed_cache.policies.view import LayerContext


@dataclass(frozen=True, kw_only=True)
class KeyRerotation(Modifier):
    """Attends as if the held tokens followed one another: no position is ever beyond the budget.

    StreamingLLM, section 3.2 (https://arxiv.org/abs/2309.17453), whose original form is
    ``streaming_llm+key_rerotation``; kvpress has it for other methods. Slots hold each key as the
    model rotated it. Every step turns all of them back and to their places among the tokens of
    their head, in float32, and the query to the last place. The result is never stored, so nothing
    drifts.

    Differs in two points: the first call, which evicts nothing before it is read, is attended at
    true positions by the model itself; and the scores of the other policy are taken from queries
    and keys at true positions, but for attention it observes, which is the one that took place.
    """

    name: ClassVar[str] = "key_rerotation"
    rerotates: ClassVar = True

    @property
    def needs(self) -> Needs:
        return Needs(model=("rotary position embedding",))

    def constants(self, context: LayerContext) -> dict[str, Tensor]:
        return rotary_of(context.config, context.module, context.layer, context.dim).constants()
