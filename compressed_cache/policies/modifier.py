"""A policy made of another one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from compressed_cache.policies.base import Defaults, Laziness, Policy, Rows, Site, Slots

_TRAITS = (
    "observes_attention",
    "mixes_heads",
    "mixes_scores",
    "prompt_queries",
    "revises",
    "scores_attention",
    "contiguous",
    "prunes_channels",
    "merges",
    "shares_budget",
    "layout",
)


@dataclass(frozen=True, kw_only=True)
class Modifier(Policy):
    """Changes what another policy says, or what the cache does with it.

    Written behind the other policy, ``"snapkv+chunkkv"``, or around it,
    ``ChunkKV(base=SnapKV())``. What a modifier does not say itself, its base says.

    Raises:
        TypeError: a base that is not a policy, or a field of the wrong type.
        ValueError: a base that evicts nothing, that has the same modifier already, or that decides
            for all heads at once where this one would not, or parts of which one needs the channels
            of keys that another leaves out.
    """

    base: Policy
    """The policy that is modified."""
    own_notes: ClassVar[int] = 0
    """Numbers that the modifier itself writes down of each token, behind those of its base."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.base, Policy):
            raise TypeError(
                f"base must be a Policy, got {self.base!r} ({type(self.base).__name__})"
            )
        if not self.base.evicts:
            raise ValueError(
                f"{self.name} changes which tokens are evicted, and {self.base.label} evicts none"
            )
        if type(self) in [type(part) for part in self.base.parts]:
            raise ValueError(f"{self.name} must be given once, got {self.label!r}")
        is_mixed = type(self).mixes_scores or type(self).scores is Modifier.scores
        if (self.base.mixes_scores or self.base.mixes_heads) and not is_mixed:
            raise ValueError(
                f"{self.name} scores each head on its own, and {self.base.label!r} decides for all "
                f"heads at once. Write {self.name!r} before the modifier that does so, or use "
                "another policy."
            )
        for trait in _TRAITS:
            if getattr(type(self), trait) == getattr(Policy, trait):
                object.__setattr__(self, trait, getattr(self.base, trait))
        if self.prompt_block is not None and self.layout != "slots":
            raise ValueError(
                f"{self.label!r} ranks blocks of a prompt on their own, and slots are shared out "
                "by scores of the whole prompt. Leave one of the two out."
            )
        plain = Policy.constants, Modifier.constants
        parts = [part for part in self.parts if part.key_constants]
        bound = [part.name for part in parts if type(part).constants not in plain]
        if self.prunes_channels and bound:
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

    @property
    def num_queries(self) -> int:
        return self.base.num_queries

    @property
    def num_rows(self) -> int:
        return self.base.num_rows

    @property
    def num_notes(self) -> int:
        return self.base.num_notes + self.own_notes

    @property
    def prompt_block(self) -> int | None:
        return self.base.prompt_block

    @property
    def kept_recent(self) -> int:
        return self.base.kept_recent

    @property
    def drops(self) -> bool:
        return self.base.drops

    @property
    def whole_keys(self) -> int:
        return self.base.whole_keys

    def key_channels(self, dim: int) -> int:
        return self.base.key_channels(dim)

    def channel_scores(self, queries: Tensor, keys: Tensor, real: Tensor) -> Tensor:
        return self.base.channel_scores(queries, keys, real)

    @property
    def adds_attention(self) -> bool:
        return self.base.adds_attention

    @property
    def head_floor(self) -> float | None:
        return self.base.head_floor

    def defaults(self, budget: int) -> Defaults:
        return self.base.defaults(budget)

    def budgets(
        self, budget: int, num_heads: int, protected: int, config: Any
    ) -> Sequence[int] | Sequence[Sequence[int]]:
        return self.base.budgets(budget, num_heads, protected, config)

    def laziness(self, budget: int, protected: int) -> Laziness:
        return self.base.laziness(budget, protected)

    def scores(self, slots: Slots) -> Tensor:
        return self.base.scores(self.seen_by_base(slots))

    def dropped(self, slots: Slots, scores: Tensor) -> Tensor:
        return self.base.dropped(self.seen_by_base(slots), scores)

    def accumulate(self, attention: Tensor, rows: Rows) -> Tensor:
        return self.base.accumulate(attention, rows)

    def note(self, tokens: Slots) -> Tensor:
        notes = self.base.note(self.seen_by_base(tokens))
        return torch.cat([notes, self.own_note(tokens)], dim=-1) if self.own_notes else notes

    def own_note(self, tokens: Slots) -> Tensor:
        """As :meth:`note`, ``[B, H, S, own_notes]``."""
        raise NotImplementedError(f"{type(self).__name__} must define own_note(tokens)")

    def revise(self, slots: Slots) -> Tensor:
        own = slots.notes[..., self.base.num_notes :]
        return torch.cat([self.base.revise(self.seen_by_base(slots)), own], dim=-1)

    def merged(
        self, keys: Tensor, values: Tensor, kept: Tensor, evicted: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        return self.base.merged(keys, values, kept, evicted)

    def constants(self, site: Site) -> dict[str, Tensor]:
        return self.base.constants(site)

    def seen_by_base(self, slots: Slots) -> Slots:
        """The same without the notes of the modifier."""
        return slots._replace(notes=slots.notes[..., : self.base.num_notes])
