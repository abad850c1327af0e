"""The last queries vote, and deep layers get fewer slots."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from compressed_cache.policies.budgets import compressed_layers, share_out
from compressed_cache.policies.capabilities import Protected
from compressed_cache.policies.methods.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """Keeps what ``snapkv`` keeps, with a budget that falls linearly from layer to layer.

    PyramidKV, section 4 (https://arxiv.org/abs/2406.02069). Beside what is protected (``sinks`` and
    ``recent``, by default the window), which every layer holds, the last layer has a ``beta``-th of
    the mean number of slots and the first as much more than the mean as the last has less.

    Differs from the authors' code in five points: that of ``snapkv``; budgets are whole numbers
    whose sum is exactly that of a uniform budget (they round the step down); the last layer has
    at least one slot beside what is protected; budgets are the same however short the prompt is,
    unless ``fit_prompt`` says otherwise; and they hold while decoding too.
    """

    name: ClassVar[str] = "pyramidkv"
    beta: int = 20
    """How many times fewer slots than the mean the last layer has (the authors' code has 20)."""
    fit_prompt: bool = False
    """Whether no layer gets more slots than a first prompt fills, as in the authors' code: of one
    below twice the budget, without what is protected, all layers have the same. A prompt that is
    read in chunks counts as far as its first chunk."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise ValueError(f"beta must be >= 1, got {self.beta}")

    def budgets(self, budget: int, num_heads: int, protected: Protected, config: Any) -> list[int]:
        kept = protected.sinks + protected.recent
        return self._falling(budget, kept, len(compressed_layers(config)))

    @property
    def fits_prompt(self) -> bool:
        return self.fit_prompt

    def fitted(
        self, budget: int, protected: Protected, config: Any, prompt_length: int
    ) -> list[int]:
        num_layers, kept = len(compressed_layers(config)), protected.sinks + protected.recent
        if prompt_length < 2 * (budget - kept):
            return [budget] * num_layers
        return self._falling(budget, kept, num_layers, at_most=prompt_length - kept)

    def _falling(
        self, budget: int, protected: int, num_layers: int, at_most: int | None = None
    ) -> list[int]:
        free = budget - protected
        if num_layers == 1 or free <= 1:
            return [budget] * num_layers
        least = max(Fraction(free, self.beta), Fraction(1))
        most = 2 * free - least
        if at_most is not None and most > at_most:
            most, least = Fraction(at_most), Fraction(2 * free - at_most)
        step = (most - least) / (num_layers - 1)
        shares = share_out(num_layers * free, [most - step * depth for depth in range(num_layers)])
        return [protected + share for share in shares]
