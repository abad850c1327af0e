"""Files of gates: for each layer a linear layer or an MLP that rates tokens by hidden states."""

import re
from typing import Any

import torch
from torch import Tensor

from compressed_cache.policies.budgets import compressed_layers
from compressed_cache.policies.view import LayerContext
from compressed_cache.tensorfile import check_finite, opened

_NAME = re.compile(r"module_list\.(\d+)\.(?:([02])\.)?(weight|bias)")
_LINEAR = {"weight", "bias"}
_MLP = {"0.weight", "0.bias", "2.weight", "2.bias"}


def check(path: str) -> None:
    """Raises ``FileNotFoundError`` or ``ValueError`` unless it is a file of gates."""
    with opened(path, what="file of gates") as file:
        _names(path, file)


# Tensors born in inference mode could not be used outside of it later.
@torch.inference_mode(False)
def load(path: str | None, context: LayerContext) -> dict[str, Tensor]:
    """The gate of one layer, for the heads at hand, float32 on the layer's device.

    Args:
        path: the file.
        context: the layer.

    Returns:
        ``weight`` ``[H, E]`` and ``bias`` ``[H]``; of an MLP, ``0.weight`` ``[M, E]``, ``0.bias``
        ``[M]``, ``2.weight`` ``[H, M]`` and ``2.bias`` ``[H]``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file, or one of something else or of another model.
    """
    if path is None:
        raise ValueError(
            "policy 'learned_gate' needs gates that were trained for this model. Pass weights=FILE."
        )
    with opened(path, what="file of gates") as file:
        layers = _names(path, file)
        _check_layers(path, layers, context.config)
        prefix = f"module_list.{context.layer}."
        gate = {name: file.get_tensor(prefix + name).float() for name in layers[context.layer]}
    _check_shapes(path, gate, context)
    for name, part in gate.items():
        check_finite(path, f"module_list.{context.layer}.{name}", part)
    heads = slice(context.first_head, context.first_head + context.heads)
    # What comes last has a row for each head.
    last = "2." if "2.weight" in gate else ""
    rows = {name: gate[name][heads] for name in (f"{last}weight", f"{last}bias")}
    return {name: part.to(context.device) for name, part in {**gate, **rows}.items()}


def _names(path: str, file: Any) -> dict[int, set[str]]:
    """By layer the names of its tensors."""
    layers: dict[int, set[str]] = {}
    wrong: str | None = None
    for key in file.keys():  # noqa: SIM118
        found = _NAME.fullmatch(key)
        if found is None:
            wrong = key
            break
        layers.setdefault(int(found[1]), set()).add(key.split(".", 2)[2])
    for layer, names in layers.items():
        if wrong is None and names not in (_LINEAR, _MLP):
            wrong = f"{', '.join(sorted(names))} of layer {layer}"
    if wrong is not None or not layers:
        raise ValueError(
            f"{path!r} must have tensors module_list.LAYER.weight and .bias for a linear gate, or "
            f".0.weight, .0.bias, .2.weight and .2.bias for an MLP, got {wrong or 'none'}"
        )
    return layers


def _check_layers(path: str, layers: dict[int, set[str]], config: Any) -> None:
    wanted, total = set(compressed_layers(config)), config.num_hidden_layers
    if not wanted <= set(layers) or max(layers) >= total:
        missing = sorted(wanted - set(layers))
        what = f"none of layers {missing}" if missing else f"one of layer {max(layers)}"
        raise ValueError(f"{path!r} must have gates of a model of {total} layers, got {what}")


def _check_shapes(path: str, gate: dict[str, Tensor], context: LayerContext) -> None:
    heads, width = context.total_heads, context.hidden_size
    if "weight" in gate:
        expected = {"weight": [heads, width], "bias": [heads]}
    else:
        inner = gate["0.bias"].numel()
        expected = {"0.bias": [inner], "0.weight": [inner, width]}
        expected |= {"2.weight": [heads, inner], "2.bias": [heads]}
    for name, shape in expected.items():
        if list(gate[name].shape) != shape:
            raise ValueError(
                f"{path!r} must have gates for {heads} key/value heads and hidden states of "
                f"{width}, but {name} of layer {context.layer} is {list(gate[name].shape)}, not "
                f"{shape}"
            )
