"""Attention weighted by how far the value reaches in the output of the layer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressed_cache.ops.eviction import protect, sort_slots
from compressed_cache.policies.base import Needs
from compressed_cache.policies.capabilities import scores_attention
from compressed_cache.policies.methods.caote import shares
from compressed_cache.policies.modifier import Modifier
from compressed_cache.policies.output_projection import output_projection
from compressed_cache.policies.view import LayerContext, Slots

_BLOCK_ELEMENTS = 1 << 24
"""Projected values held at once while a prompt is read."""


@dataclass(frozen=True, kw_only=True)
class CriticalKV(Modifier):
    """Weights the attention that a token received by the size of its projected value.

    CriticalKV (https://arxiv.org/abs/2502.03805): half of the budget goes to the highest scores as
    they are, the other half to the highest ``(score + offset) * |W v|_1``, where ``W`` is the part
    of the output projection that belongs to the head. Works on scores that are attention: those of
    ``h2o``, ``snapkv`` and their like.

    Differs in four points: scores are divided by their sum over the held tokens first, so that the
    offset means the same to ``h2o``, whose totals grow, as to the others; query heads that share a
    value are averaged (the norms, as kvpress does; the authors repeat the values); tokens that the
    cache protects are counted in the first half of the budget; and the same is done again at every
    ranking while decoding, where the authors compress the prompt only.
    """

    name: ClassVar[str] = "criticalkv"
    scores_attention: ClassVar = False
    first_stage_ratio: float = 0.5
    """Share of the budget, 0 to 1, that is given by the scores alone (the authors')."""
    score_offset: float = 1e-4
    """What is added to scores before they are weighted (the authors')."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not scores_attention(self.base):
            raise ValueError(
                f"criticalkv needs a policy whose scores are attention, such as "
                f"'snapkv+criticalkv', got {self.base.label!r}"
            )
        if not 0 <= self.first_stage_ratio <= 1:
            raise ValueError(f"first_stage_ratio must be from 0 to 1, got {self.first_stage_ratio}")
        if not self.score_offset >= 0:
            raise ValueError(f"score_offset must be >= 0, got {self.score_offset}")

    @property
    def needs(self) -> Needs:
        return Needs(notes=1, whole_keys=False, values=True, model=("output projection",))

    def constants(self, context: LayerContext) -> dict[str, Tensor]:
        return {"output_projection": output_projection(context, self.name)}

    def note(self, tokens: Slots) -> Tensor:
        batch, heads, _, dim = tokens.values.shape
        weight = tokens.constants["output_projection"].detach().unflatten(1, (heads, -1, dim))
        block = max(1, _BLOCK_ELEMENTS // (batch * heads * weight.shape[0]))
        norms = [_norms(values, weight) for values in tokens.values.split(block, dim=2)]
        return torch.cat(norms, dim=2).unsqueeze(-1)

    def scores(self, slots: Slots) -> Tensor:
        base = super().scores(slots)
        norms = slots.notes[..., -1]
        always = base == torch.inf
        usable = base.isfinite() & norms.isfinite() & (slots.positions >= 0)
        weighted = (shares(base, usable) + self.score_offset) * norms
        first = self._first_stage(slots, base.masked_fill(~(usable | always), -torch.inf))
        # Above all others, and still a number that a modifier behind this one can average.
        ceiling = weighted.masked_fill(~usable, 0.0).amax(dim=-1, keepdim=True)
        scores = torch.where(first, 2 * ceiling, weighted)
        return scores.masked_fill(~usable, -torch.inf).masked_fill(always, torch.inf)

    def _first_stage(self, slots: Slots, base: Tensor) -> Tensor:
        """Which tokens the scores alone keep."""
        scores = protect(
            base,
            slots.positions,
            next_position=slots.next_position,
            protected_prefix=slots.protected_prefix,
            recent=slots.recent,
        )
        count = int(slots.budget * self.first_stage_ratio)
        best = sort_slots(scores, slots.positions)[..., scores.shape[-1] - count :]
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def _norms(values: Tensor, weight: Tensor) -> Tensor:
    """Mean over the group of the L1 norm of projected values ``[B, H, S, D]``: ``[B, H, S]``."""
    batch, heads, length, dim = values.shape
    rows = values.to(weight.dtype).transpose(0, 1).reshape(heads, batch * length, dim)
    total = torch.zeros(heads, batch * length, dtype=torch.float32, device=values.device)
    # Head by head of the group, so that no copy of the weight is made.
    for part in weight.unbind(dim=2):
        total += torch.bmm(rows, part.permute(1, 2, 0)).float().abs().sum(dim=-1)
    return (total / weight.shape[2]).unflatten(1, (batch, length)).transpose(0, 1)
