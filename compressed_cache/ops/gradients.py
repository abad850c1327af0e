"""Gradients of a call end at its own tokens: what was read before counts as constant."""

from typing import Any

import torch
from torch import Tensor


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether gradients are recorded through one of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def constant(held: Tensor, *traced: Tensor) -> Tensor:
    """``held`` as it is, but a gradient that reaches it is an error.

    For tokens that an earlier call read under grad: their part of the gradient is lost.

    Args:
        held: any tensor.
        traced: tensors of the running call. Where none of them has a gradient, as where only what
            was read before is trained (a soft prompt), what is lost would be all there is.
    """
    through = next((tensor for tensor in traced if tensor.requires_grad), None)
    if through is None:
        through = torch.zeros((), device=held.device, requires_grad=True)
    return held + _zero(through).to(held.dtype)


def with_own(held: Tensor, own: Tensor, slot: Tensor) -> Tensor:
    """Slots ``[B, H, S, D]`` with the tokens ``[B, H, L, D]`` in ``slot`` ``[B, H, L]``.

    The slots hold these tokens already, as constants; a copy takes gradients, and may be kept for
    the backward pass while slots are overwritten.
    """
    return held.scatter(2, slot.unsqueeze(-1).expand_as(own), own)


# Operators, so that compiled graphs hold them without looking inside.


@torch.library.custom_op("compressed_cache::zero", mutates_args=())
def _zero(through: Tensor) -> Tensor:
    """0, with a gradient that may not be asked for."""
    return through.new_zeros(())


@torch.library.custom_op("compressed_cache::refuse_gradient", mutates_args=())
def _refuse(gradient: Tensor) -> Tensor:
    raise RuntimeError(
        "CompressedCache holds what it has read as constants, so the gradient of this call would "
        "lack its part through tokens that an earlier call read under grad. Read those under "
        "torch.no_grad() if they are constants to you, or read all tokens that need gradients in "
        "one call."
    )


@_zero.register_fake
def _(through: Tensor) -> Tensor:
    return through.new_empty(())


@_refuse.register_fake
def _(gradient: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _save_shape(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.shape = inputs[0].shape


def _zero_backward(ctx: Any, gradient: Tensor) -> Tensor:
    return _refuse(gradient).expand(ctx.shape)


_zero.register_autograd(_zero_backward, setup_context=_save_shape)
