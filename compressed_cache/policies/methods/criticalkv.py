"""Attention weighted by how far the value reaches in the output of the layer."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressed_cache.ops.eviction import (
    HIGHEST_SCORE,
    as_one_head,
    per_head,
    places,
    protect,
    sort_slots,
    tokens_of_heads,
)
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

    Its own scores are places in that order. Behind ``adakv`` (CriticalAdaKV, in the form of
    kvpress) the scores as they are say how many tokens each head keeps, and the halves are of that
    number, the first no less than the floor: the places that the tokens of a head have among those
    of all heads by these scores are given out among them anew.

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
        if not 0 <= self.score_offset < math.inf:
            raise ValueError(f"score_offset must be finite and >= 0, got {self.score_offset}")

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
        base = protect(
            base.masked_fill(~(usable | always), -torch.inf),
            slots.positions,
            next_position=slots.text_end,
            protected_prefix=slots.protected_prefix,
            recent=slots.recent,
        )
        by_base = sort_slots(base, slots.positions)
        place = torch.arange(by_base.shape[-1], device=by_base.device)
        first = place >= len(place) - self._first_stage(slots, base)
        first = first | (base.gather(-1, by_base) >= HIGHEST_SCORE)
        weighted = weighted.masked_fill(~usable, -torch.inf).gather(-1, by_base)
        # Those of the first stage stay in the order of their own scores.
        order = weighted.masked_fill(first, torch.inf).argsort(dim=-1, stable=True)
        by_both = by_base.gather(-1, order)
        scores = _places(slots, base).gather(-1, by_base)
        scores = torch.zeros_like(base).scatter(-1, by_both, scores.float())
        return scores.masked_fill(~usable, -torch.inf).masked_fill(always, torch.inf)

    def _first_stage(self, slots: Slots, base: Tensor) -> Tensor:
        """How many tokens of each head the scores alone keep, ``[B | 1, H | 1, 1]``."""
        if slots.floor is not None:
            count = base.shape[1] * slots.budget
            kept = tokens_of_heads(base, slots.positions, floor=slots.floor, count=count)
            return (kept.double() * self.first_stage_ratio).long().clamp(min=slots.floor)
        counts = [int(budget * self.first_stage_ratio) for budget in slots.budgets]
        return per_head(counts, slots.positions)


def _places(slots: Slots, scores: Tensor) -> Tensor:
    """The place of each token by scores ``[B, H, S]``, among all heads where they share slots."""
    if slots.floor is None:
        return places(scores, slots.positions)
    return places(*as_one_head(scores, slots.positions)).view_as(scores)


def _norms(values: Tensor, weight: Tensor) -> Tensor:
    """Mean over the group of the L1 norm of projected values ``[B, H, S, D]``: ``[B, H, S]``."""
    batch, heads, length, dim = values.shape
    rows = values.to(weight.dtype).transpose(0, 1).reshape(heads, batch * length, dim)
    total = torch.zeros(heads, batch * length, dtype=torch.float32, device=values.device)
    # Head by head of the group, so that no copy of the weight is made.
    for part in weight.unbind(dim=2):
        total += torch.bmm(rows, part.permute(1, 2, 0)).float().abs().sum(dim=-1)
    return (total / weight.shape[2]).unflatten(1, (batch, length)).transpose(0, 1)
