"""The attention that the next queries are expected to pay, times the value."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressed_cache.ops.attention import masked_softmax
from compressed_cache.ops.rotary import Rotary, rotary_of
from compressed_cache.policies.base import Defaults, Needs, usual_interval
from compressed_cache.policies.methods.calibrated import Calibrated
from compressed_cache.policies.view import LayerContext, Slots


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Calibrated):
    """Keeps what a random query would attend to over the next ``n_future`` positions.

    Expected Attention (https://arxiv.org/abs/2510.00636): queries before RoPE are taken as normally
    distributed and turned by the mean rotation over the positions to come; the expected attention
    of a key is the softmax over the mean logit plus half its variance, averaged over the query
    heads that share the key, and counts times the length of the value. The first ``n_sinks``
    tokens are always kept and take no part in the softmax.

    Differs in three points: mean and covariance are those of a calibration text, as in kvpress'
    variant with statistics (the paper takes them from the prompt); the score is taken again at
    every ranking while decoding, from the position reached (the paper cuts prompts); and logits
    are scaled as the model scales them (the paper's are divided by the root of the dimension).
    """

    name: ClassVar[str] = "expected_attention"
    n_future: int = 512
    """Positions ahead that the rotation is averaged over, >= 1 (the paper's 512)."""
    n_sinks: int = 4
    """First tokens of the text that are always kept, >= 0 (the paper's 4)."""
    use_covariance: bool = True
    """Whether the variance of the logits counts."""
    use_vnorm: bool = True
    """Whether the length of the value counts."""
    epsilon: float = 0.0
    """Added to the attention before it is multiplied, >= 0: larger ones give values more weight
    (the paper's 0; 0.02 where budgets differ between heads)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_future < 1:
            raise ValueError(f"n_future must be >= 1, got {self.n_future}")
        if self.n_sinks < 0:
            raise ValueError(f"n_sinks must be >= 0, got {self.n_sinks}")
        if not 0 <= self.epsilon < float("inf"):
            raise ValueError(f"epsilon must be >= 0, got {self.epsilon}")

    @property
    def needs(self) -> Needs:
        model = "rotary position embedding", "calibration"
        return Needs(values=True, model=model)

    def defaults(self, budget: int) -> Defaults:
        sinks = min(self.n_sinks, budget // 2)
        return Defaults(interval=usual_interval(budget), sinks=sinks)

    def constants(self, context: LayerContext) -> dict[str, Tensor]:
        statistics = self.statistics(context)
        rotary = rotary_of(context.config, context.module, context.layer, context.dim)
        ahead = torch.arange(self.n_future, dtype=torch.float64, device=context.device)
        # The mean rotation is linear: column by column it is that of the unit vectors.
        unit = torch.eye(context.dim, dtype=torch.float64, device=context.device)
        mean_rotation = torch.zeros_like(unit)
        for block in ahead.split(64):
            mean_rotation += rotary.rotate(unit[:, None], block).sum(dim=1).mT / self.n_future
        mean, covariance = (statistics[name].double() for name in ("mean", "covariance"))
        return {
            "mean": (mean @ mean_rotation.mT).float(),
            "covariance": (mean_rotation @ covariance @ mean_rotation.mT).float(),
            **rotary.constants(),
        }

    def scores(self, slots: Slots) -> Tensor:
        constants, scaling = slots.constants, slots.transform.scaling
        rotary = Rotary.among(constants)
        # Turning the keys back to where the position ahead is 0 leaves the statistics constant.
        keys = rotary.rotate(slots.keys, -slots.next_position[:, None, None]).float()[:, :, None]
        logits = scaling * (keys @ constants["mean"].unsqueeze(-1)).squeeze(-1)
        if self.use_covariance:
            variance = ((keys @ constants["covariance"]) * keys).sum(dim=-1)
            logits = logits + scaling**2 / 2 * variance
        counted = slots.positions >= self.n_sinks
        scores = masked_softmax(logits, counted[:, :, None]).mean(dim=2) + self.epsilon
        if self.use_vnorm:
            scores = scores * slots.values.float().norm(dim=-1)
        return scores.masked_fill(~counted, torch.inf)
