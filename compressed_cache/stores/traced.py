"""Gradients through slots: they reach the tokens of a call, and end at what was read before."""

import torch
from torch import Tensor

from compressed_cache.ops import gradients
from compressed_cache.ops.tokens import gather, where_real
from compressed_cache.stores.slots import SlotStore


def traced_in(store: SlotStore, *tensors: Tensor) -> tuple[Tensor, ...] | None:
    """The query, key and value of a step through which gradients are recorded; None where there
    would be none, not even of what is held."""
    is_traced = _has_past(store) or gradients.wants_gradient(*tensors)
    return tensors if is_traced else None


def constant(store: SlotStore, held: Tensor, *traced: Tensor) -> Tensor:
    """What is held of earlier calls, as a constant of one that reads ``traced``."""
    return gradients.constant(held, *traced) if _has_past(store) else held


def with_gradients(
    store: SlotStore,
    held: tuple[Tensor, Tensor],
    traced: tuple[Tensor, ...],
    slot: Tensor,
    real: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, H, S, D]`` with gradients to the tokens just written to the slots.

    Args:
        store: where they were written.
        held: keys and values in the slots.
        traced: what :func:`traced_in` gives of the step.
        slot: ``[B, H, 1]`` int64.
        real: ``[B]`` bool, rows whose token is real; None: all.
    """
    new = store.laid_out(store.ordered(traced[1])), store.laid_out(traced[2])
    # The backward pass needs it, and it may be where the step counts.
    slot = slot.clone()
    keys, values = (
        gradients.with_own(
            constant(store, tensor, *traced),
            where_real(real, own.to(tensor.dtype), gather(tensor, slot)),
            slot,
        )
        for tensor, own in zip(held, new, strict=True)
    )
    return keys, values


def _has_past(store: SlotStore) -> bool:
    """Whether the gradient of a call would lack its part through earlier ones."""
    return torch.is_grad_enabled() and store.has_gradients
