"""One policy for the prompt, another while decoding."""

import copy
from dataclasses import dataclass

from torch import Tensor

from compressed_cache.policies.base import Defaults, Policy
from compressed_cache.policies.capabilities import (
    MergesValues,
    PrunesChannels,
    RanksBlocks,
    ReadsTwice,
    Rerotates,
    decides_for_all_heads,
    find,
    find_observer,
    find_store,
    own_view,
)
from compressed_cache.policies.view import Slots

# What a modifier may do in both phases or in none.
_HELD = Rerotates, PrunesChannels, RanksBlocks


@dataclass(frozen=True, kw_only=True)
class PrefillDecode(Policy):
    """Cuts the prompt by one policy and evicts by another while decoding.

    Written ``"snapkv/h2o"``. Options that both have are given to both, and what is protected by
    default is what the second protects.

    Raises:
        TypeError: a part that is not a policy.
        ValueError: a part that evicts nothing, or parts that need different things in one place.
    """

    prompt: Policy
    """Ranks the tokens of prompts."""
    decoding: Policy
    """Ranks them in decode steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        both = self.prompt, self.decoding
        for part in both:
            if not isinstance(part, Policy):
                raise TypeError(f"{part!r} must be a Policy, got a {type(part).__name__}")
            if not part.evicts:
                raise ValueError(
                    f"{self.label!r} must evict in both phases, {part.label} never does"
                )
            if any(find(part, kind) for kind in _HELD) or find_store(part) != "slots":
                raise ValueError(
                    f"{part.label!r} changes what is held in both phases. Put its last part around "
                    "the two."
                )
        if any(find(part, ReadsTwice) for part in both):
            raise ValueError(
                f"{self.label!r} cannot be used: what a second pass over a prompt tells is kept "
                "for both phases. Use the policy that reads twice alone."
            )
        if any(one is other for one in self.prompt.parts for other in self.decoding.parts):
            # Each phase has notes of its own, so each part must be told from all others.
            object.__setattr__(self, "decoding", copy.deepcopy(self.decoding))
            both = self.prompt, self.decoding
        observers = [one for part in both if (one := find_observer(part)) is not None]
        if len({type(one) for one in observers}) > 1:
            raise ValueError(
                f"{self.label!r} would add up attention in two ways. Only one of the two may "
                "be a policy that observes attention."
            )
        if len({decides_for_all_heads(part) for part in both}) > 1:
            raise ValueError(
                f"{self.label!r} would keep other tokens in each head in one phase and the same in "
                "all heads in the other. Both must do the one or the other."
            )
        if any(find(part, MergesValues) for part in both):
            raise ValueError(f"{self.label!r} must merge in both phases: write 'merging' after it.")
        shared = dict(self.prompt.options)
        for name, value in self.decoding.options.items():
            if shared.setdefault(name, value) != value:
                raise ValueError(
                    f"{name} must be the same in both parts of {self.label!r}, got "
                    f"{shared[name]!r} and {value!r}"
                )

    @property
    def label(self) -> str:
        return f"{self.prompt.label}/{self.decoding.label}"

    @property
    def parts(self) -> tuple[Policy, ...]:
        return *self.prompt.parts, *self.decoding.parts

    def active(self, is_prompt: bool) -> tuple[Policy, ...]:
        return (self.prompt if is_prompt else self.decoding).active(is_prompt)

    def defaults(self, budget: int) -> Defaults:
        return self.decoding.defaults(budget)

    def scores(self, slots: Slots) -> Tensor:
        part = self.prompt if slots.is_prompt else self.decoding
        return part.scores(own_view(self, part, slots))
