"""Attention sinks and a sliding window."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compressed_cache.policies.base import Defaults, Policy
from compressed_cache.policies.view import Slots


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
    """Keeps the first ``sinks`` tokens (4 by default) and the newest of the rest.

    StreamingLLM, section 3.2 (https://arxiv.org/abs/2309.17453). Differs in one point: keys keep
    the rotation of their position in the text, where the authors rotate them by their place in the
    cache, which matters only beyond the context length the model was trained for;
    ``streaming_llm+key_rerotation`` does as they do.
    """

    name: ClassVar[str] = "streaming_llm"

    def defaults(self, budget: int) -> Defaults:
        return Defaults(sinks=min(4, budget - 1))

    def scores(self, slots: Slots) -> Tensor:
        return slots.positions.float()
