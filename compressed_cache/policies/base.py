"""What a policy is: numbers, what it needs to be shown, and a function that scores tokens."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from compressed_cache.policies.former_names import check_names
from compressed_cache.policies.view import AttentionRows, LayerContext, Slots
from compressed_cache.wording import shown

_CHECKED: dict[str, tuple[type | tuple[type, ...], str]] = {
    "int": (int, "an int"),
    "float": ((int, float), "a float"),
    "bool": (bool, "a bool"),
    "str": (str, "a str"),
}
_PARTS = ("base", "prompt", "decoding")


class Needs(NamedTuple):
    """What a policy has to be shown beside keys and positions: kept for it, and for no other."""

    queries: int = 0
    """How many of the last queries."""
    attention: bool = False
    """Whether :meth:`Policy.accumulate` is shown the attention weights of every query."""
    prompt_queries: int | None = None
    """With ``attention``: how many of the last prompt queries are shown; None: all."""
    state_width: int = 1
    """With ``attention``: numbers that :meth:`Policy.accumulate` keeps of each token."""
    all_heads: bool = False
    """With ``attention``: whether :meth:`Policy.accumulate` averages over all heads of the layer,
    so that what tensor parallelism gave to other processes is averaged in."""
    notes: int = 0
    """Numbers written down of each token, see :mod:`compressed_cache.policies.capabilities`."""
    recent: int = 0
    """Tokens before the incoming one that :meth:`Policy.scores` itself always keeps."""
    kept_count: bool = False
    """Whether it must be known how many tokens each head keeps at a ranking."""
    whole_keys: bool | None = None
    """Whether keys must have all their channels; None: if there are constants, which may be about
    them."""
    values: bool = False
    """Whether values are looked at (for readers: they are always there)."""
    hidden_states: bool = False
    """Whether :attr:`Slots.hidden_states` of new tokens are looked at."""
    model: tuple[str, ...] = ()
    """What the model must have, in words."""

    def merge(self, other: "Needs") -> "Needs":
        """What two parts of one policy need together; notes are kept for each."""
        observer = other if other.attention else self
        return Needs(
            queries=max(self.queries, other.queries),
            attention=observer.attention,
            prompt_queries=observer.prompt_queries,
            state_width=observer.state_width,
            all_heads=observer.all_heads,
            notes=self.notes + other.notes,
            recent=max(self.recent, other.recent),
            values=self.values or other.values,
            hidden_states=self.hidden_states or other.hidden_states,
            model=tuple(dict.fromkeys(self.model + other.model)),
        )


class Defaults(NamedTuple):
    """What ``None`` means for the arguments of ``CompressedCache`` under one policy."""

    interval: int = 1
    sinks: int = 0
    recent: int = 0
    protect_prompt: bool = False


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Decides which tokens stay: a frozen dataclass of numbers with one function, :meth:`scores`.

    A subclass declares its options as fields with defaults (the types ``int``, ``float``, ``bool``
    and ``str`` are checked), says what it :attr:`needs` and implements :meth:`scores`. The cache
    applies protection, writes the slots and keeps every tensor. What only some policies do is in
    :mod:`compressed_cache.policies.capabilities`.

    Raises:
        TypeError: a field of the wrong type, or a class that defines what is called otherwise now.
    """

    name: ClassVar[str] = ""
    scores_attention: ClassVar[bool] = False
    """Whether scores are attention that the tokens received or are expected to receive, averaged or
    added up."""
    same_for_all_heads: ClassVar[bool] = False
    """Whether :meth:`scores` are the same for all heads of the layer: then all hold the same
    tokens, and what tensor parallelism gave to other processes is averaged in."""
    evicts: ClassVar[bool] = True
    """``False``: the cache grows instead, ``budget`` is ignored and scores are never asked for."""
    store: ClassVar[Literal["slots", "offloaded", "pool", "lazy"]] = "slots"
    """Where tokens are: in slots of each head, off the device with only what each step asks for in
    slots, in a pool of slots for all heads of a layer, or in slots some of which stay empty."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_names(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # With postponed annotations the type of a field is its name.
            kind = getattr(field.type, "__name__", field.type)
            if kind not in _CHECKED:
                continue
            allowed, wording = _CHECKED[kind]
            if not isinstance(value, allowed) or (isinstance(value, bool) and kind != "bool"):
                raise TypeError(f"{field.name} must be {wording}, got {shown(value)}")

    @property
    def needs(self) -> Needs:
        """What this policy has to be shown, without the parts it is made of."""
        return Needs()

    @property
    def label(self) -> str:
        """What a user writes to get such a policy."""
        return self.name or type(self).__name__

    @property
    def parts(self) -> tuple["Policy", ...]:
        """The policies that this one is made of, in the order they are written."""
        return (self,)

    def active(self, is_prompt: bool) -> tuple["Policy", ...]:
        """Those of its parts that rank a prompt, or that rank in decode steps."""
        return self.parts

    @property
    def options(self) -> dict[str, int | float | bool | str | None]:
        """The fields of all parts."""
        return {name: getattr(part, name) for part in self.parts for name in own_options(part)}

    def defaults(self, budget: int) -> Defaults:
        """What ``None`` stands for in the arguments of ``CompressedCache`` at this budget."""
        return Defaults()

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

    def accumulate(self, state: Tensor, rows: AttentionRows) -> Tensor:
        """What is remembered of the attention seen so far, once new rows arrive.

        Called where ``attention`` is needed: at prefill for consecutive blocks of prompt queries,
        then once per decode step. A new token starts at zero. A policy that leaves this as it is
        remembers the sum over all queries of the mean over the group, and no weights need to be
        written down for it.

        Args:
            state: ``[B, H, S]`` float32 (``[B, H, S, R]`` with ``state_width > 1``), so far.
            rows: attention of consecutive queries.

        Returns:
            The new state, of the same shape.
        """
        return state + rows.weights.mean(dim=2).sum(dim=2)

    def constants(self, context: LayerContext) -> dict[str, Tensor]:
        """Tensors that :meth:`scores` and the others need of this layer of the model.

        Called once, when the layer meets the model, where a model that does not suit is refused.

        Returns:
            By name, on ``context.device``. They are not counted as memory of the cache.

        Raises:
            ValueError: statistics of another model.
            NotImplementedError: a model that the policy cannot work with.
        """
        return {}


def own_options(part: Policy | type[Policy]) -> list[str]:
    """The fields of a policy that are not policies."""
    return [field.name for field in dataclasses.fields(part) if field.name not in _PARTS]


def usual_interval(budget: int, *, longest: int = 64) -> int:
    """Steps between two rankings where one costs more than a step: an eighth of the budget goes
    before the next, and no more than ``longest``."""
    return max(1, min(longest, budget // 8))
