"""How much attention each token of a prompt received in all, without the weights in memory."""

import torch
from torch import Tensor

from compressed_cache.ops.attention import LogitTransform, group_queries
from compressed_cache.ops.kernels import operators
from compressed_cache.ops.tokens import Sizes

_BLOCK_ELEMENTS = 1 << 21
"""Weights held at once on a CPU: 8 MiB of float32, which stay in its cache between two passes."""
_FEWEST_ROWS = 256
"""Of them, in any case: with fewer, products of matrices take longer than that saves."""


def attention_sums(
    queries: Tensor, keys: Tensor, real: Tensor, *, transform: LogitTransform, sizes: Sizes
) -> Tensor | None:
    """Sum over all queries of a prompt of their causal attention, averaged over the group.

    The weights of a block of queries are made, added up by column and forgotten. On CUDA two
    kernels do it: one finds the log-sum-exp of each query, the second needs only that to add up a
    column of keys from top to bottom. Values are never read.

    Args:
        queries: ``[B, H * G, L, D]`` after RoPE.
        keys: ``[B, H, L, D]`` after RoPE.
        real: ``[B, L]`` bool, ``False`` at padding, which is on the left.
        transform: how logits become weights.
        sizes: of the layer.

    Returns:
        ``[B, H, L]`` float32, zero at padding. None where these ways do not serve: on other devices
        without the kernels, and on a CPU where a logit is not a number.
    """
    if operators.serves(sizes):
        padding = (~real).sum(dim=1)
        return operators.attention_sums(
            queries,
            keys,
            padding,
            transform.sinks,
            scaling=transform.scaling,
            softcap=transform.softcap,
        )
    if keys.device.type == "cpu":
        totals = _sums_of_blocks(queries, keys, real, transform)
        if totals.isfinite().all():
            return totals
    return None


def attend_and_sum(
    queries: Tensor, keys: Tensor, values: Tensor, real: Tensor, *, transform: LogitTransform
) -> tuple[Tensor, Tensor] | None:
    """Causal attention itself, and what :func:`attention_sums` gives of it, in one pass.

    Args:
        queries: ``[B, H * G, L, D]`` after RoPE.
        keys: ``[B, H, L, D]`` after RoPE.
        values: ``[B, H, L, D]``.
        real: ``[B, L]`` bool, ``False`` at padding, which is on the left.
        transform: how logits become weights.

    Returns:
        ``[B, L, H * G, D]``, zero at padding, and ``[B, H, L]`` float32. None on other devices than
        a CPU, in less than float32 or under autocast, where the weights would be made in another
        dtype than that of the model's own attention, and where a logit is not a number.
    """
    if keys.device.type != "cpu" or keys.dtype not in (torch.float32, torch.float64):
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    output = values.new_zeros(*queries.shape[::2], queries.shape[1], values.shape[3])
    totals = _sums_of_blocks(queries, keys, real, transform, values, output)
    return (output, totals) if totals.isfinite().all() else None


def _sums_of_blocks(
    queries: Tensor,
    keys: Tensor,
    real: Tensor,
    transform: LogitTransform,
    values: Tensor | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """Head by head, so that a block of weights is small; what is after a query is not computed.

    With ``values`` ``[B, H, L, D]``, ``output`` ``[B, L, H * G, D]`` is filled with the attention.
    """
    batch, heads, length = keys.shape[:3]
    exact = torch.promote_types(keys.dtype, torch.float32)
    grouped = group_queries(queries, heads)
    groups = grouped.shape[2]
    rows = max(_FEWEST_ROWS, _BLOCK_ELEMENTS // length)
    block = min(length, max(1, rows // groups))
    memory = torch.empty(groups * block * length, dtype=exact)
    ones = torch.ones(groups * block, dtype=exact)
    totals = torch.zeros(batch, heads, length, dtype=exact)
    sinks = None
    if transform.sinks is not None:
        sinks = transform.sinks.to(exact).view(heads, groups, 1, 1)
    for row, padding in enumerate((~real).sum(dim=1).tolist()):
        for head in range(heads):
            own_keys = keys[row, head, padding:].to(exact)
            own_queries = grouped[row, head, :, padding:]
            own_sinks = None if sinks is None else sinks[head]
            for start in range(0, length - padding, block):
                some = own_queries[:, start : start + block].to(exact)
                end = start + some.shape[1]
                weights = _weights(some, own_keys[:end], memory, transform, own_sinks)
                seen = slice(padding, padding + end)
                totals[row, head, seen].addmv_(weights.mT, ones[: len(weights)])
                if values is not None and output is not None:
                    read = (weights @ values[row, head, seen]).unflatten(0, (groups, -1))
                    own = slice(head * groups, (head + 1) * groups)
                    output[row, padding + start : padding + end, own] = read.transpose(0, 1)
    return (totals / groups).float()


def _weights(
    queries: Tensor, keys: Tensor, memory: Tensor, transform: LogitTransform, sinks: Tensor | None
) -> Tensor:
    """Causal weights ``[G * n, T]`` of the last queries ``[G, n, D]`` over keys ``[T, D]``, in
    ``memory``; ``sinks`` are ``[G, 1, 1]``."""
    groups, count, _ = queries.shape
    shape = groups, count, len(keys)
    weights = memory[: groups * count * len(keys)].view(shape)
    scaled = (queries * transform.scaling).flatten(0, 1)
    torch.mm(scaled, keys.mT, out=weights.flatten(0, 1))
    if transform.softcap is not None:
        weights.div_(transform.softcap).tanh_().mul_(transform.softcap)
    later = torch.ones(count, count, dtype=torch.bool).triu(1)
    weights[:, :, -count:].masked_fill_(later, -torch.inf)
    # The share of a row that its sink leaves to the tokens.
    share = None if sinks is None else (weights.logsumexp(-1, keepdim=True) - sinks).sigmoid()
    torch.softmax(weights, dim=-1, out=weights)
    if share is not None:
        weights.mul_(share)
    return weights.flatten(0, 1)
