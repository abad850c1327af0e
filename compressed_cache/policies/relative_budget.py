"""A budget that is a share of the prompt, known once the prompt is."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

from compressed_cache.policies.base import Policy
from compressed_cache.policies.capabilities import find_store
from compressed_cache.policies.eviction_config import EvictionConfig
from compressed_cache.wording import shown

UNKNOWN = sys.maxsize
"""A budget before there is a prompt, with room for whatever is protected."""


@dataclass(frozen=True)
class RelativeBudget:
    """What a cache is told in place of a number of slots.

    Raises:
        TypeError: a ratio that is no number.
        ValueError: one below 0 or not below 1.
    """

    ratio: float
    """Share of the prompt's tokens that goes."""
    resolve: Callable[..., EvictionConfig]
    """Makes everything else that a cache is told of a ``budget``."""

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    def of(self, tokens: int) -> EvictionConfig:
        """What a cache goes by with a prompt of so many tokens.

        Raises:
            ValueError: no room for what is protected.
        """
        try:
            return self.resolve(budget=slots_kept(self.ratio, tokens))
        except ValueError as error:
            raise ValueError(
                f"compression_ratio={self.ratio} of a prompt of {tokens} tokens: {error}"
            ) from None


def relative_budget(
    policy: Policy, ratio: float | None, budget: object, resolve: Callable[..., EvictionConfig]
) -> RelativeBudget | None:
    """What stands for ``compression_ratio``, None where there is none.

    Raises:
        ValueError: a budget, too, or a policy whose budget is no share of the prompt.
    """
    if ratio is None:
        return None
    if find_store(policy) == "offloaded":
        raise ValueError(
            f"compression_ratio must be given as budget with {policy.label!r}, where that is what "
            "each step fetches"
        )
    if budget is not None:
        raise ValueError(
            "compression_ratio and budget must not both be given. Leave one of them out."
        )
    return RelativeBudget(ratio, resolve)


def check_ratio(ratio: object) -> None:
    """Raises unless it is a number from 0 to below 1."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise TypeError(f"compression_ratio must be a float, got {shown(ratio)}")
    if not 0 <= ratio < 1:
        raise ValueError(f"compression_ratio must be from 0 to below 1, got {ratio}")


def slots_kept(ratio: float, tokens: int) -> int:
    """Slots for a prompt of so many tokens, rounded as kvpress does; at least one."""
    return max(1, int(tokens * (1 - ratio)))
