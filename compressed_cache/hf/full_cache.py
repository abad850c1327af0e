"""All keys and values of a batch whose rows may each take back another number of tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from compressed_cache.hf.full_layer import FullLayer
from compressed_cache.hf.module_inputs import ModuleInput
from compressed_cache.observers import Observer
from compressed_cache.stores.inputs import AttentionInputs


class FullCache(Cache):
    """Keeps everything, in columns that are the same in all rows.

    What a row takes back and others do not stays behind as a hole, which is padding to the model,
    until there are many: to close them, all has to be copied. Where layers see so many columns
    back, they are closed at once, and padding of the prompt, which may be between two turns, stays
    where it is, as it does in the caches of transformers.

    Args:
        longest: tokens of the longest text there may be, drafts included.
        needs_hidden_states: whether somebody wants to know what attention modules are given.
        is_windowed: whether some layers see only so many columns back.

    Attributes:
        real: ``[B, T]`` bool, ``False`` at padding and holes.
    """

    layers: list[FullLayer]
    real: Tensor

    def __init__(self, longest: float, *, needs_hidden_states: bool, is_windowed: bool) -> None:
        super().__init__(layers=[])
        self.longest = longest
        self.needs_hidden_states, self.is_windowed = needs_hidden_states, is_windowed
        self.shown: ModuleInput | None = None
        self._tokens: list[int] = []

    def holds(self, real: Tensor) -> None:
        """Says what is padding ``[B, T]`` bool of the prompt, which it holds."""
        self.real = real
        self._stays = torch.ones_like(real) if self.is_windowed else real
        self._tokens = self._stays.sum(dim=1).tolist()
        self._is_padded = self.is_windowed and not bool(real.all())

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
        if min(self._tokens) == self.real.shape[1] and not self._is_padded:
            return None
        return self._followed_by(tokens)

    def begin(self, tokens: int) -> Tensor:
        """The next call keeps its shapes, and may be compiled.

        Returns:
            ``[B, T]`` int64 its mask, one column for each there is memory for.
        """
        length = self.real.shape[1]
        if length + tokens > self.layers[0].capacity:
            self.close_holes()
            length = self.real.shape[1]
        columns = torch.arange(length, length + tokens, device=self.real.device)
        for layer in self.layers:
            layer.reserve(tokens)
            layer.columns = columns
        return self._followed_by(self.layers[0].capacity - length)

    def end(self, tokens: int) -> None:
        """That call is over."""
        for layer in self.layers:
            layer.length += tokens
            layer.columns = None

    def keep(self, kept: Sequence[int], tokens: int) -> None:
        """Of the last call keeps the first tokens of each row.

        Args:
            kept: how many, of each row.
            tokens: how many the call had.
        """
        most = max(kept)
        count = torch.tensor(kept, device=self.real.device)
        new = torch.arange(most, device=count.device) < count[:, None]
        self.real = torch.cat([self.real, new], dim=1)
        self._stays = torch.cat([self._stays, new], dim=1)
        self._tokens = [held + more for held, more in zip(self._tokens, kept, strict=True)]
        for layer in self.layers:
            layer.length -= tokens - most
        surplus = self.real.shape[1] - max(self._tokens)
        if (self.is_windowed and min(kept) < most) or surplus > self.real.shape[1] // 8:
            self.close_holes()

    def close_holes(self) -> None:
        """Lets every row end in the last column, with what it took back on the left of it."""
        most = max(self._tokens)
        if most == self.real.shape[1] == min(self._tokens):
            return
        # False sorts before True.
        columns = self._stays.int().argsort(dim=1, stable=True)[:, -most:]
        self.real, self._stays = self.real.gather(1, columns), self._stays.gather(1, columns)
        for layer in self.layers:
            layer.take(columns)

    @property
    def nbytes(self) -> int:
        """Of all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def layer(self, index: int) -> FullLayer:
        """The layer of this index, made where there is none yet."""
        while len(self.layers) <= index:
            self.layers.append(FullLayer(self.longest))
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

    def _followed_by(self, columns: int) -> Tensor:
        """``[B, T + columns]`` int64, a mask in which more columns count as real."""
        return torch.nn.functional.pad(self.real, (0, columns), value=True).long()


class CopyPrompt(Observer):
    """Puts what another cache reads into a full one, where the model computes it in full.

    Args:
        full: where to.

    Attributes:
        real: ``[B, T]`` bool, ``False`` at padding.
    """

    reads_layers = True
    real: Tensor

    def __init__(self, full: FullCache) -> None:
        self.full = full

    def layer_read(self, layer: Any, inputs: AttentionInputs) -> None:
        """Copies what a layer has just read."""
        self.full.layer(layer.index).append(inputs.key, inputs.value)
        self.real = inputs.real
