"""Column sums of causal attention in two Triton launches, in memory linear in the prompt.

The first finds the log-sum-exp of each query. With it the weight of any pair is one exponential, so
the second goes down the queries of a block of keys and adds up. Each reads queries and keys once
per block and writes one number per query or key. Logits are in powers of two, and only the tile on
the diagonal is masked by who comes first.
"""

# Triton declares types that are not those of what it takes and returns.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportReturnType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = tl.constexpr(1.4426950408889634)
_BLOCK = {2: 64, 4: 32}
"""Queries and keys of a tile, by the bytes of an element."""
_WARPS = {2: 4, 4: 8}


@triton.jit
def _logits(
    queries, keys, rows, columns, padding, scaling, softcap,
    SOFTCAP: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Logits of a tile ``[rows, columns]``, minus infinity where a query sees no key."""
    logit = tl.dot(queries, keys, input_precision="ieee")
    if SOFTCAP:
        bent = softcap * (1.0 - 2.0 / (tl.exp(2.0 * logit * scaling / softcap) + 1.0))
        logit = bent * _LOG2_E
    else:
        logit *= scaling * _LOG2_E
    visible = (columns[None, :] >= padding) & (logit == logit)
    if DIAGONAL:
        visible &= columns[None, :] <= rows[:, None]
    return tl.where(visible, logit, float("-inf"))


@triton.jit
def _place(length, BLOCK: tl.constexpr):
    """Which block of which head is that of this program."""
    # All in one dimension of the grid, because the others have no more than 65,535 programs.
    number, blocks = tl.program_id(0), tl.cdiv(length, BLOCK)
    return number % blocks, (number // blocks).to(tl.int64)


@triton.jit
def _add_keys(
    peak, total, queries, keys, rows, columns, padding, length, key_token, channels, scaling,
    softcap, DIM: tl.constexpr, SOFTCAP: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """The largest logit of each query and the sum below it, with those of more keys."""
    # All keys before the diagonal are of the text.
    mask = channels[:, None] < DIM
    if DIAGONAL:
        mask &= columns[None, :] < length
    places = columns[None, :].to(tl.int64) * key_token + channels[:, None]
    tile = tl.load(keys + places, mask=mask, other=0.0)
    logit = _logits(
        queries, tile, rows, columns, padding, scaling, softcap, SOFTCAP, DIAGONAL
    )  # fmt: skip
    higher = tl.maximum(peak, tl.max(logit, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp2(peak - base) + tl.sum(tl.exp2(logit - base[:, None]), axis=1)


@triton.jit
def _sums_of_queries(
    queries, keys, found, rows, columns, padding, length, query_token, channels, scaling,
    softcap, DIM: tl.constexpr, SOFTCAP: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """What some queries attend to each key, in total."""
    tile = tl.load(
        queries + rows[:, None].to(tl.int64) * query_token + channels[None, :],
        mask=(rows[:, None] < length) & (channels[None, :] < DIM),
        other=0.0,
    )
    logit = _logits(tile, keys, rows, columns, padding, scaling, softcap, SOFTCAP, DIAGONAL)
    log_sum_exp = tl.load(found + rows, mask=rows < length, other=float("inf"))
    return tl.sum(tl.exp2(logit - log_sum_exp[:, None]), axis=0)


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
    padding = tl.load(paddings + row).to(tl.int32)
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
    for begin in range(padding // BLOCK * BLOCK, start, BLOCK):
        peak, total = _add_keys(
            peak, total, tile, own, tokens, begin + tl.arange(0, BLOCK), padding, length,
            key_token, column, scaling, softcap, DIM, SOFTCAP, DIAGONAL=False,
        )  # fmt: skip
    # A loop of one, or float32 takes five times the registers.
    for begin in range(start, start + BLOCK, BLOCK):
        peak, total = _add_keys(
            peak, total, tile, own, tokens, begin + tl.arange(0, BLOCK), padding, length,
            key_token, column, scaling, softcap, DIM, SOFTCAP, DIAGONAL=True,
        )  # fmt: skip
    base = tl.where(peak == float("-inf"), 0.0, peak)
    if SINKS:
        total += tl.exp2(tl.load(sinks + query).to(tl.float32) * _LOG2_E - base)
    # A query that sees nothing gives nothing: the power of minus infinity.
    is_blind = peak == float("-inf")
    result = tl.where(is_blind, float("inf"), base + tl.log2(tl.where(is_blind, 1.0, total)))
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
    padding = tl.load(paddings + row).to(tl.int32)
    column = tl.arange(0, DIM_PAD)
    tokens = start + tl.arange(0, BLOCK)
    tile = tl.load(
        keys + row * key_batch + head * key_head
        + tokens[None, :].to(tl.int64) * key_token + column[:, None],
        mask=(tokens[None, :] < length) & (column[:, None] < DIM),
        other=0.0,
    )  # fmt: skip
    total = tl.zeros([BLOCK], tl.float32)
    # In a loop of its own, which leaves the other one its registers.
    for group in range(GROUPS):
        own = queries + row * query_batch + (head * GROUPS + group) * query_head
        total += _sums_of_queries(
            own, tile, found + (program * GROUPS + group) * length, tokens, tokens, padding, length,
            query_token, column, scaling, softcap, DIM, SOFTCAP, DIAGONAL=True,
        )  # fmt: skip
    for group in range(GROUPS):
        own = queries + row * query_batch + (head * GROUPS + group) * query_head
        own_found = found + (program * GROUPS + group) * length
        for begin in range(start + BLOCK, length, BLOCK):
            total += _sums_of_queries(
                own, tile, own_found, begin + tl.arange(0, BLOCK), tokens, padding, length,
                query_token, column, scaling, softcap, DIM, SOFTCAP, DIAGONAL=False,
            )  # fmt: skip
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
