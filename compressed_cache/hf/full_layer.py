"""All keys and values of one layer, in memory that a compiled call can write into."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from compressed_cache.hf import attention_hook, checks
from compressed_cache.hf.first_prompt import asks_only_for_a_mask
from compressed_cache.ops.shared_attention import attend_shared, attend_used
from compressed_cache.stores.growing import power_of_two
from compressed_cache.stores.inputs import AttentionInputs


class FullLayer(CacheLayerMixin):
    """Every token of one layer, and what attention was given in the last call.

    Args:
        longest: columns that will be enough, as far as is known; memory beyond them is not taken.

    Attributes:
        length: columns in use.
        columns: ``[L]`` int64, where a call that keeps its shapes writes, which then attends over
            all memory; None: after what is in use, and over that only.
        read: the last call, ``real`` in all rows; None before the first that the model made.
    """

    is_croppable = True

    def __init__(self, longest: float) -> None:
        self.longest = longest
        self.length = 0
        self.columns: Tensor | None = None
        self.read: AttentionInputs | None = None
        self.hidden_states: Tensor | None = None
        self._memory: tuple[Tensor, Tensor] | None = None
        self._new: tuple[Tensor, Tensor] | None = None

    @property
    def is_compileable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether transformers is to make masks for all memory."""
        return self.columns is not None

    @property
    def is_initialized(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether there is memory."""
        return self._memory is not None

    @property
    def capacity(self) -> int:
        """Columns of memory."""
        return 0 if self._memory is None else self._memory[0].shape[2]

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``[B, H, T, D]``; None before the first call."""
        return None if self._memory is None else self._memory[0][:, :, : self.length]

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``[B, H, T, D]``, like :attr:`keys`."""
        return None if self._memory is None else self._memory[1][:, :, : self.length]

    @property
    def nbytes(self) -> int:
        """Of all memory, in use or not."""
        return sum(memory.nbytes for memory in self._memory or ())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates room for tokens like these and more, instead of what there was."""
        self._allocate(key_states, value_states, key_states.shape[2])

    def reserve(self, tokens: int) -> None:
        """Makes room for this many more."""
        keys, values = self.keys, self.values
        if keys is None or values is None or self.capacity >= self.length + tokens:
            return
        self._allocate(keys, values, self.length + tokens)
        assert self._memory is not None
        for memory, held in zip(self._memory, (keys, values), strict=True):
            memory[:, :, : self.length] = held

    def append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values ``[B, H, L, D]``, and returns all."""
        tokens = key_states.shape[2]
        if self._memory is None:
            self.lazy_initialization(key_states, value_states)
        self.reserve(tokens)
        self.length += tokens
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        keys[:, :, -tokens:], values[:, :, -tokens:] = key_states, value_states
        return keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends what the model has made, whose attention comes back to :meth:`forward`."""
        self._new = key_states, value_states
        if self.columns is None:
            keys, values = self.append(key_states, value_states)
            attention_hook.Owner(self).tag(keys)
        else:
            assert self._memory is not None
            keys, values = self._memory
            keys.index_copy_(2, self.columns, key_states.to(keys.dtype))
            values.index_copy_(2, self.columns, value_states.to(values.dtype))
        return keys, values

    def forward(
        self,
        function: Any,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> Any:
        """The model's own attention; notes what it was given."""
        assert self._new is not None
        real = torch.ones(len(query), query.shape[2], dtype=torch.bool, device=query.device)
        self.read = AttentionInputs(query, *self._new, real, hidden_states=self.hidden_states)
        self._new = self.hidden_states = None
        if _shares_keys(function, attention_mask, kwargs):
            inputs, scale = (query, key, value, attention_mask), kwargs.get("scaling")
            if self.columns is not None and query.device.type == "cpu":
                return attend_used(*inputs, self.columns, scale), None
            return attend_shared(*inputs, scale), None
        return function(module, query, key, value, attention_mask, **kwargs)

    def check_attended(self, index: int) -> None:
        """Raises ``NotImplementedError`` if the last keys never came to :meth:`forward`."""
        checks.check_attended(index, awaits=self._new is not None)

    def take(self, columns: Tensor) -> None:
        """Keeps these columns ``[B, T]`` int64 of each row, in this order."""
        self.length = columns.shape[1]
        device = columns.device
        for memory in self._memory or ():
            rows, heads = (torch.arange(size, device=device) for size in memory.shape[:2])
            source = rows[:, None, None], heads[:, None], columns[:, None]
            memory[:, :, : self.length] = memory[source]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask."""
        return self.length + query_length if self.columns is None else self.capacity, 0

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.length

    def get_max_length(self) -> int:
        """-1: the text may grow without limit."""
        return -1

    def _allocate(self, keys: Tensor, values: Tensor, tokens: int) -> None:
        columns = few_sizes(tokens, self.longest)
        # Columns after the text are masked, which NaN would survive.
        keys, values = (x.new_zeros(*x.shape[:2], columns, x.shape[3]) for x in (keys, values))
        self._memory = keys, values
        for memory in self._memory:
            torch._dynamo.mark_static_address(memory)
        attention_hook.Owner(self).tag(keys)


def few_sizes(tokens: int, longest: float) -> int:
    """Columns for so many tokens and more: at most twice as many, nor many more than ``longest``,
    and of few different sizes, since each would be compiled anew."""
    doubled = power_of_two(tokens)
    if longest >= doubled:
        return doubled
    eighth = doubled // 8
    return -(-max(tokens, int(longest)) // eighth) * eighth


def _shares_keys(function: Any, mask: Any, kwargs: dict[str, Any]) -> bool:
    """Whether transformers' function would copy all keys for each query head."""
    return (
        asks_only_for_a_mask(function, kwargs)
        and isinstance(mask, Tensor)
        and mask.dim() == 4
        and mask.shape[1] == 1
    )
