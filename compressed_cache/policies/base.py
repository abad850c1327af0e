"""What a policy is: numbers, and a function that scores the held tokens."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from compressed_cache.attention import Form

_CHECKED: dict[str, tuple[type | tuple[type, ...], str]] = {
    "int": (int, "an int"),
    "float": ((int, float), "a float"),
    "bool": (bool, "a bool"),
    "str": (str, "a str"),
}


class Slots(NamedTuple):
    """What a policy sees of one layer (legend in :mod:`compressed_cache.slots`).

    While decoding these are the slots of the cache. At prefill the same fields describe the prompt,
    with ``S`` its length. Policies must not change the tensors.
    """

    keys: Tensor
    """``[B, H, S, D]``, after RoPE, in the dtype of the model."""
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
    """``[B, H, G, W, D]`` last queries seen, in any order; ``W = 0`` unless the policy has
    ``observes = "queries"``."""
    query_positions: Tensor
    """``[B, W]`` int64, ``-1`` where no query was seen yet."""
    attention: Tensor
    """``[B, H, S]`` float32, what :meth:`Policy.accumulate` made of the attention seen so far;
    without slots unless the policy has ``observes = "attention"``."""


class Defaults(NamedTuple):
    """What ``None`` means for the arguments of ``CompressedCache`` under one policy."""

    interval: int = 1
    sinks: int = 0
    recent: int = 0
    protect_prompt: bool = False


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
    observes: ClassVar[Literal["nothing", "queries", "attention"]] = "nothing"
    """What the layer must record for the policy: nothing, the last :attr:`num_queries` queries, or
    what :meth:`accumulate` makes of the attention weights of every query."""
    evicts: ClassVar[bool] = True
    """``False``: the cache grows instead, ``budget`` is ignored and scores are never asked for."""
    mixes_heads: ClassVar[bool] = False
    """With ``observes = "attention"``: :meth:`accumulate` averages over all heads of the layer, so
    what tensor parallelism gave to other processes is averaged in."""
    prompt_queries: ClassVar[int | None] = None
    """With ``observes = "attention"``: how many of the last prompt queries are shown; None: all."""

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
    def num_queries(self) -> int:
        """How many of the last queries are recorded; with ``observes = "queries"``."""
        return 0

    @property
    def kept_recent(self) -> int:
        """Tokens before the incoming one that :meth:`scores` itself always keeps."""
        return 0

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

    def accumulate(self, attention: Tensor, weights: Tensor) -> Tensor:
        """What is remembered of the attention seen so far, once new weights arrive.

        Called with ``observes = "attention"``: at prefill for consecutive blocks of prompt queries,
        then once per decode step. A new token starts at zero. A policy that leaves this as it is
        remembers the sum over all queries of the mean over the group, and no weights need to be
        written down for it.

        Args:
            attention: ``[B, H, S]`` float32, the memory so far.
            weights: ``[B, H, G, Q, S]`` float32 attention of ``Q`` consecutive queries, oldest
                first.

        Returns:
            ``[B, H, S]`` float32.
        """
        return attention + weights.mean(dim=2).sum(dim=2)
