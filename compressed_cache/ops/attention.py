"""Attention over slots and over prompts, with the weights that policies ask for, in float32."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from compressed_cache.ops import gradients

_BLOCK_ELEMENTS = 1 << 24
"""Largest block of attention weights held at once while a prompt is read (64 MiB of float32)."""
_CPU_BLOCK_ELEMENTS = 1 << 20
"""That of a CPU, which stays in the cache of a core (4 MiB)."""


See = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor | None]]
"""What queries see in place of what is before them, and what is added to their logits: given
``[B, H | 1, Q, S]`` bool what they would see, what there is to see, and the index of the first of
them, it returns ``[B, H | 1, G | 1, Q, S]``, bool and float32 or None."""


class LogitTransform(NamedTuple):
    """How a model turns products of queries and keys into attention weights."""

    scaling: float
    """Factor of the logits, usually ``D ** -0.5``."""
    softcap: float | None = None
    """Logits are soft-capped at this (Gemma 2); None: they are not."""
    sinks: Tensor | None = None
    """``[H * G]`` a learned logit of each query head that takes a share of the weights and gives
    no value (GPT-OSS); None: there is none."""

    def logits(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Float32 logits ``[B, H, ..., S]`` of queries ``[B, H, ..., D]`` over keys
        ``[B, H, S, D]``.

        float64 stays float64, so that references can be compared exactly.
        """
        # All of a head as rows of one product: it would copy the keys for each further dimension.
        rows = queries.flatten(2, -2)
        logits = _products(rows, keys).unflatten(2, queries.shape[2:-1]) * self.scaling
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def sink_logits(self, logits: Tensor) -> Tensor | None:
        """The sinks as one more column ``[B, H, G, ..., 1]`` of ``[B, H, G, ..., S]`` logits."""
        if self.sinks is None:
            return None
        ones = [1] * (logits.dim() - 3)
        column = self.sinks.to(logits.dtype).view(*logits.shape[1:3], *ones)
        return column.expand(*logits.shape[:-1], 1)


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """Float32 products ``[B, H, R, S]`` of ``[B, H, R, D]`` and ``[B, H, S, D]``, or float64."""
    exact = torch.promote_types(keys.dtype, torch.float32)
    is_half = keys.dtype in (torch.bfloat16, torch.float16) and queries.dtype == keys.dtype
    if is_half and _widens(keys.device) and not gradients.wants_gradient(queries, keys):
        # Elsewhere a copy of all keys is written and read.
        found = torch.bmm(queries.flatten(0, 1), keys.flatten(0, 1).mT, out_dtype=exact)
        return found.unflatten(0, keys.shape[:2])
    return queries.to(exact) @ keys.to(exact).mT


def _widens(device: torch.device) -> bool:
    """Whether a product of half precision can be had in float32 as it was added up."""
    return device.type == "cuda" and torch.version.hip is None


def group_queries(queries: Tensor, num_heads: int) -> Tensor:
    """Queries gathered under the key/value head they share.

    Args:
        queries: ``[B, H * G, L, D]``.
        num_heads: ``H``.

    Returns:
        ``[B, H, G, L, D]``, a view where possible.
    """
    return queries.unflatten(1, (num_heads, -1))


def masked_softmax(logits: Tensor, visible: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Softmax over the last dimension among visible entries; zero where nothing is visible.

    What is not a number counts as not visible, so that a model gone wrong in one token cannot wipe
    out what is known of the others.

    Args:
        logits: ``[..., S]`` float32.
        visible: bool, broadcastable to ``logits``.
        sinks: ``[..., 1]`` a further logit that only takes its share; None: no such thing.

    Returns:
        ``[..., S]`` float32.
    """
    visible = visible & ~logits.isnan()
    weights = _softmax(logits.masked_fill(~visible, -torch.inf), sinks)
    return weights.masked_fill(~visible, 0.0)


def _softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    if sinks is None:
        return logits.softmax(dim=-1)
    return torch.cat([logits, sinks], dim=-1).softmax(dim=-1)[..., :-1]


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    transform: LogitTransform,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One new token per row attends over the slots of its layer.

    The group of query heads that shares a key/value head is packed into one matrix product, so keys
    and values are never repeated.

    Args:
        queries: ``[B, H * G, 1, D]`` after RoPE.
        keys: ``[B, H, S, D]``.
        values: ``[B, H, S, D]``.
        visible: ``[B, H, S]`` bool, slots that hold a token, or ``[B, H, G, S]``.
        transform: how logits become weights.
        bias: added to the logits, shaped as ``[B, H, G, S]`` or so that it can be expanded to it.

    Returns:
        The output ``[B, H * G, 1, D]`` in the dtype of ``values`` and the attention weights
        ``[B, H, G, 1, S]`` float32.
    """
    grouped = queries.reshape(*keys.shape[:2], -1, queries.shape[-1])
    if visible.dim() == 3:
        visible = visible.unsqueeze(2)
    logits = transform.logits(grouped, keys)
    if bias is not None:
        logits = logits + bias
    logits = logits.masked_fill(~visible, -torch.inf)
    weights = _softmax(logits, transform.sink_logits(logits))
    output = weights.to(values.dtype) @ values
    return output.reshape(*queries.shape[:3], values.shape[-1]), weights.unsqueeze(3).float()


def attention_rows(
    queries: Tensor,
    keys: Tensor,
    *,
    query_positions: Tensor,
    positions: Tensor,
    transform: LogitTransform,
    last: int | None = None,
    window: int | None = None,
    see: See | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Causal attention weights of many queries, in blocks so that memory is linear in ``S``.

    Args:
        queries: ``[B, H * G, L, D]`` after RoPE.
        keys: ``[B, H, S, D]`` after RoPE.
        query_positions: ``[B, L]`` int64, ``-1`` at padding. Padded queries give zero rows.
        positions: ``[B, H, S]`` or ``[B, 1, S]`` int64, ``-1`` where there is no token.
        transform: how logits become weights.
        last: how many of the last queries; None for all.
        window: how many tokens a query sees at most, its own included; None for all before it.
        see: what queries see in place of that.

    Yields:
        ``[B, H, G, Q, S]`` float32 for consecutive blocks of ``Q`` queries, oldest first, and the
        positions ``[B, Q]`` of these queries.
    """
    batch, num_queries, length = queries.shape[:3]
    grouped = group_queries(queries, keys.shape[1])
    block = _block_length(batch * num_queries * keys.shape[2], keys.device.type)
    held = positions[:, :, None, :]
    if not _widens(keys.device):
        # Not anew in each block.
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    for start in range(0 if last is None else max(0, length - last), length, block):
        block_positions = query_positions[:, start : start + block]
        own = block_positions[:, None, :, None]
        visible = (held >= 0) & (held <= own)
        if window is not None:
            visible = visible & (held > own - window)
        own_queries = grouped[:, :, :, start : start + block]
        logits = transform.logits(own_queries, keys)
        if see is None:
            visible = visible.unsqueeze(2)
        else:
            visible, bias = see(visible, (held >= 0) & (own >= 0), start)
            logits = logits if bias is None else logits + bias
        weights = masked_softmax(logits, visible, transform.sink_logits(logits))
        yield weights, block_positions


def _block_length(row: int, device: str) -> int:
    """Queries of a block, where one has so many weights in all heads and rows."""
    most = max(1, _BLOCK_ELEMENTS // row)
    # A few queries for each pass over the keys.
    return most if device != "cpu" else min(most, max(16, _CPU_BLOCK_ELEMENTS // row))


def read_values(
    rows: Iterator[tuple[Tensor, Tensor]],
    values: Tensor,
    *,
    wants_weights: bool,
    observe: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What many queries read.

    Args:
        rows: what :func:`attention_rows` yields.
        values: ``[B, H, S, D]``.
        wants_weights: whether the weights are returned.
        observe: given each block of weights and the positions of its queries.

    Returns:
        The output ``[B, L, H * G, D]`` and the weights ``[B, H * G, L, S]``, or None.
    """
    outputs, kept = [], []
    for weights, own in rows:
        output = weights.to(values.dtype).flatten(2, 3) @ values
        outputs.append(output.unflatten(2, weights.shape[2:4]))
        if wants_weights:
            kept.append(weights)
        if observe is not None:
            observe(weights, own)
    output = torch.cat(outputs, dim=3).flatten(1, 2).transpose(1, 2)
    return output, torch.cat(kept, dim=3).flatten(1, 2) if wants_weights else None
