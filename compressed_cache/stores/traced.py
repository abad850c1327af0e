"""Gradients through slots: they reach the tokens of a call, and end at what was read before."""

from torch import Tensor

from compressed_cache.ops import gradients
from compressed_cache.ops.tokens import gather, where_real
from compressed_cache.stores.slots import SlotStore


def constant(store: SlotStore, held: Tensor, *traced: Tensor) -> Tensor:
    """What is held of earlier calls, as a constant of one with gradients through ``traced``."""
    is_past = store.has_gradients and gradients.wants_gradient(*traced)
    return gradients.constant(held, *traced) if is_past else held


def with_gradients(
    store: SlotStore,
    held: tuple[Tensor, Tensor],
    traced: tuple[Tensor, Tensor, Tensor],
    slot: Tensor,
    real: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, H, S, D]`` with gradients to the tokens just written to the slots.

    Args:
        store: where they were written.
        held: keys and values in the slots.
        traced: the query, key and value of the step, with gradients.
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
