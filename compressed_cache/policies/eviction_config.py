"""The arguments of a cache once checked and resolved."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressed_cache.policies.base import Policy
from compressed_cache.policies.budgets import (
    Budget,
    all_slots,
    compressed_layers,
    is_per_head,
    to_budget,
)
from compressed_cache.policies.capabilities import (
    MergesValues,
    Protected,
    PrunesChannels,
    Rerotates,
    SharesBudget,
    SharesSlots,
    decides_for_all_heads,
    find,
    find_store,
    needs_of,
)
from compressed_cache.policies.fields import whole_number
from compressed_cache.wording import shown

ARGUMENTS = ("budget", "interval", "sinks", "recent", "protect_prompt")
"""Those of ``CompressedCache`` that a config is made of."""


@dataclass(frozen=True)
class EvictionConfig:
    """How many slots, how often they are ranked, and which tokens are never evicted."""

    budget: Budget
    interval: int
    sinks: int
    recent: int
    protect_prompt: bool
    prompt_yields: bool = False
    """Whether a prompt that does not fit is protected as far as :meth:`protected` says, and not
    refused: where protection is the policy's default."""

    least_recent: int = 0
    """How many recent tokens stay whatever room a protected prompt leaves: all where ``recent`` was
    given, and what the policy cannot do without where it is a default."""

    def __repr__(self) -> str:
        own = {name: repr(value) for name, value in self._values.items()}
        if self.recent > self.least_recent:
            own["recent"] += " by default"
        if self.prompt_yields:
            own["protect_prompt"] += " by default"
        return f"EvictionConfig({', '.join(f'{name}={value}' for name, value in own.items())})"

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of ``CompressedCache`` that stand for this."""
        own = self._values
        if self.recent > self.least_recent:
            own["recent"] = None
        if self.prompt_yields:
            own["protect_prompt"] = None
        return own

    @property
    def least(self) -> Protected:
        """What each head keeps, whatever its prompt."""
        return Protected(self.sinks, self.recent, self.least_recent)

    def described(self) -> dict[str, Any]:
        """The same by what they mean, for readers."""
        return self._values | ({"prompt_yields": True} if self.prompt_yields else {})

    @property
    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ARGUMENTS}

    def protected(self, prompts: Tensor, budget: int) -> Tensor:
        """How many positions of prompts of these lengths ``[B]`` are never evicted, ``[B]``.

        Args:
            prompts: int64.
            budget: slots of a head.
        """
        if not self.protect_prompt:
            return torch.full_like(prompts, self.sinks)
        if not self.prompt_yields:
            return prompts.clamp(min=self.sinks)
        fits = prompts + self.recent < budget
        half = min(budget // 2, budget - self.least_recent - 1)
        return torch.where(fits, prompts, half).clamp(min=self.sinks)


def resolve_eviction(
    policy: Policy,
    *,
    budget: Any,
    interval: int | None,
    sinks: int | None,
    recent: int | None,
    protect_prompt: bool | None,
) -> EvictionConfig:
    """Checks the arguments of ``CompressedCache`` and fills in the policy's defaults.

    A default yields where the budget leaves no room for it; a value that was given never does.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, or a budget too small for what is protected.
    """
    budget = to_budget(budget)
    interval = _to_int("interval", interval, least=1)
    sinks = _to_int("sinks", sinks, least=0)
    recent = _to_int("recent", recent, least=0)
    if protect_prompt is not None and not isinstance(protect_prompt, bool):
        raise TypeError(f"protect_prompt must be a bool, got {shown(protect_prompt)}")

    slots = all_slots(budget)
    smallest = min(slots)
    defaults = policy.defaults(sum(slots) // len(slots))
    kept = needs_of(policy).recent
    least_recent = max(recent or 0, kept)
    room = smallest - (sinks or 0) - least_recent - 1
    if sinks is None:
        sinks = max(0, min(defaults.sinks, room))
        room -= sinks
    if recent is None:
        recent = max(kept, min(defaults.recent, kept + room))
    recent = max(recent, kept)
    if interval is None:
        interval = defaults.interval
    prompt_yields = protect_prompt is None and defaults.protect_prompt
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
    if find(policy, SharesBudget) and not isinstance(budget, int):
        raise ValueError(
            f"budget must be one number with {policy.label!r}, which shares it out among layers or "
            f"heads, got {list(budget)}"
        )
    if find(policy, SharesSlots) and is_per_head(budget):
        raise ValueError(
            f"budget must be one number, or one for each layer, with {policy.label!r}, which "
            f"shares the slots of a layer among its heads, got {budget}"
        )
    store = find_store(policy)
    is_pool = store == "pool" or is_per_head(budget)
    if is_pool and find(policy, MergesValues):
        raise ValueError(
            f"{policy.label!r} merges tokens in slots of one head, so heads cannot have budgets of "
            "their own. Use one budget for each layer, or do without 'merging'."
        )
    alike = decides_for_all_heads(policy)
    alike = alike or find(policy, Rerotates) or find(policy, PrunesChannels)
    if is_pool and (alike or store not in ("slots", "pool")):
        raise ValueError(
            f"{policy.label!r} treats all heads of a layer alike, so they cannot have budgets of "
            "their own. Use another policy, or one budget for each layer."
        )
    config = EvictionConfig(
        budget, interval, sinks, recent, protect_prompt, prompt_yields, least_recent
    )
    if store == "offloaded" and (interval, sinks, recent, protect_prompt) != (1, 0, 0, False):
        raise ValueError(
            f"interval, sinks, recent and protect_prompt must be left alone with {policy.name!r}, "
            f"which evicts nothing, got {config}. Raise budget to fetch more in each step."
        )
    return config


def share_budget(
    eviction: EvictionConfig, policy: Policy, model: Any
) -> dict[int, int | tuple[int, ...]]:
    """Slots of each layer of full attention: one number, or one for each of its heads.

    Args:
        eviction: of the cache.
        policy: may share out a single number.
        model: the model's text config.

    Raises:
        ValueError: a budget for another number of layers or heads.
    """
    layers = compressed_layers(model)
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    budget: Budget = eviction.budget
    if isinstance(budget, int):
        sharing = find(policy, SharesBudget)
        budget = (
            (budget,) * len(layers)
            if sharing is None
            else to_budget(sharing.budgets(budget, heads, eviction.least, model))
        )
    assert not isinstance(budget, int)
    if len(budget) != len(layers):
        raise ValueError(
            f"budget must have one entry for each of the {len(layers)} layers of the model with "
            f"full attention, got {len(budget)}"
        )
    for layer, share in zip(layers, budget, strict=True):
        if not isinstance(share, int) and len(share) != heads:
            raise ValueError(
                f"budget must have one entry for each of the {heads} key/value heads of layer "
                f"{layer}, got {len(share)}"
            )
    return dict(zip(layers, budget, strict=True))


def _to_int(name: str, value: Any, *, least: int) -> int | None:
    if value is None:
        return None
    number = whole_number(value)
    if number is None:
        raise TypeError(f"{name} must be an int >= {least}, got {shown(value)}")
    if number < least:
        raise ValueError(f"{name} must be an int >= {least}, got {number}")
    return number
