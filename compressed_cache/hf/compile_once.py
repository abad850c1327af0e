"""Compiling one decoder layer for all of them."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from compressed_cache.hf.attention_hook import is_compressed


def compile_layers_once(model: nn.Module) -> None:
    """Lets ``generate`` compile one decoder layer of each kind and use it for all the others.

    The decode step under a :class:`CompressedCache` stays one graph. Prompts, other caches, steps
    that are not compiled, and those that the kernels for CUDA take, run as before. A layer that
    cannot be compiled as a whole is then an error, also with ``CompileConfig(fullgraph=False)``.

    Args:
        model: a transformers model, changed in place; its decoder layers are compiled once.

    Raises:
        ValueError: a model without decoder layers.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            "model must have decoder layers made by transformers, got "
            f"{type(model).__name__} with none"
        )
    for layer in layers:
        if getattr(layer.forward, "func", None) is not _forward:
            layer.forward = functools.partial(_forward, layer.forward)


def _forward(forward: Callable[..., Any], hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
    run = _region if _is_region(hidden_states, *args, *kwargs.values()) else _call
    return run(forward, hidden_states, *args, **kwargs)


def _call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)


_region: Callable[..., Any] = torch.compiler.nested_compile_region(_call)


def _is_region(hidden_states: Any, *others: Any) -> bool:
    # Prompts are read eagerly, which a region cannot contain. Nor does Inductor know what a region
    # writes: what the graph around it has read would be read again afterwards.
    if not torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    for other in others:
        if is_compressed(other):
            # A region cannot hold an operator that writes (torch 2.13).
            stores = [getattr(layer, "store", None) for layer in other.layers]
            is_fused = any(store is not None and store.is_fused for store in stores)
            takes_step = other.takes_step(hidden_states.shape[1])
            return takes_step and not other.counter.is_read and not is_fused
    return False
