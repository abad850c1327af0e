"""What only some policies do, each thing a protocol that is looked up where it is used.

Whoever has the methods has the capability; where it takes more, the protocol says so. A policy may
be made of parts, and each part is shown what it would be shown on its own.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from compressed_cache.policies.base import Needs, Policy
from compressed_cache.policies.view import Slots

Capability = TypeVar("Capability")


@runtime_checkable
class WritesNotes(Protocol):
    """Writes down numbers of each token as it comes in, as many as it ``needs.notes``."""

    def note(self, tokens: Slots) -> Tensor:
        """The notes of new tokens.

        Args:
            tokens: the new ones alone, with ``S`` their number; their own notes and attention are
                without slots, and what else is known of the layer is as before they came.

        Returns:
            ``[B, H, S, N]`` float32, ``N`` what it ``needs.notes``.
        """
        ...


@runtime_checkable
class RevisesNotes(Protocol):
    """Changes the notes of all tokens at each ranking that evicts some of them."""

    def revise(self, slots: Slots) -> Tensor:
        """New notes.

        Args:
            slots: what is ranked; of a modifier only its own notes.

        Returns:
            ``[B, H, S, N]`` float32.
        """
        ...


@runtime_checkable
class DropsTokens(Protocol):
    """Empties slots at a ranking of a decode step, however many tokens there is room for."""

    @property
    def drops(self) -> bool:
        """Whether it does, with these options."""
        ...

    def dropped(self, slots: Slots, scores: Tensor) -> Tensor:
        """Tokens whose slots are empty from this ranking on.

        Args:
            slots: what is held.
            scores: ``[B, H, S]`` float32, those of the policy with protection applied.

        Returns:
            ``[B, H, S]`` bool; at protected and empty slots it is ignored.
        """
        ...


@runtime_checkable
class ObservesQueries(Protocol):
    """Keeps what it makes of the queries of the first prompt, of each row and query head."""

    def query_state_shapes(self, dim: int) -> Mapping[str, tuple[int, ...]]:
        """By name the shapes after ``[B, H, G]`` of what is kept, ``D = dim``; empty: nothing."""
        ...

    def observe_queries(
        self,
        state: Mapping[str, Tensor],
        queries: Tensor,
        positions: Tensor,
        constants: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        """What is kept once more queries of the prompt arrive, before these tokens are ranked.

        Args:
            state: ``[B, H, G, ...]`` float32 by name, so far; zeros before the first queries.
            queries: ``[B, H, G, L, D]`` after RoPE.
            positions: ``[B, L]`` int64, ``-1`` at padding.
            constants: what ``Policy.constants`` gave for this layer.

        Returns:
            The new state, of the same names and shapes.
        """
        ...


@runtime_checkable
class MergesValues(Protocol):
    """Changes the values of kept tokens when others are evicted."""

    def merged(
        self, keys: Tensor, values: Tensor, kept: Tensor, evicted: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """New values of the kept tokens, once it is known which others go.

        Args:
            keys: ``[B, H, S, D]``.
            values: ``[B, H, S, D]``.
            kept: ``[B, H, S]`` bool, where there is a token that stays.
            evicted: the same three of tokens of which those marked go, ``[B, H, E, ...]``.

        Returns:
            ``[B, H, S, D]`` in the dtype of ``values``.
        """
        ...


@runtime_checkable
class PrunesChannels(Protocol):
    """Keeps only some channels of each key; policies see no others, once the first prompt was
    ranked."""

    @property
    def recent_whole_keys(self) -> int:
        """How many of the last tokens keep all channels."""
        ...

    def key_channels(self, dim: int) -> int:
        """``D'``, how many of ``dim`` channels stay."""
        ...

    def channel_scores(self, queries: Tensor, real: Tensor, keys: Tensor, kept: Tensor) -> Tensor:
        """How much each channel deserves to stay; asked once, when the first prompt was ranked.

        Args:
            queries: ``[B, H, G, L, D]``.
            real: ``[B, L]`` bool, ``False`` at padding, which is on the left.
            keys: ``[B, H, L, D]``.
            kept: ``[B, H, L]`` bool, ``False`` at padding and where a token is evicted.

        Returns:
            ``[B, H, D]`` float32.
        """
        ...


@runtime_checkable
class Rerotates(Protocol):
    """Held tokens are attended as if they followed one another, see
    :mod:`compressed_cache.ops.rerotation`; its constants are those of the rotary embedding."""

    @property
    def rerotates(self) -> bool:
        """Whether they are."""
        ...


@runtime_checkable
class RanksBlocks(Protocol):
    """Ranks each block of a first prompt on its own."""

    @property
    def prompt_block(self) -> int:
        """Positions of a block."""
        ...


class Protected(NamedTuple):
    """How many tokens of each head are never evicted."""

    sinks: int
    """First ones."""
    recent: int
    """Last ones."""
    least_recent: int
    """Last ones where ``recent`` is a default, which yields; else as many."""


@runtime_checkable
class SharesBudget(Protocol):
    """Shares out the slots of a model among its layers or heads."""

    def budgets(
        self, budget: int, num_heads: int, protected: Protected, config: Any
    ) -> Sequence[int] | Sequence[Sequence[int]]:
        """As many slots in all as with ``budget`` everywhere.

        Args:
            budget: slots of a head on average.
            num_heads: ``H`` of the whole layer.
            protected: what each head keeps; ``sinks + recent`` is below ``budget``.
            config: the model's text config.

        Returns:
            Slots of every head, or of each head, of each of the
            :func:`~compressed_cache.policies.budgets.compressed_layers`; all more than
            ``sinks + least_recent``.
        """
        ...


@runtime_checkable
class FitsPrompt(Protocol):
    """Shares out the slots of a model among its layers by the length of the first prompt too."""

    @property
    def fits_prompt(self) -> bool:
        """Whether it does, with these options."""
        ...

    def fitted(
        self, budget: int, protected: Protected, config: Any, prompt_length: int
    ) -> Sequence[int]:
        """What :meth:`SharesBudget.budgets` is for a prompt of ``prompt_length`` tokens."""
        ...


@runtime_checkable
class SharesSlots(Protocol):
    """Slots go to the head with the highest scores; its ``store`` must be ``"pool"``."""

    @property
    def head_floor(self) -> float:
        """The part of the budget that each head keeps."""
        ...


@runtime_checkable
class KeepsFirstTokens(Protocol):
    """Never evicts the first tokens of some heads, beside the ``sinks`` of the cache."""

    def first_tokens(self, budget: int, recent: int, constants: Mapping[str, Tensor]) -> Tensor:
        """How many of each head, ``[H]`` int64.

        Args:
            budget: slots of the head with the fewest.
            recent: last tokens that each head keeps.
            constants: what ``Policy.constants`` gave for this layer.
        """
        ...


class LazyLayerConfig(NamedTuple):
    """When a layer is lazy, and what it keeps then."""

    threshold: float
    """Part of the attention above which it is."""
    queries: int
    """Last queries of the prompt whose attention is looked at."""
    sinks: int
    """First tokens that count and stay."""
    slots: int
    """How many tokens count and stay, the first ones and the last."""


@runtime_checkable
class HasLazyLayers(Protocol):
    """Leaves slots of a layer empty in the rows whose prompt shows that few will do; its ``store``
    must be ``"lazy"``."""

    def lazy_layer(self, budget: int, protected: int) -> LazyLayerConfig:
        """When that is.

        Args:
            budget: slots of a head of the layer.
            protected: how many tokens of each head are never evicted.
        """
        ...


class Repetition(NamedTuple):
    """A part of a context that a model reads once more, after all of it."""

    start: int
    """Position of its first token."""
    stop: int
    """The position after its last one."""
    tokens: list[int]
    """What is read: an instruction, then these tokens again."""


@runtime_checkable
class ReadsTwice(Protocol):
    """Ranks a context by the attention it gets while the model repeats it.

    Its one note of a token is the most that any query of the repetition gave to it, written by
    :func:`compressed_cache.compress`.
    """

    def repetitions(
        self, context: Sequence[int], sinks: int, suffix: str, encode: Callable[[str], list[int]]
    ) -> list[Repetition]:
        """What a model reads after a context, each as if it were the only one.

        Args:
            context: all its tokens.
            sinks: how many of the first are not repeated.
            suffix: what stands between an instruction and an answer.
            encode: gives the tokens of a text.

        Returns:
            Parts that follow one another, of at least two tokens to read.
        """
        ...


def find(policy: Policy, kind: type[Capability]) -> Capability | None:
    """The part of a policy that has a capability, the last of several; None where none has."""
    return next((part for part in reversed(policy.parts) if isinstance(part, kind)), None)


def find_dropping(policy: Policy) -> Any:
    """The part that drops tokens in decode steps, a :class:`DropsTokens`; None where none does."""
    active = policy.active(is_prompt=False)
    return next((part for part in active if isinstance(part, DropsTokens) and part.drops), None)


def find_store(policy: Policy) -> str:
    """Where the tokens of a policy are, see :attr:`Policy.store`."""
    return next((part.store for part in policy.parts if part.store != "slots"), "slots")


def find_observer(policy: Policy) -> Policy | None:
    """The part that is shown the attention; None where none is."""
    return next((part for part in reversed(policy.parts) if part.needs.attention), None)


def scores_attention(policy: Policy) -> bool:
    """Whether scores are attention of the tokens, see :attr:`Policy.scores_attention`."""
    return all(part.scores_attention for part in policy.parts)


def same_for_all_heads(policy: Policy) -> bool:
    """Whether scores are the same for all heads of a layer."""
    return any(part.same_for_all_heads for part in policy.parts)


def decides_for_all_heads(policy: Policy) -> bool:
    """Whether all heads of a layer hold the same tokens."""
    return same_for_all_heads(policy) or needs_of(policy).all_heads


def needs_of(policy: Policy) -> Needs:
    """What all parts of a policy need together."""
    return functools.reduce(Needs.merge, (part.needs for part in policy.parts))


def own_view(policy: Policy, part: Policy, slots: Slots) -> Slots:
    """What a part would be shown on its own: its notes, and as many queries as it needs.

    Args:
        policy: what ``slots`` were made for.
        part: one of its parts, or made of some of them that follow one another.
        slots: any tokens.
    """
    needs, whole = needs_of(part), needs_of(policy)
    if needs.notes != whole.notes:
        first = 0
        for before in policy.parts:
            if before is part.parts[0]:
                break
            first += before.needs.notes
        slots = slots._replace(notes=slots.notes[..., first : first + needs.notes])
    if needs.queries == whole.queries:
        return slots
    newest = slots.query_positions.argsort(dim=1, descending=True)[:, : needs.queries]
    index = newest[:, None, None, :, None]
    queries = slots.queries.gather(
        3, index.expand(*slots.queries.shape[:3], -1, slots.queries.shape[4])
    )
    return slots._replace(queries=queries, query_positions=slots.query_positions.gather(1, newest))


def write_notes(policy: Policy, tokens: Slots) -> Tensor:
    """The notes of new tokens ``[B, H, S, N]`` by all parts."""
    shape = tokens.positions.shape
    notes = [tokens.notes.new_zeros(*shape, 0)]
    for part in policy.parts:
        if isinstance(part, WritesNotes):
            notes.append(part.note(own_view(policy, part, tokens)))
        else:
            notes.append(tokens.notes.new_zeros(*shape, part.needs.notes))
    return torch.cat(notes, dim=-1)


def revise_notes(policy: Policy, slots: Slots) -> Tensor:
    """The notes of all tokens ``[B, H, S, N]`` once those parts that rank now revised theirs."""
    active = policy.active(slots.is_prompt)
    notes: list[Tensor] = []
    start = 0
    for part in policy.parts:
        own = slots.notes[..., start : start + part.needs.notes]
        start += part.needs.notes
        if isinstance(part, RevisesNotes) and any(part is one for one in active):
            # Of a modifier not those of its base.
            own = part.revise(own_view(policy, part, slots)._replace(notes=own))
        notes.append(own)
    return torch.cat(notes, dim=-1)
