"""The attention that the next queries are expected to pay, times the value."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressed_cache.ops.attention import masked_softmax
from compressed_cache.ops.rotary import Rotary, rotary_of
from compressed_cache.policies.base import Defaults, Needs
from compressed_cache.policies.methods.calibrated import Calibrated
from compressed_cache.policies.needs import usual_interval
from compressed_cache.policies.view import LayerContext, Slots

_BLOCK = 1024
"""Queries of a prompt that are turned at once."""


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Calibrated):
    """Keeps what a random query would attend to over the next ``n_future`` positions.

    Expected Attention (https://arxiv.org/abs/2510.00636): queries before RoPE are taken as normally
    distributed, with the mean and covariance of those of the prompt after its first ``n_sinks``
    tokens, and turned by the mean rotation over the positions to come; the expected attention of a
    key is the softmax over the mean logit plus half its variance, averaged over the query heads
    that share the key, and counts times the length of the value. The first ``n_sinks`` tokens are
    always kept and take no part in the softmax. With ``calibration`` mean and covariance are those
    of another text, as in kvpress' variant with statistics.

    Mean and covariance are those of the first prompt, all chunks of it that were read; later
    prompts and decoded tokens change nothing. They take ``D * (D + 1)`` float32 of each query head
    and row beside the slots. A prompt of ``n_sinks`` tokens or less has none: then all tokens are
    expected to receive the same attention.

    Differs in four points: queries are those that the model has computed, where kvpress multiplies
    hidden states by the weight of their projection and leaves out its bias and a norm after it;
    the score is taken again at every ranking while decoding, from the position reached but with the
    statistics of the prompt (kvpress takes those of its last hidden states); logits are scaled as
    the model scales them (the paper's are divided by the root of the dimension); and after
    ``chunk`` each block of a prompt goes by its own queries from position ``n_sinks`` of the text
    on (kvpress leaves out the first ones of each block).
    """

    name: ClassVar[str] = "expected_attention"
    scores_attention: ClassVar = True
    calibration: str | None = None
    """Path of a file that ``compressed-cache calibrate`` wrote for the model, or of a
    ``model.safetensors`` that kvpress made for it (``query_mean`` and ``query_cov``), or of a
    folder with ``expected_attention.safetensors`` or that; None: statistics of the prompt."""
    n_future: int = 512
    """Positions ahead that the rotation is averaged over, >= 1 (the paper's 512)."""
    n_sinks: int = 4
    """First tokens of the text that are always kept, >= 0 (the paper's 4), as far as ``sinks`` and
    ``recent`` leave room; of those that have none the oldest go first."""
    use_covariance: bool = True
    """Whether the variance of the logits counts."""
    use_vnorm: bool = True
    """Whether the length of the value counts (kvpress advises against it with ``criticalkv``, which
    weighs values itself)."""
    epsilon: float = 0.0
    """Added to the attention before it is multiplied, >= 0: larger ones give values more weight
    (the paper's 0; 0.02 where budgets differ between heads)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_future < 1:
            raise ValueError(f"n_future must be >= 1, got {self.n_future}")
        if self.n_sinks < 0:
            raise ValueError(f"n_sinks must be >= 0, got {self.n_sinks}")
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon must be finite and >= 0, got {self.epsilon}")

    @property
    def needs(self) -> Needs:
        return Needs(values=True, model=("rotary position embedding",))

    def defaults(self, budget: int) -> Defaults:
        sinks = min(self.n_sinks, budget // 2)
        return Defaults(interval=usual_interval(budget), sinks=sinks)

    def constants(self, context: LayerContext) -> dict[str, Tensor]:
        rotary = rotary_of(context.config, context.module, context.layer, context.dim)
        mean_rotation = self._mean_rotation(rotary, context)
        if self.calibration is None:
            return {"mean_rotation": mean_rotation.float(), **rotary.constants()}
        statistics = self.statistics(context)
        mean, covariance = (statistics[name].double() for name in ("mean", "covariance"))
        return {
            "mean": (mean @ mean_rotation.mT).float(),
            "covariance": (mean_rotation @ covariance @ mean_rotation.mT).float(),
            **rotary.constants(),
        }

    def query_state_shapes(self, dim: int) -> dict[str, tuple[int, ...]]:
        if self.calibration is not None:
            return {}
        shapes: dict[str, tuple[int, ...]] = {"count": (), "mean": (dim,)}
        return shapes | {"covariance": (dim, dim)} if self.use_covariance else shapes

    def observe_queries(
        self,
        state: Mapping[str, Tensor],
        queries: Tensor,
        positions: Tensor,
        constants: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        rotary, mean_rotation = Rotary.among(constants), constants["mean_rotation"]
        parts = queries.split(_BLOCK, dim=3), positions.split(_BLOCK, dim=1)
        for part, own in zip(*parts, strict=True):
            straight = rotary.rotate(part, -own[:, None, None]).float()
            counted = (own >= self.n_sinks)[:, None, None] & straight.isfinite().all(dim=-1)
            state = _with_more(state, straight @ mean_rotation.mT, counted)
        return state

    def scores(self, slots: Slots) -> Tensor:
        scaling = slots.transform.scaling
        rotary = Rotary.among(slots.constants)
        known = slots.constants if self.calibration is not None else slots.query_state
        # Turning the keys back to where the position ahead is 0 leaves the statistics constant.
        keys = rotary.rotate(slots.keys, -slots.next_position[:, None, None]).float()
        logits = scaling * (known["mean"] @ keys.mT)
        if self.use_covariance:
            # One query head after the other: a product of all would copy the keys for each.
            heads = known["covariance"].unbind(dim=-3)
            variance = torch.stack([((keys @ head) * keys).sum(dim=-1) for head in heads], dim=2)
            logits = logits + scaling**2 / 2 * variance
        counted = slots.positions >= self.n_sinks
        scores = masked_softmax(logits, counted[:, :, None]).mean(dim=2) + self.epsilon
        if self.use_vnorm:
            scores = scores * slots.values.float().norm(dim=-1)
        return scores.masked_fill(~counted, torch.inf)

    def _mean_rotation(self, rotary: Rotary, context: LayerContext) -> Tensor:
        """``[D, D]`` float64, the mean of the rotations to the next ``n_future`` positions."""
        ahead = torch.arange(self.n_future, dtype=torch.float64, device=context.device)
        # The mean rotation is linear: column by column it is that of the unit vectors.
        unit = torch.eye(context.dim, dtype=torch.float64, device=context.device)
        mean_rotation = torch.zeros_like(unit)
        for block in ahead.split(64):
            mean_rotation += rotary.rotate(unit[:, None], block).sum(dim=1).mT / self.n_future
        return mean_rotation


def _with_more(state: Mapping[str, Tensor], queries: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """Count, mean and covariance once queries are added to those that they are of.

    Args:
        state: ``[B, H, G, ...]`` by name.
        queries: ``[B, H, G, L, D]`` float32.
        counted: ``[B, H, G, L]`` bool, those that count.
    """
    count, mean = state["count"], state["mean"]
    more, counted = counted.sum(dim=-1), counted.unsqueeze(-1)
    number = more.clamp(min=1)[..., None]
    # What does not count may be no number at all.
    own_mean = torch.where(counted, queries, 0.0).sum(dim=-2) / number
    share = (more / (count + more).clamp(min=1))[..., None]
    shift = own_mean - mean
    result = {"count": count + more, "mean": mean + share * shift}
    if "covariance" in state:
        # About their own mean: the squares of large means would cancel.
        centred = torch.where(counted, queries - own_mean.unsqueeze(-2), 0.0)
        own = centred.mT @ centred / number[..., None]
        between = shift.unsqueeze(-1) * shift.unsqueeze(-2)
        covariance, share = state["covariance"], share[..., None]
        result["covariance"] = (
            covariance + share * (own - covariance) + share * (1 - share) * between
        )
    return result
