"""A policy made of another one."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compressed_cache.policies.base import Defaults, Policy
from compressed_cache.policies.capabilities import (
    PrunesChannels,
    RanksBlocks,
    ReadsTwice,
    SharesSlots,
    decides_for_all_heads,
    find,
    find_store,
    own_view,
)
from compressed_cache.policies.view import Slots
from compressed_cache.wording import shown


@dataclass(frozen=True, kw_only=True)
class Modifier(Policy):
    """Changes what another policy says, or what the cache does with it.

    Written after the other policy, ``"snapkv+chunkkv"``, or around it,
    ``ChunkKV(base=SnapKV())``. It overrides :meth:`scores`, or has a capability; everything else is
    looked up in its base.

    Raises:
        TypeError: a base that is not a policy, or a field of the wrong type.
        ValueError: a base that evicts nothing, that has the same modifier already, or that decides
            for all heads at once where this one would not, or parts of which one needs what another
            leaves out: channels of keys, or a number of tokens to keep.
    """

    scores_attention: ClassVar[bool] = True
    """Whether scores are still attention, if those of the base are. A class that defines ``scores``
    must say so; left out, they are not."""
    base: Policy
    """The policy that is modified."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "scores" in vars(cls) and "scores_attention" not in vars(cls):
            cls.scores_attention = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.base, Policy):
            raise TypeError(f"base must be a Policy, got {shown(self.base)}")
        if not self.base.evicts:
            raise ValueError(
                f"{self.name} changes which tokens are evicted, and {self.base.label} evicts none"
            )
        if type(self) in [type(part) for part in self.base.parts]:
            raise ValueError(f"{self.name} must be given once, got {self.label!r}")
        keeps_scores = type(self).scores is Modifier.scores
        is_alike = self.same_for_all_heads or keeps_scores
        if decides_for_all_heads(self.base) and not is_alike:
            policies = [part for part in self.base.parts if not isinstance(part, Modifier)]
            hint = "Use another policy."
            if not any(decides_for_all_heads(part) for part in policies):
                hint = (
                    f"Write {self.name!r} before the modifier that does so, or use another policy."
                )
            raise ValueError(
                f"{self.name} scores each head on its own, and {self.base.label!r} decides for all "
                f"heads at once. {hint}"
            )
        if find(self, RanksBlocks) and find_store(self) != "slots":
            raise ValueError(
                f"{self.label!r} ranks blocks of a prompt on their own, and slots are shared out "
                "by scores of the whole prompt. Leave one of the two out."
            )
        counting = [part.name for part in self.parts if part.needs.kept_count]
        if counting and (find(self, RanksBlocks) or find(self, SharesSlots)):
            raise ValueError(
                f"{counting[0]} must know how many tokens a head keeps, and in {self.label!r} that "
                "is told by scores or by the length of a block. Leave one of the two out."
            )
        if find(self.base, ReadsTwice) and not isinstance(self, SharesSlots):
            raise ValueError(
                f"{self.name} cannot be written after {self.base.label!r}, whose scores are of a "
                "second pass over the prompt. Only 'adakv' can."
            )
        bound = [part.name for part in self.parts if _needs_whole_keys(part)]
        if find(self, PrunesChannels) and bound:
            raise ValueError(
                f"{self.label!r} leaves out channels of keys, and {bound[0]} knows them all by "
                "their place. Use one of the two."
            )

    @property
    def label(self) -> str:
        return f"{self.base.label}+{super().label}"

    @property
    def parts(self) -> tuple[Policy, ...]:
        return *self.base.parts, self

    def active(self, is_prompt: bool) -> tuple[Policy, ...]:
        return *self.base.active(is_prompt), self

    def defaults(self, budget: int) -> Defaults:
        return self.base.defaults(budget)

    def scores(self, slots: Slots) -> Tensor:
        return self.base.scores(own_view(self, self.base, slots))


def _needs_whole_keys(part: Policy) -> bool:
    needed = part.needs.whole_keys
    return type(part).constants is not Policy.constants if needed is None else needed
