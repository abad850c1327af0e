"""Slots go to the heads that need them."""

from dataclasses import dataclass
from typing import ClassVar

from compressed_cache.policies.capabilities import find_store, scores_attention
from compressed_cache.policies.modifier import Modifier


@dataclass(frozen=True, kw_only=True)
class AdaKV(Modifier):
    """Shares the slots of a layer among its heads: the best tokens of all heads stay.

    Ada-KV, section 3 (https://arxiv.org/abs/2407.11550). A head whose attention is concentrated
    needs few tokens and leaves its slots to others. Works on scores that are attention, which can
    be compared between heads: those of ``h2o``, ``snapkv`` and their like.

    Differs from the authors' code in four points: the tokens that stay are the floor of each head
    and then exactly the best of all heads (they round a mixture of both to a number of slots per
    head); no head's scores are weighted by how concentrated they are (their ``normalize``);
    slots go on changing hands while decoding, where each step takes as many from the lowest of all
    heads as there are heads (they share out once, after the prompt); and under tensor parallelism
    heads share with those in the same process.
    """

    name: ClassVar[str] = "adakv"
    store: ClassVar = "pool"
    floor: float = 0.2
    """Part of the budget, between 0 and 1, that each head keeps (the authors' code has 0.2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be between 0 and 1, got {self.floor}")
        if find_store(self.base) != "slots":
            raise ValueError(f"adakv cannot share out the slots of {self.base.label!r}")
        if not scores_attention(self.base):
            hint = ""
            if scores_attention(self.base.parts[0]):
                hint = f". Write 'adakv' right after {self.base.parts[0].label!r}."
            raise ValueError(
                f"adakv needs a policy whose scores are attention, such as 'snapkv+adakv', got "
                f"{self.base.label!r}{hint}"
            )

    @property
    def head_floor(self) -> float:
        return self.floor
