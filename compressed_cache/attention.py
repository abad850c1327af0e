"""Attention over slots, and the attention a prompt pays to itself, both in float32."""

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 24
"""Largest block of attention weights held at once while a prompt is scored (64 MiB of float32)."""


def group_queries(queries: Tensor, num_heads: int) -> Tensor:
    """Queries gathered under the key/value head they share.

    Args:
        queries: ``[B, H * G, L, D]``.
        num_heads: ``H``.

    Returns:
        ``[B, H, G, L, D]``, a view where possible.
    """
    return queries.unflatten(1, (num_heads, -1))


def masked_softmax(logits: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the last dimension among visible entries; zero where nothing is visible.

    Args:
        logits: ``[..., S]`` float32.
        visible: bool, broadcastable to ``logits``.

    Returns:
        ``[..., S]`` float32.
    """
    weights = logits.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return weights.masked_fill(~visible, 0.0)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, *, scaling: float
) -> tuple[Tensor, Tensor]:
    """One new token per row attends over the slots of its layer.

    The group of query heads that shares a key/value head is packed into one matrix product, so keys
    and values are never repeated.

    Args:
        queries: ``[B, H * G, 1, D]`` after RoPE.
        keys: ``[B, H, S, D]``.
        values: ``[B, H, S, D]``.
        visible: ``[B, H, S]`` bool, slots that hold a token.
        scaling: factor of the logits.

    Returns:
        The output ``[B, H * G, 1, D]`` in the dtype of ``values`` and the attention weights
        ``[B, H, G, 1, S]`` float32.
    """
    grouped = queries.reshape(*keys.shape[:2], -1, queries.shape[-1])
    # float64 models keep their precision, so that references can be compared exactly.
    exact = torch.promote_types(keys.dtype, torch.float32)
    logits = (grouped.to(exact) @ keys.to(exact).mT) * scaling
    weights = logits.masked_fill(~visible[:, :, None], -torch.inf).softmax(dim=-1)
    output = weights.to(values.dtype) @ values
    return output.reshape(*queries.shape[:3], values.shape[-1]), weights.unsqueeze(3).float()


def prompt_attention(
    queries: Tensor, keys: Tensor, positions: Tensor, *, scaling: float, last: int | None
) -> Iterator[Tensor]:
    """Causal attention weights of a prompt, in blocks of queries so that memory is linear in ``L``.

    Args:
        queries: ``[B, H * G, L, D]`` after RoPE.
        keys: ``[B, H, L, D]`` after RoPE.
        positions: ``[B, L]`` int64, ``-1`` at padding. Padded queries give zero rows.
        scaling: factor of the logits.
        last: only the last so many queries; ``None`` for all.

    Yields:
        ``[B, H, G, Q, L]`` float32 for consecutive blocks of ``Q`` queries, oldest first.
    """
    batch, num_queries, length = queries.shape[:3]
    grouped = group_queries(queries, keys.shape[1])
    transposed = keys.float().mT.unsqueeze(2)
    columns = torch.arange(length, device=keys.device)
    real = positions >= 0
    block = max(1, _BLOCK_ELEMENTS // (batch * num_queries * length))
    for start in range(0 if last is None else max(0, length - last), length, block):
        rows = columns[start : start + block]
        visible = (columns <= rows[:, None]) & real[:, None, :] & real[:, rows, None]
        logits = (grouped[:, :, :, start : start + block].float() @ transposed) * scaling
        yield masked_softmax(logits, visible[:, None, None])
