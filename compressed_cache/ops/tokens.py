"""Tokens of one layer and what is known of each, gathered, joined and copied in one way."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    """What decides the shapes, dtypes and device of a layer's tensors."""

    batch: int
    heads: int
    groups: int
    capacity: int
    dim: int
    value_dim: int
    dtype: torch.dtype
    value_dtype: torch.dtype
    device: torch.device
    context: int = 0
    """Tokens that fit off the device."""


class Tokens(NamedTuple):
    """``S`` tokens of each head. A tensor without tokens (``[B, H, 0, ...]``) stands for what is
    not kept of them."""

    keys: Tensor
    """``[B, H, S, D]``."""
    values: Tensor
    """``[B, H, S, D]``."""
    positions: Tensor
    """``[B, H, S]`` int64, negative where there is no token."""
    attention_state: Tensor
    """``[B, H, S]`` or ``[B, H, S, R]`` float32, what a policy made of the attention it saw."""
    notes: Tensor
    """``[B, H, S, N]`` float32, what a policy wrote down of each token."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Tokens":
        """The same function of each tensor."""
        return Tokens(*(function(tensor) for tensor in self))

    def gather(self, index: Tensor) -> "Tokens":
        """The tokens at ``index`` ``[B, H, n]``."""
        return self.map(lambda tensor: gather(tensor, index))

    def cat(self, later: "Tokens") -> "Tokens":
        """These tokens and then others."""
        return Tokens(*(torch.cat(pair, dim=2) for pair in zip(self, later, strict=True)))

    def copy_into(self, slots: "Tokens", places: slice | Tensor) -> None:
        """Overwrites slots at ``places`` along ``S``, in place, with what is kept of these."""
        for tensor, memory in zip(self, slots, strict=True):
            if tensor.shape[2]:
                memory[:, :, places] = tensor


def gather(tensor: Tensor, index: Tensor) -> Tensor:
    """Of ``[B, H, S, ...]`` the entries at ``index`` ``[B, H, n]``; nothing of nothing."""
    return tensor.gather(2, expand(index, tensor)) if tensor.shape[2] else tensor


def scatter(memory: Tensor, dim: int, index: Tensor, new: Tensor, real: Tensor | None) -> None:
    """Overwrites entries of ``memory`` along ``dim``, in place, in rows that are real."""
    # Without padding nothing is read, which keeps the write in place in a compiled step.
    if real is not None:
        new = where_real(real, new, memory.gather(dim, index))
    if torch.compiler.is_compiling():
        # For a scatter, Inductor copies all of the memory, there and back.
        memory.index_put_(_places(dim, index), new)
    else:
        memory.scatter_(dim, index, new)


def _places(dim: int, index: Tensor) -> tuple[Tensor, ...]:
    """An index along ``dim`` as one for each dimension."""
    places = [
        torch.arange(size, device=index.device).view(-1, *[1] * (index.dim() - 1 - own))
        for own, size in enumerate(index.shape)
    ]
    places[dim] = index
    return tuple(places)


def where_real(real: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """``new`` in rows whose token is real, ``old`` in the others.

    Args:
        real: ``[B]`` bool; None: all are.
        new: ``[B, ...]``.
        old: likewise.
    """
    return new if real is None else torch.where(real.view(-1, *[1] * (new.dim() - 1)), new, old)


def expand(index: Tensor, tensor: Tensor) -> Tensor:
    """``[B, H | 1, n]`` as an index into dimension 2 of ``[B, H, S, ...]``."""
    if tensor.dim() == 3:
        return index.expand(*tensor.shape[:2], -1)
    index = index.reshape(*index.shape, *[1] * (tensor.dim() - 3))
    return index.expand(*tensor.shape[:2], -1, *tensor.shape[3:])
