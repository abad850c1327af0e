"""The kernels as operators of torch, which compiled graphs hold without looking inside."""

import importlib.util

import torch
from torch import Tensor

from compressed_cache.ops.tokens import Sizes

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST_HEAD = 256
_MOST_GROUPS = 64
_LEAST_CAPABILITY = (8, 0)
_CHANGED = ("keys", "values", "positions", "memory", "arrived", "counts")


def serves(sizes: Sizes) -> bool:
    """Whether the kernels can work on a layer of these sizes; elsewhere PyTorch does."""
    return (
        max(sizes.dim, sizes.value_dim) <= _WIDEST_HEAD
        and sizes.groups <= _MOST_GROUPS
        and sizes.dtype in _DTYPES
        and sizes.value_dtype == sizes.dtype
        and has_device(sizes.device)
    )


def has_device(device: torch.device) -> bool:
    """Whether Triton can work on this device: CUDA from Ampere on."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
    )


@torch.library.custom_op("compressed_cache::decode_step", mutates_args=_CHANGED)
def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    memory: Tensor,
    arrived: Tensor,
    counts: Tensor,
    protected_prefix: Tensor,
    slot: Tensor | None,
    scores: Tensor | None,
    sinks: Tensor | None,
    real: Tensor | None,
    *,
    recent: int,
    scaling: float,
    softcap: float | None,
    record: str,
) -> tuple[Tensor, Tensor]:
    """See :func:`compressed_cache.ops.kernels.decode.decode_step`."""
    from compressed_cache.ops.kernels import decode

    tensors = decode.Step(
        *(query, key, value, keys, values, positions, memory, arrived),
        *(counts, protected_prefix, slot, scores, sinks, real),
    )
    # Triton launches on the current device, whatever its arguments are on.
    with torch.cuda.device_of(keys):
        return decode.decode_step(
            tensors, recent=recent, scaling=scaling, softcap=softcap, record=record
        )


@decode_step.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *others: object,
    record: str,
    **settings: object,
) -> tuple[Tensor, Tensor]:
    batch, heads, capacity = positions.shape
    shape = (batch, heads, query.shape[1] // heads, 1, capacity) if record == "weights" else (0,)
    output = query.new_empty(*query.shape[:3], values.shape[3], dtype=values.dtype)
    return output, query.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("compressed_cache::attention_sums", mutates_args=())
def attention_sums(
    queries: Tensor,
    keys: Tensor,
    padding: Tensor,
    sinks: Tensor | None,
    *,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """See :func:`compressed_cache.ops.kernels.attention_sums.attention_sums`."""
    from compressed_cache.ops.kernels import attention_sums as kernels

    with torch.cuda.device_of(keys):
        return kernels.attention_sums(
            queries, keys, padding, sinks, scaling=scaling, softcap=softcap
        )


@attention_sums.register_fake
def _(queries: Tensor, keys: Tensor, *args: object, **kwargs: object) -> Tensor:
    return keys.new_empty(keys.shape[:3], dtype=torch.float32)
