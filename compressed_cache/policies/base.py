"""What a policy is: numbers, and a function that scores the held tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from compressed_cache.ops.attention import Form
from compressed_cache.policies.budgets import compressed_layers

_CHECKED: dict[str, tuple[type | tuple[type, ...], str]] = {
    "int": (int, "an int"),
    "float": ((int, float), "a float"),
    "bool": (bool, "a bool"),
    "str": (str, "a str"),
}

_PARTS = ("base", "prompt", "decoding")


class Slots(NamedTuple):
    """What a policy sees of one layer (legend in :mod:`compressed_cache.ops.eviction`).

    While decoding these are the slots of the cache. At prefill the same fields describe the prompt,
    with ``S`` its length. Policies must not change the tensors.
    """

    keys: Tensor
    """``[B, H, S, D]``, after RoPE, in the dtype of the model; with a policy that
    :attr:`prunes_channels <Policy.prunes_channels>` the channels that stay, as of queries."""
    values: Tensor
    """``[B, H, S, D]``."""
    positions: Tensor
    """``[B, H, S]`` int64, ``-1`` where the slot is empty or padding."""
    next_position: Tensor
    """``[B]`` int64, position of the incoming token (the prompt's length at prefill)."""
    layer: int
    """Index of the layer."""
    first_head: int
    """Index in the layer of the first key/value head: not 0 where tensor parallelism shares the
    heads of a layer between processes."""
    form: Form
    """How the model turns products of queries and keys into attention weights."""
    queries: Tensor
    """``[B, H, G, W, D]`` last queries seen, in any order, ``W`` the policy's
    :attr:`Policy.num_queries`."""
    query_positions: Tensor
    """``[B, W]`` int64, ``-1`` where no query was seen yet."""
    attention: Tensor
    """``[B, H, S]`` float32, or ``[B, H, S, R]`` with :attr:`Policy.num_rows` ``R > 1``: what
    :meth:`Policy.accumulate` made of the attention seen so far; without slots unless the policy
    has ``observes_attention``."""
    notes: Tensor
    """``[B, H, S, N]`` float32, what :meth:`Policy.note` and :meth:`Policy.revise` wrote down;
    ``N`` the policy's :attr:`Policy.num_notes`."""
    prompt_length: Tensor
    """``[B]`` int64, positions below it are of the first prompt; at prefill as far as it was read.
    """
    protected_prefix: Tensor
    """``[B]`` int64, the cache keeps positions below it whatever their score."""
    recent: int
    """The cache keeps so many tokens before the incoming one whatever their score."""
    budget: int
    """How many tokens are kept: ``S`` while decoding."""
    is_prompt: bool
    """Whether these are the tokens of a prompt that is cut to the budget."""
    constants: Mapping[str, Tensor]
    """What :meth:`Policy.constants` gave for this layer."""


class Rows(NamedTuple):
    """Attention of ``Q`` consecutive queries, oldest first."""

    weights: Tensor
    """``[B, H, G, Q, S]`` float32; zeros where the query is padding."""
    query_positions: Tensor
    """``[B, Q]`` int64, ``-1`` at padding."""
    positions: Tensor
    """``[B, H, S]`` int64 of the tokens attended to, ``-1`` where there is none."""


class Site(NamedTuple):
    """Where in a model a layer of the cache works."""

    config: Any
    """The model's text config."""
    module: Any
    """The attention module."""
    layer: int
    """Index of the layer."""
    first_head: int
    """As in :class:`Slots`."""
    heads: int
    """``H``, key/value heads at hand."""
    groups: int
    """``G``."""
    dim: int
    """``D`` of keys."""
    value_dim: int
    """``D`` of values."""
    device: torch.device


class Defaults(NamedTuple):
    """What ``None`` means for the arguments of ``CompressedCache`` under one policy."""

    interval: int = 1
    sinks: int = 0
    recent: int = 0
    protect_prompt: bool = False


class Laziness(NamedTuple):
    """When a layer is lazy, and what it keeps then."""

    threshold: float
    """Part of the attention above which it is."""
    queries: int
    """Last queries of the prompt whose attention is looked at."""
    sinks: int
    """First tokens that count and stay."""
    slots: int
    """How many tokens count and stay, the first ones and the last."""


def own_options(part: "Policy | type[Policy]") -> list[str]:
    """The fields of a policy that are not policies."""
    return [field.name for field in dataclasses.fields(part) if field.name not in _PARTS]


def usual_interval(budget: int, *, longest: int = 64) -> int:
    """Steps between two rankings where one costs more than a step: an eighth of the budget goes
    before the next, and no more than ``longest``."""
    return max(1, min(longest, budget // 8))


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Decides which tokens stay: a frozen dataclass of numbers with one function, :meth:`scores`.

    A subclass declares its options as fields with defaults (``int``, ``float`` or ``bool``; types
    are checked) and implements :meth:`scores`. The cache applies protection, writes the slots and
    keeps every tensor.

    Raises:
        TypeError: a field of the wrong type.
    """

    name: ClassVar[str] = ""
    observes_attention: ClassVar[bool] = False
    """Whether :meth:`accumulate` is shown the attention weights of every query."""
    scores_attention: ClassVar[bool] = False
    """Whether scores are attention that the tokens received, averaged or added up."""
    evicts: ClassVar[bool] = True
    """``False``: the cache grows instead, ``budget`` is ignored and scores are never asked for."""
    phases: ClassVar[str] = "prefill and decode"
    """When tokens are evicted, for the catalogue."""
    mixes_heads: ClassVar[bool] = False
    """With ``observes_attention``: :meth:`accumulate` averages over all heads of the layer, so
    what tensor parallelism gave to other processes is averaged in."""
    mixes_scores: ClassVar[bool] = False
    """Whether :meth:`scores` are the same for all heads of the layer: then all hold the same
    tokens, and what tensor parallelism gave to other processes is averaged in."""
    prompt_queries: ClassVar[int | None] = None
    """With ``observes_attention``: how many of the last prompt queries are shown; None: all."""
    revises: ClassVar[bool] = False
    """Whether :meth:`revise` is called before each ranking."""
    contiguous: ClassVar[bool] = False
    """Whether held tokens are attended as if they followed one another, see
    :mod:`compressed_cache.ops.rerotation`, which needs constants."""
    prunes_channels: ClassVar[bool] = False
    """Whether slots hold :meth:`key_channels` channels of each key, those with the highest
    :meth:`channel_scores`, and policies see no others."""
    key_constants: ClassVar[bool] = True
    """Whether :meth:`constants`, if any, are about all channels of keys, none of which may then be
    pruned."""
    merges: ClassVar[bool] = False
    """Whether :meth:`merged` changes values of kept tokens when others are evicted."""
    shares_budget: ClassVar[bool] = False
    """Whether :meth:`budgets` are not all the same."""
    layout: ClassVar[Literal["slots", "offloaded", "pool", "lazy"]] = "slots"
    """Where tokens are: in slots of each head, off the device with only what each step asks for in
    slots, in a pool of slots for all heads of a layer, or in slots of which :meth:`laziness` leaves
    some empty."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # With postponed annotations the type of a field is its name.
            kind = getattr(field.type, "__name__", field.type)
            if kind not in _CHECKED:
                continue
            allowed, wording = _CHECKED[kind]
            if not isinstance(value, allowed) or (isinstance(value, bool) and kind != "bool"):
                raise TypeError(
                    f"{field.name} must be {wording}, got {value!r} ({type(value).__name__})"
                )

    @property
    def label(self) -> str:
        """What a user writes to get such a policy."""
        return self.name or type(self).__name__

    @property
    def parts(self) -> tuple["Policy", ...]:
        """The policies that this one is made of, in the order they are written."""
        return (self,)

    @property
    def options(self) -> dict[str, int | float | bool | str | None]:
        """The fields of all parts."""
        return {name: getattr(part, name) for part in self.parts for name in own_options(part)}

    @property
    def adds_attention(self) -> bool:
        """Whether the sum of the attention is remembered, which a kernel can add up."""
        adds = type(self).accumulate is Policy.accumulate
        return self.observes_attention and adds and not self.mixes_heads

    @property
    def num_queries(self) -> int:
        """How many of the last queries are recorded."""
        return 0

    @property
    def num_rows(self) -> int:
        """Numbers that :meth:`accumulate` keeps of each token."""
        return 1

    @property
    def num_notes(self) -> int:
        """Numbers that :meth:`note` writes down of each token."""
        return 0

    @property
    def prompt_block(self) -> int | None:
        """How many positions of a first prompt are ranked on their own; None: all together."""
        return None

    @property
    def kept_recent(self) -> int:
        """Tokens before the incoming one that :meth:`scores` itself always keeps."""
        return 0

    @property
    def drops(self) -> bool:
        """Whether :meth:`dropped` is called at each ranking of a decode step."""
        return False

    @property
    def whole_keys(self) -> int:
        """With :attr:`prunes_channels`: so many of the last tokens keep all channels."""
        return 0

    def key_channels(self, dim: int) -> int:
        """``D'``, how many of ``dim`` channels of a key stay."""
        return dim

    @property
    def head_floor(self) -> float | None:
        """The part of the budget that each head keeps, where slots of the pool go to the head with
        the highest scores; None: heads do not share slots."""
        return None

    def defaults(self, budget: int) -> Defaults:
        """What ``None`` stands for in the arguments of ``CompressedCache`` at this budget."""
        return Defaults()

    def budgets(
        self, budget: int, num_heads: int, protected: int, config: Any
    ) -> Sequence[int] | Sequence[Sequence[int]]:
        """How the slots of a model are shared out, as many in all as with ``budget`` everywhere.

        Args:
            budget: slots of a head on average.
            num_heads: ``H`` of the whole layer.
            protected: tokens of each head that are never evicted; below ``budget``.
            config: the model's text config.

        Returns:
            Slots of every head, or of each head, of each of the
            :func:`~compressed_cache.policies.budgets.compressed_layers`; all more than ``protected``.
        """
        return [budget] * len(compressed_layers(config))

    def laziness(self, budget: int, protected: int) -> Laziness:
        """With the layout ``lazy``: which rows of a layer do with few slots.

        Args:
            budget: slots of a head of the layer.
            protected: as for :meth:`budgets`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define laziness(...)")

    def scores(self, slots: Slots) -> Tensor:
        """How much each token deserves to stay.

        Args:
            slots: what is held (while decoding, before the incoming token is written) or the
                prompt.

        Returns:
            ``[B, H, S]`` float32. Larger is kept longer; entries of empty slots are ignored, and
            protected tokens are handled by the cache. Ties keep the newer token.
        """
        raise NotImplementedError(f"{type(self).__name__} must define scores(slots)")

    def dropped(self, slots: Slots, scores: Tensor) -> Tensor:
        """Tokens whose slots are empty from this ranking on; with ``drops``.

        Args:
            slots: what is held.
            scores: ``[B, H, S]`` float32, those of :meth:`scores` with protection applied.

        Returns:
            ``[B, H, S]`` bool; at protected and empty slots it is ignored.
        """
        return torch.zeros_like(slots.positions, dtype=torch.bool)

    def accumulate(self, attention: Tensor, rows: Rows) -> Tensor:
        """What is remembered of the attention seen so far, once new rows arrive.

        Called with ``observes_attention``: at prefill for consecutive blocks of prompt queries,
        then once per decode step. A new token starts at zero. A policy that leaves this as it is
        remembers the sum over all queries of the mean over the group, and no weights need to be
        written down for it.

        Args:
            attention: ``[B, H, S]`` float32 (``[B, H, S, R]`` with ``num_rows > 1``), the memory so
                far.
            rows: attention of consecutive queries.

        Returns:
            The memory, of the same shape.
        """
        return attention + rows.weights.mean(dim=2).sum(dim=2)

    def note(self, tokens: Slots) -> Tensor:
        """What is written down of tokens as they come in; with ``num_notes > 0``.

        Args:
            tokens: the new ones alone, with ``S`` their number; their own notes and attention are
                without slots, and what else is known of the layer is as before they came.

        Returns:
            ``[B, H, S, num_notes]`` float32.
        """
        return tokens.keys.new_zeros(*tokens.positions.shape, self.num_notes, dtype=torch.float32)

    def revise(self, slots: Slots) -> Tensor:
        """New notes of all tokens, right before they are ranked; with ``revises``.

        Returns:
            ``[B, H, S, num_notes]`` float32.
        """
        return slots.notes

    def channel_scores(self, queries: Tensor, keys: Tensor, real: Tensor) -> Tensor:
        """How much each channel of a key deserves to stay; with ``prunes_channels``.

        Called once, when the first prompt is read.

        Args:
            queries: ``[B, H, G, L, D]``.
            keys: ``[B, H, L, D]``.
            real: ``[B, L]`` bool, ``False`` at padding, which is on the left.

        Returns:
            ``[B, H, D]`` float32.
        """
        raise NotImplementedError(f"{type(self).__name__} must define channel_scores(...)")

    def merged(
        self, keys: Tensor, values: Tensor, kept: Tensor, evicted: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """New values of the kept tokens, once it is known which others go; with ``merges``.

        Args:
            keys: ``[B, H, S, D]``.
            values: ``[B, H, S, D]``.
            kept: ``[B, H, S]`` bool, where there is a token that stays.
            evicted: the same three of tokens of which those marked go, ``[B, H, E, ...]``.

        Returns:
            ``[B, H, S, D]`` in the dtype of ``values``.
        """
        return values

    def constants(self, site: Site) -> dict[str, Tensor]:
        """Tensors that :meth:`scores` and the others need of this layer of the model.

        Called once, when the layer meets the model, where a model that does not suit is refused.

        Returns:
            By name, on ``site.device``. They are not counted as memory of the cache.

        Raises:
            ValueError: statistics of another model.
            NotImplementedError: a model that the policy cannot work with.
        """
        return {}
