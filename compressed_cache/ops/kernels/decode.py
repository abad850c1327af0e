"""A decode step of one layer in one Triton launch.

Each program serves one key/value head of one row. It finds the victim, puts the new token into its
slot, and reads every key and value once, all query heads of the group together. Where that leaves
most of the device idle, the slots are split between programs, and the last of them to be done adds
up what all found (as in Stream-K, https://arxiv.org/abs/2301.03598). The victim is then found by
each of them anew: it takes 12 bytes per slot from the L2 cache, where a launch of its own would
take longer. Nothing that another program may still read is changed before the last one is done; so
the last of a row also counts its token.

The softmax begins with the new token, so no program waits for its own writes, and a tile of keys
goes to the tensor cores as it was loaded.
"""

# Triton declares types that are not those of what it takes and returns.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportReturnType=false, reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressed_cache.ops.eviction import HIGHEST_SCORE, RECENT_SCORE

_TILE_BYTES = {2: 1 << 14, 4: 1 << 13}
"""Bytes of keys that a program holds at once, by those of an element: what leaves no variable
without a register, and fits the shared memory of any device with values and the next of both."""
_WARPS = {2: 4, 4: 8}
_REMEMBERED = 1 << 14
"""Weights that a program has at once when it adds them up: more would not fit the registers."""
_SHORTEST_SPLIT = 128  # slots
_NEVER = tl.constexpr(1 << 62)
_HIGHEST_SCORE = tl.constexpr(HIGHEST_SCORE)
_RECENT_SCORE = tl.constexpr(RECENT_SCORE)


class Step(NamedTuple):
    """What a decode step reads and changes (legend in :mod:`compressed_cache.ops.eviction`)."""

    query: Tensor
    """``[B, H * G, 1, D]``."""
    key: Tensor
    """``[B, H, 1, D]``."""
    value: Tensor
    """``[B, H, 1, D]``."""
    keys: Tensor
    values: Tensor
    positions: Tensor
    memory: Tensor
    """``[B, H, S]`` float32, zeroed at the slot; no slots where nothing is remembered, as where
    nothing is recorded."""
    arrived: Tensor
    """``[B, H + 1]`` int32, zero between steps: programs done with each head, and heads done."""
    counts: Tensor
    """``[B, 3]`` int64, of each row the position of the token, and two further counts of steps."""
    protected_prefix: Tensor
    slot: Tensor | None
    """``[B, H, 1]`` int64, the slot to overwrite; None: that of the lowest score."""
    scores: Tensor | None
    """``[B, H, S]`` float32; None: ``memory`` is."""
    sinks: Tensor | None
    """``[H * G]``."""
    real: Tensor | None = None
    """``[B]`` bool, ``False`` where the token is padding, which changes nothing; None: nowhere."""


@triton.jit
def _score(scores, positions, slots, capacity, next_position, prefix, recent):
    """What ``slots.protect`` says of some slots, and their positions."""
    exists = slots < capacity
    position = tl.load(positions + slots, mask=exists, other=-1)
    score = tl.load(scores + slots, mask=exists, other=0.0).to(tl.float32)
    score = tl.where(score != score, float("-inf"), score)
    score = tl.minimum(score, _HIGHEST_SCORE)
    score = tl.where(position >= next_position - recent, _RECENT_SCORE, score)
    score = tl.where(position < prefix, float("inf"), score)
    score = tl.where(position < 0, float("-inf"), score)
    return tl.where(exists, score, float("inf")), position


@triton.jit
def _lowest_slot(
    scores, positions, capacity, next_position, prefix, recent, BLOCK: tl.constexpr
):  # fmt: skip
    """The slot with the lowest score, among equals the one with the oldest token."""
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    for start in range(0, capacity, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        score, _ = _score(scores, positions, slots, capacity, next_position, prefix, recent)
        lowest = tl.minimum(lowest, score)
    least = tl.min(lowest, axis=0)
    # Position and slot in one number, so that one minimum finds both.
    order = tl.full([BLOCK], _NEVER, tl.int64)
    for start in range(0, capacity, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        score, position = _score(scores, positions, slots, capacity, next_position, prefix, recent)
        candidate = (slots < capacity) & (score == least)
        own = (position + 1) * capacity + slots
        order = tl.minimum(order, tl.where(candidate, own, _NEVER))
    return tl.min(order, axis=0) % capacity


@triton.jit
def _remember(
    logits, weights, memory, positions, head, slot, next_position, lse, capacity,
    GROUPS: tl.constexpr, GROUPS_PAD: tl.constexpr, BLOCK: tl.constexpr,
    RECORD: tl.constexpr, REMEMBERS: tl.constexpr,
):  # fmt: skip
    """Notes the position of the new token, and what the policy asked for of the attention."""
    # No slot is that of padding.
    is_real = slot >= 0
    tl.store(positions + head * capacity + slot, next_position, mask=is_real)
    group = tl.arange(0, GROUPS_PAD)
    if RECORD != "nothing":
        for start in range(0, capacity, BLOCK):
            slots = start + tl.arange(0, BLOCK)
            exists = slots < capacity
            place = (head * GROUPS + group[:, None]) * capacity + slots[None, :]
            within = (group[:, None] < GROUPS) & exists[None, :]
            logit = tl.load(logits + place, mask=within, other=float("-inf"))
            weight = tl.exp(logit - lse[:, None])
            if RECORD == "weights":
                tl.store(weights + place, weight, mask=within)
            weight = tl.where(within & (weight == weight), weight, 0.0)
            if REMEMBERS:
                own = memory + head * capacity + slots
                held = tl.load(own, mask=exists, other=0.0)
                held = tl.where(slots == slot, 0.0, held)
                if RECORD == "total":
                    held += tl.where(is_real, tl.sum(weight, axis=0) / GROUPS, 0.0)
                tl.store(own, held, mask=exists)


@triton.jit
def _bend(logit, softcap, SOFTCAP: tl.constexpr):
    """A logit, soft-capped where the model does that."""
    if SOFTCAP:
        logit = softcap * (1.0 - 2.0 / (tl.exp(2.0 * logit / softcap) + 1.0))
    return logit


@triton.jit
def _normalise(peak, total, sinks, first_query, group, GROUPS: tl.constexpr, SINKS: tl.constexpr):
    """Maximum and sum of exponentials of a group, with its sinks."""
    if SINKS:
        sink = tl.load(sinks + first_query + group, mask=group < GROUPS, other=float("-inf"))
        sink = sink.to(tl.float32)
        above = tl.maximum(peak, sink)
        above = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(peak - above) + tl.exp(sink - above)
        rescale = tl.exp(peak - above)
        peak = above
    else:
        rescale = tl.full(peak.shape, 1.0, tl.float32)
    return peak, total, rescale


@triton.jit
def _is_last(arrived, expected):
    """Whether all other programs that are expected have come here, with what they wrote."""
    # One thread tells of what all of this program did.
    tl.debug_barrier()
    is_last = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == expected - 1
    if is_last:
        # For the next step.
        tl.store(arrived, 0)
    return is_last


@triton.jit
def _count(counts, arrived, heads, slot):
    """Counts the token of a row, once no head of it has yet to read its position."""
    if _is_last(arrived, heads):
        which = tl.arange(0, 4)
        # Padding has no position.
        more = tl.where((which > 0) | (slot >= 0), 1, 0)
        count = tl.load(counts + which, mask=which < 3, other=0)
        tl.store(counts + which, count + more, mask=which < 3)


@triton.jit
def _added(
    partial, peaks, totals, first,
    GROUPS_PAD: tl.constexpr, VALUE_PAD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Maxima, sums of exponentials and weighted values of all parts of a head together."""
    group = tl.arange(0, GROUPS_PAD)
    value_column = tl.arange(0, VALUE_PAD)
    peak = tl.full([GROUPS_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUPS_PAD], tl.float32)
    sums = tl.zeros([GROUPS_PAD, VALUE_PAD], tl.float32)
    for part in range(SPLITS):
        own = (first + part) * GROUPS_PAD + group
        other = tl.load(peaks + own)
        higher = tl.maximum(peak, other)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        mine, theirs = tl.exp(peak - base), tl.exp(other - base)
        total = total * mine + tl.load(totals + own) * theirs
        found = tl.load(partial + own[:, None] * VALUE_PAD + value_column[None, :])
        sums = sums * mine[:, None] + found * theirs[:, None]
        peak = higher
    return peak, total, sums


@triton.jit
def _attend_kernel(
    query, key, value, keys, values, positions, memory, arrived, counts, prefixes, slots_given,
    scores, sinks, reals, logits, weights, output, partial, peaks, totals,
    heads, capacity, split, recent, scaling, softcap,
    GROUPS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    GROUPS_PAD: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_PAD: tl.constexpr,
    BLOCK: tl.constexpr, RANK_BLOCK: tl.constexpr, SPLITS: tl.constexpr, CHOOSES: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, PADS: tl.constexpr, RECORD: tl.constexpr,
    REMEMBERS: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    part = tl.program_id(1)
    row = program // heads
    first_query = (program - row * heads) * GROUPS
    # Of each row one for each head, and one more.
    arrived += row * (heads + 1)
    head = program.to(tl.int64)
    counts += row * 3
    next_position = tl.load(counts)
    if CHOOSES:
        prefix = tl.load(prefixes + row)
        slot = _lowest_slot(
            scores + head * capacity, positions + head * capacity, capacity, next_position, prefix,
            recent, RANK_BLOCK,
        )  # fmt: skip
    else:
        slot = tl.load(slots_given + head)
    if PADS:
        slot = tl.where(tl.load(reals + row) != 0, slot, -1)
    group = tl.arange(0, GROUPS_PAD)
    column = tl.arange(0, DIM_PAD)
    value_column = tl.arange(0, VALUE_PAD)
    in_group = group < GROUPS
    in_key, in_value = column < DIM, value_column < VALUE_DIM

    queries = tl.load(
        query + (head * GROUPS + group[:, None]) * DIM + column[None, :],
        mask=in_group[:, None] & in_key[None, :],
        other=0.0,
    )
    new_key = tl.load(key + head * DIM + column, mask=in_key, other=0.0)
    new_value = tl.load(value + head * VALUE_DIM + value_column, mask=in_value, other=0.0)
    begin = part * split
    end = tl.minimum(begin + split, capacity)
    is_here = (slot >= begin) & (slot < end)
    if is_here:
        tl.store(keys + (head * capacity + slot) * DIM + column, new_key, mask=in_key)
        tl.store(
            values + (head * capacity + slot) * VALUE_DIM + value_column, new_value, mask=in_value
        )

    new_logit = tl.sum(queries.to(tl.float32) * new_key.to(tl.float32)[None, :], axis=1) * scaling
    new_logit = _bend(new_logit, softcap, SOFTCAP)
    # In the program that has its slot.
    peak = tl.where(is_here, new_logit, float("-inf"))
    # One, or no number where the logit is none.
    total = tl.where(is_here, tl.exp(new_logit - new_logit), 0.0)
    sums = total[:, None] * new_value.to(tl.float32)[None, :]
    slot_here = slot.to(tl.int32)
    for start in range(begin, end, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        exists = slots < end
        position = tl.load(positions + head * capacity + slots, mask=exists, other=-1)
        is_new = slots == slot_here
        visible = (position >= 0) & (slots != slot_here)
        place = head * capacity + slots
        # What an empty slot holds may be anything.
        tile = tl.load(
            keys + place[None, :] * DIM + column[:, None],
            mask=visible[None, :] & in_key[:, None],
            other=0.0,
        )
        logit = _bend(tl.dot(queries, tile, input_precision="ieee") * scaling, softcap, SOFTCAP)
        logit = tl.where(visible[None, :], logit, float("-inf"))
        if RECORD != "nothing":
            own = (head * GROUPS + group[:, None]) * capacity + slots[None, :]
            recorded = tl.where(is_new[None, :], new_logit[:, None], logit)
            tl.store(logits + own, recorded, mask=in_group[:, None] & exists[None, :])
        higher = tl.maximum(peak, tl.max(logit, axis=1))
        # Where no slot is visible so far, minus infinity less itself would be no number.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        rescale = tl.exp(peak - base)
        weight = tl.exp(logit - base[:, None])
        total = total * rescale + tl.sum(weight, axis=1)
        tile = tl.load(
            values + place[:, None] * VALUE_DIM + value_column[None, :],
            mask=visible[:, None] & in_value[None, :],
            other=0.0,
        )
        sums = sums * rescale[:, None]
        sums += tl.dot(weight.to(tile.dtype), tile, input_precision="ieee")
        peak = higher

    is_last = True
    if SPLITS > 1:
        first = head * SPLITS
        own = (first + part) * GROUPS_PAD + group
        tl.store(peaks + own, peak)
        tl.store(totals + own, total)
        tl.store(partial + own[:, None] * VALUE_PAD + value_column[None, :], sums)
        is_last = _is_last(arrived + program - row * heads, SPLITS)
        if is_last:
            peak, total, sums = _added(
                partial, peaks, totals, first, GROUPS_PAD, VALUE_PAD, SPLITS
            )  # fmt: skip
    else:
        # The logits were written by other threads of this program.
        tl.debug_barrier()
    if is_last:
        peak, total, rescale = _normalise(peak, total, sinks, first_query, group, GROUPS, SINKS)
        result = sums * (rescale / total)[:, None]
        goal = output + (head * GROUPS + group[:, None]) * VALUE_DIM + value_column[None, :]
        within = in_group[:, None] & in_value[None, :]
        tl.store(goal, result.to(output.dtype.element_ty), mask=within)
        _remember(
            logits, weights, memory, positions, head, slot, next_position, peak + tl.log(total),
            capacity, GROUPS, GROUPS_PAD, RANK_BLOCK, RECORD, REMEMBERS,
        )  # fmt: skip
        if COUNTS:
            _count(counts, arrived + heads, heads, slot)


def decode_step(
    step: Step,
    *,
    recent: int,
    scaling: float,
    softcap: float | None,
    record: str,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Writes one token per row, attends with its query, and remembers the attention.

    Args:
        step: the tensors; ``keys``, ``values``, ``positions``, ``memory`` and, unless weights are
            recorded, ``counts`` are changed.
        recent: tokens before the incoming one that are no victims.
        scaling: factor of the logits.
        softcap: bound of the logits; None: they are not bent.
        record: ``"nothing"``, ``"weights"`` of every query head, or ``"total"``: their mean over
            the group is added to ``memory``. Who asks for weights has yet to read them as those of
            this token, and counts it.
        splits: programs that share the slots of one head; None: as many as fill the device.

    Returns:
        The output ``[B, H * G, 1, D]`` and the weights ``[B, H, G, 1, S]`` float32, empty unless
        they are recorded.
    """
    batch, heads, capacity, dim = step.keys.shape
    value_dim, groups = step.values.shape[3], step.query.shape[1] // heads
    device = step.keys.device
    programs = batch * heads
    wanted = _splits(programs, capacity, device) if splits is None else splits
    pads = [max(16, triton.next_power_of_2(size)) for size in (groups, dim, value_dim)]
    groups_pad, dim_pad, value_pad = pads
    element = step.keys.element_size()
    block = max(16, min(128, _TILE_BYTES[element] // (element * max(dim_pad, value_pad))))
    split = triton.cdiv(triton.cdiv(capacity, wanted), block) * block
    parts = triton.cdiv(capacity, split)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    output = torch.empty(*step.query.shape[:3], value_dim, dtype=step.values.dtype, device=device)
    recorded = (batch, heads, groups, 1, capacity)
    weights = floats(*(recorded if record == "weights" else (0,)))
    # Where the weights go there is room for the logits.
    logits = floats(*recorded) if record == "total" else weights
    shared = programs if parts > 1 else 0
    peaks, totals = (floats(shared, parts, groups_pad) for _ in range(2))
    partial = floats(shared, parts, groups_pad, value_pad)
    remembers = step.memory.shape[2] > 0
    scores = step.memory if step.scores is None else step.scores.contiguous()
    sinks = step.memory if step.sinks is None else step.sinks
    slot = step.positions if step.slot is None else step.slot.contiguous()
    reals = step.positions if step.real is None else step.real.long()
    rank_block = min(_REMEMBERED // groups_pad, max(16, triton.next_power_of_2(capacity)))
    _attend_kernel[(programs, parts)](
        *(step.query.contiguous(), step.key.contiguous(), step.value.contiguous()),
        *(step.keys, step.values, step.positions, step.memory, step.arrived),
        *(step.counts, step.protected_prefix, slot, scores, sinks, reals),
        *(logits, weights, output, partial, peaks, totals),
        *(heads, capacity, split, recent, scaling, softcap or 1.0),
        GROUPS=groups,
        DIM=dim,
        VALUE_DIM=value_dim,
        GROUPS_PAD=groups_pad,
        DIM_PAD=dim_pad,
        VALUE_PAD=value_pad,
        BLOCK=block,
        RANK_BLOCK=rank_block,
        SPLITS=parts,
        CHOOSES=step.slot is None,
        SOFTCAP=softcap is not None,
        SINKS=step.sinks is not None,
        PADS=step.real is not None,
        RECORD=record,
        REMEMBERS=remembers,
        COUNTS=record != "weights",
        num_warps=_WARPS[element],
        num_stages=2,
    )
    return output, weights


def _splits(programs: int, capacity: int, device: torch.device) -> int:
    """How many programs share a head, so that the device has up to two for each processor."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = 2 * processors // programs
    return max(1, min(wanted, capacity // _SHORTEST_SPLIT))
