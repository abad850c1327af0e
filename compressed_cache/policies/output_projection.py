"""The weight behind the attention, also where adapters or a quantization change it."""

from typing import Any

import torch
from torch import Tensor, nn

from compressed_cache.policies.view import LayerContext

_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj")


# Tensors born in inference mode could not be used outside of it later.
@torch.inference_mode(False)
@torch.no_grad()
def output_projection(context: LayerContext, policy: str) -> Tensor:
    """The weight by which a layer multiplies what its heads have read, ``[hidden, H * G * D]``.

    It is the parameter itself where that is what counts. Adapters are added to it as peft would
    merge them, and quantized weights are dequantized, in new memory.

    Args:
        context: the layer.
        policy: who asks.

    Raises:
        NotImplementedError: no such weight, or none that can be had.
    """
    found = [getattr(context.module, name, None) for name in _PROJECTIONS]
    module: Any = next((module for module in found if module is not None), None)
    needs = f"{policy} needs the output projection of the attention"
    where = f"layer {context.layer}"
    width = context.heads * context.groups * context.value_dim
    if module is None:
        raise NotImplementedError(
            f"{needs}, and {where} ({type(context.module).__name__}) has none of "
            f"{', '.join(_PROJECTIONS)}"
        )
    try:
        weight = _weight(module)
    except _Unreadable as error:
        raise NotImplementedError(f"{needs}, and that of {where} is {error}") from None
    if weight.dim() != 2 or weight.shape[1] != width:
        raise NotImplementedError(
            f"{needs} as a linear layer of {width} inputs, and that of {where} is a "
            f"{_kind(module)} in {_name(weight.dtype)} of shape {list(weight.shape)}"
        )
    if weight.device != context.device:
        raise NotImplementedError(
            f"{needs} of {where} on {context.device}, and it is on {weight.device}, as in models "
            "with offloaded weights"
        )
    # The parameter itself: the compiler refuses two views of one memory.
    return weight


class _Unreadable(Exception):
    """What a module is and what to do about it, in words."""


def _weight(module: Any) -> Tensor:
    if hasattr(module, "base_layer"):
        return _adapted(module)
    weight: Any = getattr(module, "weight", None)
    is_linear = isinstance(module, nn.Linear)
    if not isinstance(weight, Tensor) and callable(weight):
        # Layers of torch.ao have a method of this name.
        weight, is_linear = weight(), True
    if not isinstance(weight, Tensor) or not is_linear:
        raise _Unreadable(
            f"a {_kind(module)}, which is no linear layer with a weight that can be read. Load the "
            "model with plain linear layers, or use a policy without it."
        )
    local = getattr(weight, "to_local", None)
    return _dequantized(module, weight if local is None else local())


def _dequantized(module: Any, weight: Any) -> Tensor:
    state = getattr(module, "state", None)
    for holder in (weight, state):
        scale = getattr(holder, "SCB", None)
        if isinstance(scale, Tensor):
            # bitsandbytes moves them from the weight to the state in the first call.
            codes = getattr(holder, "CB", None)
            codes = weight.data if codes is None else codes
            return codes.float() * (scale.float() / 127).unsqueeze(-1)
    if weight.is_quantized or type(weight).dequantize is not Tensor.dequantize:
        return weight.dequantize()
    if not weight.is_floating_point() or weight.dtype.itemsize == 1:
        raise _Unreadable(
            f"a {_kind(module)} with a quantized weight in {_name(weight.dtype)} that cannot be "
            "dequantized here. Load the model without quantization, or use a policy without it."
        )
    return weight


def _adapted(module: Any) -> Tensor:
    """The weight of a layer of peft, as its next call will use it."""
    weight = _weight(module.base_layer)
    is_merged, is_off = bool(module.merged), bool(module.disable_adapters)
    if is_merged == is_off:
        # A merged adapter that is switched off is taken out again by the call.
        names = module.merged_adapters if is_off else module.active_adapters
        # Other tuners rotate or scale by what they call a delta, and so do variants of LoRA.
        if names and not hasattr(module, "lora_A"):
            raise _unmerged(module)
        names = [name for name in names if name in module.lora_A]
        if any(name in getattr(module, "lora_variant", ()) for name in names):
            raise _unmerged(module)
        for name in names:
            delta = module.get_delta_weight(name)
            if delta.shape != weight.shape:
                raise _unmerged(module)
            delta = delta.to(weight.device, weight.dtype)
            weight = weight - delta if is_off else weight + delta
    return weight


def _unmerged(module: Any) -> _Unreadable:
    return _Unreadable(
        f"a {_kind(module)} whose adapter is not a sum with the weight. Merge it first, with "
        "model.merge_and_unload() of peft, or use a policy without it."
    )


def _kind(module: Any) -> str:
    kind = type(module)
    home = kind.__module__.partition(".")[0]
    return kind.__name__ if home == "torch" else f"{home}.{kind.__name__}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
