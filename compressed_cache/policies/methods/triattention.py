"""The attention that queries at many distances ahead are expected to pay."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressed_cache.ops.rotary import Rotary, rotary_of
from compressed_cache.policies.base import Defaults, Needs
from compressed_cache.policies.methods.calibrated import Calibrated
from compressed_cache.policies.needs import usual_interval
from compressed_cache.policies.view import LayerContext, Slots


@dataclass(frozen=True, kw_only=True)
class TriAttention(Calibrated):
    """Keeps what an average query would attend to from 1, 2, 4, ... 65536 tokens ahead.

    TriAttention (https://arxiv.org/abs/2604.04921): before RoPE the queries of a head lie around a
    fixed centre, so that the logit expected at a distance is a sum of cosines, one per frequency,
    plus a term for the length of the key where queries scatter. The mean over the distances is
    normalised per query head (mean and deviation over the tokens after the prompt, over all while
    there are none), and the strongest query head speaks for its group. The prompt is protected by
    default. Computed as one product of the key, as it is held, with the mean of the centre turned
    to all distances, which is the same sum.

    Differs in three points: each layer and head keeps its own tokens (theirs average the score over
    all layers by default, which here rank at different moments); slots are overwritten one by one
    in the order of the ranking, so the budget here includes the 128 tokens by which theirs lets the
    cache grow; and channels that are not rotated count with the expected product alone (the
    paper's models rotate all).
    """

    name: ClassVar[str] = "triattention"
    num_offsets: int = 17
    """Distances 1, 2, 4, ... of which the mean is taken, 1 to 32 (the authors' 17 end at 65536)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_offsets <= 32:
            raise ValueError(f"num_offsets must be from 1 to 32, got {self.num_offsets}")

    @property
    def needs(self) -> Needs:
        return Needs(model=("rotary position embedding", "calibration"))

    def defaults(self, budget: int) -> Defaults:
        return Defaults(interval=usual_interval(budget), protect_prompt=True)

    def constants(self, context: LayerContext) -> dict[str, Tensor]:
        statistics = self.statistics(context)
        rotary = rotary_of(context.config, context.module, context.layer, context.dim)
        centre, magnitude = statistics["mean"], statistics["magnitude"]
        return virtual_query(centre, magnitude, rotary, num_offsets=self.num_offsets)

    def scores(self, slots: Slots) -> Tensor:
        scores = expected_logits(slots.keys, slots.next_position, slots.constants)
        finite = scores.isfinite()
        held = (slots.positions >= 0)[:, :, None] & finite
        after = held & (slots.positions >= slots.prompt_length[:, None, None])[:, :, None]
        counted = torch.where(after.any(dim=-1, keepdim=True), after, held)
        count = counted.sum(dim=-1, keepdim=True).clamp(min=1)
        mean = scores.masked_fill(~counted, 0.0).sum(dim=-1, keepdim=True) / count
        centred = scores - mean
        variance = centred.square().masked_fill(~counted, 0.0).sum(dim=-1, keepdim=True) / count
        scores = centred / variance.sqrt().clamp(min=1e-6)
        return scores.masked_fill(~finite, -torch.inf).amax(dim=2).float()


def virtual_query(
    centre: Tensor, magnitude: Tensor, rotary: Rotary, *, num_offsets: int
) -> dict[str, Tensor]:
    """What :func:`expected_logits` needs of a layer.

    Args:
        centre: ``[H, G, D]`` mean query before RoPE.
        magnitude: ``[H, G, D]`` mean length of the pair of each channel, the same for both.
        rotary: how the layer turns them.
        num_offsets: how many powers of two.
    """
    offsets = 2.0 ** torch.arange(num_offsets, dtype=torch.float64, device=centre.device)
    length = (centre.square() + centre[..., rotary.partners].square()).sqrt()
    return {
        "queries": rotary.rotate(centre[..., None, :], offsets).mean(dim=-2).to(centre.dtype),
        # Once for each pair, and never for a channel without a partner.
        "spread": (magnitude - length) * (rotary.signs < 0),
        **rotary.constants(),
    }


def expected_logits(keys: Tensor, next_position: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
    """Mean logit over the distances ahead, but for the model's scaling.

    Args:
        keys: ``[B, H, S, D]`` after RoPE.
        next_position: ``[B]``.
        constants: of :func:`virtual_query`.

    Returns:
        ``[B, H, G, S]`` float32, or float64 where the keys and constants are.
    """
    rotary = Rotary.among(constants)
    queries = rotary.rotate(constants["queries"], next_position[:, None, None])
    keys = keys.to(queries.dtype)
    lengths = (keys.square() + keys[..., rotary.partners].square()).sqrt()
    spread = constants["spread"].to(queries.dtype)
    return queries @ keys.mT + spread @ lengths.mT
