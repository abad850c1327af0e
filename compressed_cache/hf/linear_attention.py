"""Linear attention, for models that mix it with the other kind."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer

from compressed_cache.hf import checks


class States(LinearAttentionLayer):
    """transformers' own layer, whose memory can be written to outside of inference mode too."""

    @torch.inference_mode(False)
    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Allocates the states that are given for the first time."""
        super().lazy_initialization(*args, **kwargs)


class LinearLayers(Cache):
    """The part of a cache that serves linear-attention layers, with transformers' own layers.

    Which layers these are shows when the model first asks for the state of one.
    """

    layers: list[Any]
    was_asked = False
    """Whether one of them was asked for since the running call began, unless it is compiled."""
    is_torn = False
    """Whether the last call failed, after a layer had begun to read it."""

    def make_layers(self, count: int) -> None:
        """Makes layers up to this number."""
        raise NotImplementedError

    def linear_layer(self, index: int) -> LinearAttentionLayer:
        """The linear-attention layer of this index, made where there is none yet."""
        if not torch.compiler.is_compiling():
            self.was_asked = True
        if len(self.layers) <= index:
            self.make_layers(index)
            self.layers.append(States())
        layer = self.layers[index]
        if not isinstance(layer, LinearAttentionLayer):
            raise ValueError(
                f"layer {index} held keys and values, got the state of linear attention. Use a new "
                "CompressedCache for another model."
            )
        return layer

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The convolution state of a linear-attention layer, None before its first token."""
        self.linear_layer(layer_idx)
        return self._held(super().get_conv_state(layer_idx, state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The recurrent state of a linear-attention layer, None before its first token."""
        self.linear_layer(layer_idx)
        return self._held(super().get_recurrent_state(layer_idx, state_idx))

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Takes the new convolution state of a linear-attention layer."""
        layer = self.linear_layer(layer_idx)
        # transformers keeps the memory of an earlier text, whatever the size of the next one.
        if not any(layer.has_previous_state.values()) and not _fits(layer, conv_states):
            vars(layer).update(vars(States()))
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Takes the new recurrent state of a linear-attention layer."""
        self.linear_layer(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def restore_linear_layer(self, index: int, state: LinearAttentionLayer) -> None:
        """Makes a layer hold what a copy of it holds."""
        vars(self.linear_layer(index)).update(copy.deepcopy(vars(state)))

    def reset(self) -> None:
        """Forgets all that was read."""
        self.is_torn = False
        super().reset()

    def reset_linear_layers(self) -> None:
        """Forgets what the linear-attention layers have read."""
        for layer in self._linear_layers():
            layer.reset()

    def reorder_linear_layers(self, rows: Any) -> None:
        """Keeps the given rows of the states of all linear-attention layers."""
        for layer in self._linear_layers():
            layer.reorder_cache(rows)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"layers": [detached(layer) for layer in self.layers]}

    @property
    def is_recurrent(self) -> bool:
        """Whether there are linear-attention layers, as far as the model has asked for one yet."""
        return any(True for _ in self._linear_layers())

    @property
    def linear_nbytes(self) -> int:
        """Bytes of the states of all linear-attention layers."""
        held: list[Tensor | None] = []
        for layer in self._linear_layers():
            held += [*layer.conv_states.values(), *layer.recurrent_states.values()]
        return sum(state.nbytes for state in held if state is not None)

    def _linear_layers(self) -> Iterator[LinearAttentionLayer]:
        return (layer for layer in self.layers if isinstance(layer, LinearAttentionLayer))

    def _held(self, state: Tensor | None) -> Tensor | None:
        """A state that is asked for, which only the second call of a model finds."""
        if state is not None:
            checks.check_keys(not all(isinstance(one, LinearAttentionLayer) for one in self.layers))
        return state


def detached(layer: Any) -> Any:
    """The same layer; one of linear attention with states that need no gradients, since what is in
    a graph cannot be copied."""
    if not isinstance(layer, LinearAttentionLayer):
        return layer
    own = copy.copy(layer)
    own.conv_states, own.recurrent_states = (
        {index: None if state is None else state.detach() for index, state in states.items()}
        for states in (layer.conv_states, layer.recurrent_states)
    )
    return own


def _fits(layer: LinearAttentionLayer, state: Tensor) -> bool:
    """Whether a layer has no memory yet, or that for states like this one."""
    return all(
        (held.shape[:-1], held.dtype, held.device) == (state.shape[:-1], state.dtype, state.device)
        for held in layer.conv_states.values()
        if held is not None
    )
