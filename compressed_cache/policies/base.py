"""What a policy is: numbers, what it needs to be shown, and a function that scores tokens."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from compressed_cache.policies.fields import check_fields, own_options
from compressed_cache.policies.former_names import check_names
from compressed_cache.policies.needs import Defaults, Needs
from compressed_cache.policies.view import AttentionRows, LayerContext, Slots


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
        check_fields(self)

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
            ``[B, H, S]`` float32. Larger is kept longer, ``+inf`` until nothing else is left;
            entries of empty slots are ignored, and protected tokens are handled by the cache. Ties
            keep the newer token.
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
