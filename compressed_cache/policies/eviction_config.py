"""The arguments of a cache once checked and resolved."""

from dataclasses import dataclass
from typing import Any

from compressed_cache.policies import Policy
from compressed_cache.policies.budgets import Budget, all_slots, is_per_head, to_budget


@dataclass(frozen=True)
class Rules:
    """How many slots, how often they are ranked, and which tokens are never evicted."""

    budget: Budget
    interval: int
    sinks: int
    recent: int
    protect_prompt: bool


def resolve_rules(
    policy: Policy,
    *,
    budget: Any,
    interval: int | None,
    sinks: int | None,
    recent: int | None,
    protect_prompt: bool | None,
) -> Rules:
    """Checks the arguments of ``CompressedCache`` and fills in the policy's defaults.

    A default yields where the budget leaves no room for it; a value that was given never does.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, or a budget too small for what is protected.
    """
    budget = to_budget(budget)
    for name, value in (("interval", interval), ("sinks", sinks), ("recent", recent)):
        if value is not None:
            _check_int(name, value, least=1 if name == "interval" else 0)
    if protect_prompt is not None and not isinstance(protect_prompt, bool):
        raise TypeError(f"protect_prompt must be a bool, got {_shown(protect_prompt)}")

    slots = all_slots(budget)
    smallest = min(slots)
    defaults = policy.defaults(sum(slots) // len(slots))
    kept = policy.kept_recent
    room = smallest - (sinks or 0) - max(recent or 0, kept) - 1
    if sinks is None:
        sinks = max(0, min(defaults.sinks, room))
        room -= sinks
    if recent is None:
        recent = max(kept, min(defaults.recent, kept + room))
    recent = max(recent, kept)
    if interval is None:
        interval = defaults.interval
    if protect_prompt is None:
        protect_prompt = defaults.protect_prompt

    least = sinks + recent + 1
    if policy.evicts and smallest < least:
        # A policy that always keeps its window sets recent by it.
        largest = "sinks" if sinks > recent else "window" if recent == kept else "recent"
        raise ValueError(
            f"budget must be at least sinks + recent + 1 ({sinks} + {recent} + 1 = {least}), got "
            f"{smallest}. Raise budget or lower {largest}."
        )
    if policy.shares_budget and not isinstance(budget, int):
        raise ValueError(
            f"budget must be one number with {policy.label!r}, which shares it out among layers or "
            f"heads, got {list(budget)}"
        )
    if policy.head_floor is not None and is_per_head(budget):
        raise ValueError(
            f"budget must be one number, or one for each layer, with {policy.label!r}, which "
            f"shares the slots of a layer among its heads, got {budget}"
        )
    is_pool = policy.layout == "pool" or is_per_head(budget)
    if is_pool and policy.merges:
        raise ValueError(
            f"{policy.label!r} merges tokens in slots of one head, so heads cannot have budgets of "
            "their own. Use one budget for each layer, or do without 'merging'."
        )
    alike = policy.mixes_heads or policy.mixes_scores
    alike = alike or policy.contiguous or policy.prunes_channels
    if is_pool and (alike or policy.layout not in ("slots", "pool")):
        raise ValueError(
            f"{policy.label!r} treats all heads of a layer alike, so they cannot have budgets of "
            "their own. Use another policy, or one budget for each layer."
        )
    rules = Rules(budget, interval, sinks, recent, protect_prompt)
    if policy.layout == "offloaded" and rules != Rules(budget, 1, 0, 0, False):
        raise ValueError(
            f"interval, sinks, recent and protect_prompt must be left alone with {policy.name!r}, "
            f"which evicts nothing, got {rules}. Raise budget to fetch more in each step."
        )
    return rules


def _check_int(name: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int >= {least}, got {_shown(value)}")
    if value < least:
        raise ValueError(f"{name} must be an int >= {least}, got {value}")


def _shown(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"
