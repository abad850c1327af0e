"""All keys and values of a batch whose rows may each take back another number of tokens."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from compressed_cache.hf import attention_hook, checks
from compressed_cache.hf.module_inputs import ModuleInput
from compressed_cache.observers import Observer
from compressed_cache.stores.growing import power_of_two
from compressed_cache.stores.inputs import AttentionInputs


class FullLayer(CacheLayerMixin):
    """Every token of one layer, and what attention was given in the last call.

    Attributes:
        length: columns in use.
        read: the last call, ``real`` in all rows; None before the first that the model made.
    """

    is_croppable = True

    def __init__(self) -> None:
        self.length = 0
        self.read: AttentionInputs | None = None
        self.hidden_states: Tensor | None = None
        self._memory: tuple[Tensor, Tensor] | None = None
        self._new: tuple[Tensor, Tensor] | None = None

    @property
    def is_initialized(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether there is memory."""
        return self._memory is not None

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
        """Allocates room for these."""
        self._memory = _room(key_states), _room(value_states)

    def append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values ``[B, H, L, D]``, and returns all."""
        new = key_states, value_states
        length = self.length + key_states.shape[2]
        if self._memory is None:
            self.lazy_initialization(*new)
        elif self._memory[0].shape[2] < length:
            held = (memory[:, :, : self.length] for memory in self._memory)
            self.lazy_initialization(*map(_joined, held, new))
        else:
            for memory, tensor in zip(self._memory, new, strict=True):
                memory[:, :, self.length : length] = tensor
        self.length = length
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        return keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends what the model has made, whose attention comes back to :meth:`forward`."""
        self._new = key_states, value_states
        keys, values = self.append(key_states, value_states)
        attention_hook.Owner(self).tag(keys)
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
        if _shares_keys(function, query, key, attention_mask, kwargs):
            return _attend_shared(query, key, value, attention_mask, kwargs), None
        return function(module, query, key, value, attention_mask, **kwargs)

    def check_attended(self, index: int) -> None:
        """Raises ``NotImplementedError`` if the last keys never came to :meth:`forward`."""
        checks.check_attended(index, awaits=self._new is not None)

    def take_back(self, columns: int, shift: Tensor | None) -> None:
        """Drops the last columns, then moves each row to the right by ``shift`` ``[B]`` columns."""
        self.length -= columns
        if shift is None or self._memory is None:
            return
        for memory in self._memory:
            move_right(memory[:, :, : self.length], 2, shift)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.length

    def get_max_length(self) -> int:
        """-1: the text may grow without limit."""
        return -1


class FullCache(Cache):
    """Keeps everything, every row of it ending in the last column.

    So the model and its masks meet nothing but a batch that is padded on the left, whatever the
    rows have taken back, and layers with a sliding window see as much as ever.

    Args:
        needs_hidden_states: whether somebody wants to know what attention modules are given.

    Attributes:
        real: ``[B, T]`` bool, ``False`` at padding.
    """

    layers: list[FullLayer]
    real: Tensor

    def __init__(self, *, needs_hidden_states: bool) -> None:
        super().__init__(layers=[])
        self.needs_hidden_states = needs_hidden_states
        self.shown: ModuleInput | None = None
        self._is_whole: bool | None = None
        """Whether nothing is padding; None: not yet known."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends keys and values ``[B, H, L, D]`` of one layer, and returns all of it."""
        layer = self.layer(layer_idx)
        if self.shown is not None:
            layer.hidden_states, self.shown = self.shown.hidden_states, None
        return layer.update(key_states, value_states)

    def mask(self, tokens: int) -> Tensor | None:
        """``[B, T + L]`` int64, with ``tokens`` real tokens to come; None where nothing is padded,
        so that transformers makes no more of a mask than it must."""
        if self._is_whole is None:
            self._is_whole = bool(self.real.all())
        if self._is_whole:
            return None
        return torch.nn.functional.pad(self.real, (0, tokens), value=True).long()

    def keep(self, kept: Tensor, tokens: int) -> None:
        """Of the last call keeps the first tokens of each row.

        Args:
            kept: ``[B]`` int64.
            tokens: how many the call had.
        """
        self.real = torch.nn.functional.pad(self.real, (0, tokens), value=True)
        most = int(kept.max())
        shift = most - kept
        columns = tokens - most
        moved = shift if bool(shift.any()) else None
        for layer in self.layers:
            layer.take_back(columns, moved)
        self.real = self.real[:, : self.real.shape[1] - columns]
        if moved is not None:
            self.real = self.real.clone()
            move_right(self.real, 1, moved)
            self._is_whole = False
            # What came round from nowhere is padding.
            first = torch.arange(self.real.shape[1], device=moved.device)
            self.real &= first >= moved[:, None]

    @property
    def nbytes(self) -> int:
        """Of all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def layer(self, index: int) -> FullLayer:
        """The layer of this index, made where there is none yet."""
        while len(self.layers) <= index:
            self.layers.append(FullLayer())
        return self.layers[index]

    def reads(self) -> dict[int, AttentionInputs]:
        """What the layers read in the last call, and forgets it.

        Raises:
            NotImplementedError: keys of a layer were never attended.
        """
        found: dict[int, AttentionInputs] = {}
        for index, layer in enumerate(self.layers):
            layer.check_attended(index)
            if layer.read is not None:
                found[index], layer.read = layer.read, None
        return found


class CopyPrompt(Observer):
    """Puts what another cache reads into a full one, where the model computes it in full.

    Args:
        full: where to.
    """

    reads_layers = True

    def __init__(self, full: FullCache) -> None:
        self.full = full

    def layer_read(self, layer: Any, inputs: AttentionInputs) -> None:
        """Copies what a layer has just read."""
        self.full.layer(layer.index).append(inputs.key, inputs.value)
        self.full.real = inputs.real


def move_right(memory: Tensor, dim: int, shift: Tensor) -> None:
    """Moves rows to the right in place; what leaves there is gone, what comes in is repeated.

    Args:
        memory: ``[B, ..., T, ...]``.
        dim: of the columns.
        shift: ``[B]`` int64.
    """
    rows = shift.nonzero().squeeze(1)
    columns = torch.arange(memory.shape[dim], device=memory.device)
    source = (columns - shift[rows, None]).clamp(min=0)
    shape = [1] * memory.dim()
    shape[0], shape[dim] = source.shape
    moved = memory[rows]
    memory[rows] = moved.gather(dim, source.view(shape).expand_as(moved))


def _shares_keys(
    function: Any, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
) -> bool:
    """Whether transformers' function would copy all keys for each query head of a group."""
    return (
        function is sdpa_attention_forward
        and query.shape[1] > key.shape[1]
        and query.shape[2] > 1
        and isinstance(mask, Tensor)
        and mask.dim() == 4
        and mask.shape[1] == 1
        and not kwargs.get("dropout")
        and all(kwargs.get(name) is None for name in ("position_bias", "softcap"))
    )


def _attend_shared(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """The same ``[B, L, H * G, D]``, with the queries of a group one after the other."""
    batch, heads, length, dim = query.shape
    groups = heads // key.shape[1]
    output = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(batch, key.shape[1], groups * length, dim),
        key,
        value,
        attn_mask=mask.repeat(1, 1, groups, 1),
        scale=kwargs.get("scaling"),
    )
    return output.reshape(batch, heads, length, -1).transpose(1, 2).contiguous()


def _room(tensor: Tensor) -> Tensor:
    """Memory for twice as much at most, that begins with ``[B, H, L, D]``."""
    batch, heads, length, dim = tensor.shape
    memory = tensor.new_empty(batch, heads, power_of_two(length), dim)
    memory[:, :, :length] = tensor
    return memory


def _joined(held: Tensor, new: Tensor) -> Tensor:
    return torch.cat([held, new], dim=2)
