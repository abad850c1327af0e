"""How far the output would move without a token."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressed_cache.policies.base import Needs
from compressed_cache.policies.capabilities import scores_attention
from compressed_cache.policies.modifier import Modifier
from compressed_cache.policies.view import Slots

_LEAST = 1e-6


@dataclass(frozen=True, kw_only=True)
class CAOTE(Modifier):
    """Weights the attention that a token received by how far its value is from the output.

    CAOTE (https://arxiv.org/abs/2504.14051): ``a / (1 - a) * |v - o|`` with ``o = sum(a * v)``, the
    exact change of the output when the token goes and the others share its attention. Works on
    scores that are attention: those of ``h2o``, ``snapkv`` and their like.

    Differs in one point: scores that do not sum to one over the held tokens, such as the totals of
    ``h2o``, are divided by their sum first.
    """

    name: ClassVar[str] = "caote"
    # Of the output, and so as comparable among heads.
    scores_attention: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not scores_attention(self.base):
            raise ValueError(
                f"caote needs a policy whose scores are attention, such as 'h2o+caote', got "
                f"{self.base.label!r}"
            )

    @property
    def needs(self) -> Needs:
        return Needs(values=True)

    def scores(self, slots: Slots) -> Tensor:
        held = slots.positions >= 0
        attention = super().scores(slots)
        broken = attention.isnan() | slots.values.isnan().any(dim=-1)
        always = attention == torch.inf
        counted = held & ~broken & ~always
        attention = shares(attention, counted)
        values = torch.where(counted.unsqueeze(-1), slots.values.float(), 0.0)
        output = attention.unsqueeze(2) @ values
        distance = (values - output).norm(dim=-1)
        attention = attention.clamp(_LEAST, 1 - _LEAST)
        scores = attention / (1 - attention) * distance
        return scores.masked_fill(broken, -torch.inf).masked_fill(always, torch.inf)


def shares(attention: Tensor, counted: Tensor) -> Tensor:
    """Attention ``[B, H, S]`` divided by its sum over the tokens that count; zero at the others."""
    attention = torch.where(counted, attention, 0.0)
    return attention / attention.sum(dim=-1, keepdim=True).clamp(min=_LEAST)
