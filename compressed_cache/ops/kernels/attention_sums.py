"""Column sums of causal attention in two Triton launches, in memory linear in the prompt.

The first finds the log-sum-exp of each query. With it the weight of any pair is one exponential, so
the second goes down the queries of a block of keys and adds up. Each reads queries and keys once
per block and writes one number per query or key.
"""

# Triton declares types that are not those of what it takes and returns.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportReturnType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = {2: 64, 4: 32}
"""Queries and keys of a tile, by the bytes of an element."""
_WARPS = {2: 4, 4: 8}


@triton.jit
def _logits(queries, keys, rows, columns, padding, scaling, softcap, SOFTCAP: tl.constexpr):
    """Logits of a tile ``[rows, columns]``, minus infinity where a query sees no key."""
    logit = tl.dot(queries, keys, input_precision="ieee") * scaling
    if SOFTCAP:
        logit = softcap * (1.0 - 2.0 / (tl.exp(2.0 * logit / softcap) + 1.0))
    visible = (columns[None, :] <= rows[:, None]) & (columns[None, :] >= padding)
    return tl.where(visible & (logit == logit), logit, float("-inf"))


@triton.jit
def _place(length, BLOCK: tl.constexpr):
    """Which block of which head is that of this program."""
    # All in one dimension of the grid, because the others have no more than 65,535 programs.
    number, blocks = tl.program_id(0), tl.cdiv(length, BLOCK)
    return number % blocks, (number // blocks).to(tl.int64)


@triton.jit
def _log_sum_exp_kernel(
    queries, keys, paddings, sinks, found, num_queries, length, scaling, softcap,
    query_batch, query_head, query_token, key_batch, key_head, key_token,
    GROUPS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    block, program = _place(length, BLOCK)
    # The last queries see most keys, so they go first.
    start = (tl.cdiv(length, BLOCK) - 1 - block) * BLOCK
    row, query = program // num_queries, program % num_queries
    padding = tl.load(paddings + row)
    column = tl.arange(0, DIM_PAD)
    tokens = start + tl.arange(0, BLOCK)
    own = queries + row * query_batch + query * query_head
    tile = tl.load(
        own + tokens[:, None].to(tl.int64) * query_token + column[None, :],
        mask=(tokens[:, None] < length) & (column[None, :] < DIM),
        other=0.0,
    )
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    own = keys + row * key_batch + (query // GROUPS) * key_head
    for begin in range(0, start + BLOCK, BLOCK):
        others = begin + tl.arange(0, BLOCK)
        key = tl.load(
            own + others[None, :].to(tl.int64) * key_token + column[:, None],
            mask=(others[None, :] < length) & (column[:, None] < DIM),
            other=0.0,
        )
        logit = _logits(tile, key, tokens, others, padding, scaling, softcap, SOFTCAP)
        higher = tl.maximum(peak, tl.max(logit, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(logit - base[:, None]), axis=1)
        peak = higher
    base = tl.where(peak == float("-inf"), 0.0, peak)
    if SINKS:
        total += tl.exp(tl.load(sinks + query).to(tl.float32) - base)
    # A query that sees nothing gives nothing: the exponential of minus infinity.
    is_blind = peak == float("-inf")
    result = tl.where(is_blind, float("inf"), base + tl.log(tl.where(is_blind, 1.0, total)))
    tl.store(found + program * length + tokens, result, mask=tokens < length)


@triton.jit
def _column_sums_kernel(
    queries, keys, paddings, found, totals, num_heads, length, scaling, softcap,
    query_batch, query_head, query_token, key_batch, key_head, key_token,
    GROUPS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    # The first keys are seen by most queries, so they go first.
    block, program = _place(length, BLOCK)
    start = block * BLOCK
    row, head = program // num_heads, program % num_heads
    padding = tl.load(paddings + row)
    column = tl.arange(0, DIM_PAD)
    tokens = start + tl.arange(0, BLOCK)
    tile = tl.load(
        keys + row * key_batch + head * key_head
        + tokens[None, :].to(tl.int64) * key_token + column[:, None],
        mask=(tokens[None, :] < length) & (column[:, None] < DIM),
        other=0.0,
    )  # fmt: skip
    total = tl.zeros([BLOCK], tl.float32)
    for group in range(GROUPS):
        own = queries + row * query_batch + (head * GROUPS + group) * query_head
        own_found = found + (program * GROUPS + group) * length
        for begin in range(start, length, BLOCK):
            others = begin + tl.arange(0, BLOCK)
            query = tl.load(
                own + others[:, None].to(tl.int64) * query_token + column[None, :],
                mask=(others[:, None] < length) & (column[None, :] < DIM),
                other=0.0,
            )
            logit = _logits(query, tile, others, tokens, padding, scaling, softcap, SOFTCAP)
            log_sum_exp = tl.load(own_found + others, mask=others < length, other=float("inf"))
            total += tl.sum(tl.exp(logit - log_sum_exp[:, None]), axis=0)
    tl.store(totals + program * length + tokens, total / GROUPS, mask=tokens < length)


def attention_sums(
    queries: Tensor,
    keys: Tensor,
    padding: Tensor,
    sinks: Tensor | None,
    *,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Sum over all queries of their causal attention, averaged over the group.

    Args:
        queries: ``[B, H * G, L, D]``.
        keys: ``[B, H, L, D]``.
        padding: ``[B]`` int64, tokens at the left that are none.
        sinks: ``[H * G]`` or None.
        scaling: factor of the logits.
        softcap: bound of the logits; None: they are not bent.

    Returns:
        ``[B, H, L]`` float32.
    """
    queries, keys = (x if x.stride(3) == 1 else x.contiguous() for x in (queries, keys))
    batch, num_queries, length, dim = queries.shape
    heads, element = keys.shape[1], keys.element_size()
    found = torch.empty(batch, num_queries, length, dtype=torch.float32, device=keys.device)
    totals = torch.empty(batch, heads, length, dtype=torch.float32, device=keys.device)
    blocks = triton.cdiv(length, _BLOCK[element])
    strides = (*queries.stride()[:3], *keys.stride()[:3])
    common = {
        "GROUPS": num_queries // heads,
        "DIM": dim,
        "DIM_PAD": max(16, triton.next_power_of_2(dim)),
        "BLOCK": _BLOCK[element],
        "SOFTCAP": softcap is not None,
        "num_warps": _WARPS[element],
    }
    _log_sum_exp_kernel[(blocks * batch * num_queries,)](
        *(queries, keys, padding, padding if sinks is None else sinks, found),
        *(num_queries, length, scaling, softcap or 1.0, *strides),
        SINKS=sinks is not None,
        **common,
    )
    _column_sums_kernel[(blocks * batch * heads,)](
        *(queries, keys, padding, found, totals),
        *(heads, length, scaling, softcap or 1.0, *strides),
        **common,
    )
    return totals
