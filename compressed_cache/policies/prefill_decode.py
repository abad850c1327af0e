"""One policy for the prompt, another while decoding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressed_cache.policies.base import Defaults, Policy, Rows, Site, Slots


@dataclass(frozen=True, kw_only=True)
class InPhases(Policy):
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
            if part.contiguous or part.prunes_channels:
                raise ValueError(
                    f"{part.label!r} changes what is held in both phases. Put its last part around "
                    "the two."
                )
        observing = [part for part in both if part.observes_attention]
        if len({type(part) for part in observing}) > 1:
            raise ValueError(
                f"{self.label!r} would add up attention in two ways. One of the two may be a "
                "policy that observes attention."
            )
        if len({part.mixes_heads or part.mixes_scores for part in both}) > 1:
            raise ValueError(
                f"{self.label!r} would keep other tokens in each head in one phase and the same in "
                "all heads in the other. Both must do the one or the other."
            )
        if any(part.merges for part in both):
            raise ValueError(
                f"{self.label!r} must merge in both phases: write 'merging' behind it."
            )
        shared = dict(self.prompt.options)
        for name, value in self.decoding.options.items():
            if shared.setdefault(name, value) != value:
                raise ValueError(
                    f"{name} must be the same in both parts of {self.label!r}, got "
                    f"{shared[name]!r} and {value!r}"
                )
        self._take("observes_attention", bool(observing))
        self._take("mixes_heads", self._observer.mixes_heads)
        self._take("mixes_scores", any(part.mixes_scores for part in both))
        self._take("prompt_queries", observing[-1].prompt_queries if observing else None)
        self._take("revises", any(part.revises for part in both))
        self._take("shares_budget", any(part.shares_budget for part in both))
        self._take("scores_attention", all(part.scores_attention for part in both))

    def _take(self, trait: str, value: object) -> None:
        object.__setattr__(self, trait, value)

    @property
    def label(self) -> str:
        return f"{self.prompt.label}/{self.decoding.label}"

    @property
    def parts(self) -> tuple[Policy, ...]:
        return *self.prompt.parts, *self.decoding.parts

    @property
    def _observer(self) -> Policy:
        return self.decoding if self.decoding.observes_attention else self.prompt

    @property
    def num_queries(self) -> int:
        return max(self.prompt.num_queries, self.decoding.num_queries)

    @property
    def num_rows(self) -> int:
        return self._observer.num_rows

    @property
    def num_notes(self) -> int:
        return self.prompt.num_notes + self.decoding.num_notes

    @property
    def kept_recent(self) -> int:
        return max(self.prompt.kept_recent, self.decoding.kept_recent)

    @property
    def drops(self) -> bool:
        return self.decoding.drops

    @property
    def adds_attention(self) -> bool:
        return self._observer.adds_attention

    def defaults(self, budget: int) -> Defaults:
        return self.decoding.defaults(budget)

    def budgets(
        self, budget: int, num_heads: int, protected: int, config: Any
    ) -> Sequence[int] | Sequence[Sequence[int]]:
        sharer = self.prompt if self.prompt.shares_budget else self.decoding
        return sharer.budgets(budget, num_heads, protected, config)

    def scores(self, slots: Slots) -> Tensor:
        part = self.prompt if slots.is_prompt else self.decoding
        return part.scores(self._seen_by(part, slots))

    def dropped(self, slots: Slots, scores: Tensor) -> Tensor:
        return self.decoding.dropped(self._seen_by(self.decoding, slots), scores)

    def accumulate(self, attention: Tensor, rows: Rows) -> Tensor:
        return self._observer.accumulate(attention, rows)

    def note(self, tokens: Slots) -> Tensor:
        both = self.prompt, self.decoding
        return torch.cat([part.note(self._seen_by(part, tokens)) for part in both], dim=-1)

    def revise(self, slots: Slots) -> Tensor:
        first = self._seen_by(self.prompt, slots)
        second = self._seen_by(self.decoding, slots)
        if slots.is_prompt:
            return torch.cat([self.prompt.revise(first), second.notes], dim=-1)
        return torch.cat([first.notes, self.decoding.revise(second)], dim=-1)

    def constants(self, site: Site) -> dict[str, Tensor]:
        return self.prompt.constants(site) | self.decoding.constants(site)

    def _seen_by(self, part: Policy, slots: Slots) -> Slots:
        """What a part would see on its own."""
        first = 0 if part is self.prompt else self.prompt.num_notes
        notes = slots.notes[..., first : first + part.num_notes]
        queries, positions = slots.queries, slots.query_positions
        if part.num_queries < self.num_queries:
            newest = positions.argsort(dim=1, descending=True)[:, : part.num_queries]
            index = newest[:, None, None, :, None]
            queries = queries.gather(3, index.expand(*queries.shape[:3], -1, queries.shape[4]))
            positions = positions.gather(1, newest)
        return slots._replace(notes=notes, queries=queries, query_positions=positions)
