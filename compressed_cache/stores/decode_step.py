"""How a layer takes one token: into the slot of a victim, then attention, then the policy."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from compressed_cache.ops import attention, gradients
from compressed_cache.ops.eviction import where_real
from compressed_cache.ops.kernels import operators
from compressed_cache.ops.masks import Mask
from compressed_cache.stores import channels

if TYPE_CHECKING:
    from compressed_cache.layer import CompressedLayer


class NewToken(NamedTuple):
    """One token per row that comes in, and what is asked of the step."""

    query: Tensor
    """``[B, H * G, 1, D]``."""
    key: Tensor
    """``[B, H, 1, D]``."""
    value: Tensor
    """``[B, H, 1, D]``."""
    ranks: bool
    """Whether the slots are ranked before, for this step and the next ``interval - 1``."""
    weighs: bool = False
    """Whether the weights are wanted even where they must be made for it."""
    real: Tensor | None = None
    """``[B]`` bool, ``False`` in rows whose token is padding: they hold on to what they have. None:
    no row is padded."""
    mask: Mask | None = None
    """What the tokens see; None: all that is held."""


def step(layer: "CompressedLayer", token: NewToken) -> tuple[Tensor, Tensor | None]:
    """Puts one token per row into the slot of the victim, and attends with its query.

    Args:
        layer: a filled layer.
        token: what comes in.

    Returns:
        The output ``[B, H * G, 1, D]``, zero where a row is padded, and the attention weights
        ``[B, H, G, 1, S]`` float32, None where there are none.
    """
    query, key, value, ranks, weighs, real, mask = token
    traced = (query, key, value) if gradients.wants_gradient(query, key, value) else None
    # Detached everywhere: a graph through the slots would live as long as the cache.
    query, key, value = query.detach(), key.detach(), value.detach()
    planned = _planned_slot(layer, ranks, real)
    if layer.policy.merges:
        planned = _slot(layer, real) if planned is None else planned
        _merge(layer, planned, real)
    if layer.is_fused and traced is None and mask is None:
        output, weights = _fused(layer, query, key, value, planned, weighs, real)
    else:
        slot = _slot(layer, real) if planned is None else planned
        query, key = channels.ordered(layer, query), channels.ordered(layer, key)
        write(layer, key, value, slot, real)
        if layer.policy.num_notes:
            _note(layer, key, value, slot, real)
        keys, values = channels.whole_keys(layer, layer.next_position + 1), layer.values
        if traced is not None:
            own_query, own_key = (channels.ordered(layer, x) for x in traced[:2])
            traced = own_query, own_key, traced[2]
            keys, values = with_gradients(layer, (keys, values), traced, slot, real)
        own = query if traced is None else traced[0]
        own, keys = layer.attended(own, keys, layer.next_position[:, None], layer.positions)
        visible, bias = visible_slots(layer, mask)
        output, weights = attention.attend(own, keys, values, visible, layer.form, bias)
        _remember(layer, weights, real)
    record_query(layer, query, real)
    layer.count(real)
    if real is not None:
        output = output.masked_fill(~real[:, None, None, None], 0.0)
    return output, weights


def _fused(
    layer: "CompressedLayer",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot: Tensor | None,
    weighs: bool,
    real: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """All of it in one kernel, but for what only this policy does."""
    if slot is None and (layer.policy.num_notes or layer.policy.drops):
        # The notes of the new token go where it went.
        slot = _slot(layer, real)
    scores = None if slot is not None else layer.scores(layer.revised(real))
    if weighs or (layer.policy.observes_attention and not layer.policy.adds_attention):
        record = "weights"
    else:
        record = "total" if layer.policy.adds_attention else "nothing"
    output, weights = operators.decode_step(
        *(query, key, value, layer.keys, layer.values, layer.positions),
        *(layer.attention if layer.policy.num_rows == 1 else layer.attention[:, :, :0, 0],),
        *(layer.next_position, layer.protected_prefix, slot),
        # A tensor that is changed must not be given twice.
        None if scores is layer.attention else scores,
        layer.form.sinks,
        real,
        recent=layer.rules.recent,
        scaling=layer.form.scaling,
        softcap=layer.form.softcap,
        record=record,
    )
    if slot is not None and layer.policy.num_notes:
        _note(layer, key, value, slot, real)
    if record != "weights":
        return output, None
    if slot is not None and layer.policy.num_rows > 1:
        _forget(layer, slot, real)
    _remember(layer, weights, real)
    return output, weights


def visible_slots(layer: "CompressedLayer", mask: Mask | None) -> tuple[Tensor, Tensor | None]:
    """What a new token that was just written sees, ``[B, H, S]`` or ``[B, H, G | 1, S]`` bool, and
    what is added to its logits."""
    positions = layer.held_positions()
    if mask is None:
        return positions >= 0, None
    assert mask.past is not None and mask.own is not None
    # The token is among the slots by now.
    see = layer.see(Mask(None, torch.cat([mask.past, mask.own], dim=3)), positions)
    assert see is not None
    held = (positions >= 0).unsqueeze(2)
    visible, bias = see(held, held, 0)
    return visible.squeeze(3), None if bias is None else bias.squeeze(3)


def with_gradients(
    layer: "CompressedLayer",
    held: tuple[Tensor, Tensor],
    traced: tuple[Tensor, Tensor, Tensor],
    slot: Tensor,
    real: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Keys and values in the slots, with gradients to those ``[B, H, L, D]`` just written."""
    # The backward pass needs it, and it may be where the step counts.
    slot, both = slot.clone(), []
    for tensor, new in zip(held, traced[1:], strict=True):
        new = where_real(real, new.to(tensor.dtype), tensor.gather(2, _index(slot, tensor)))
        both.append(gradients.with_own(layer.constant(tensor, *traced), new, slot))
    return both[0], both[1]


def _planned_slot(layer: "CompressedLayer", ranks: bool, real: Tensor | None) -> Tensor | None:
    """The slot to overwrite, ``[B, H, 1]``, where that was decided in an earlier step."""
    if not layer.policy.evicts:
        return layer.free_slot.expand(*layer.positions.shape[:2], 1)
    if layer.rules.interval == 1:
        return None
    if ranks:
        layer.victims.copy_(layer.choose(ranked(layer, real), layer.rules.interval))
        # In every row: beams exchange theirs.
        layer.counts[:, 2].zero_()
    return layer.victims.index_select(2, layer.phase)


def _slot(layer: "CompressedLayer", real: Tensor | None) -> Tensor:
    return layer.choose(ranked(layer, real), 1)


def ranked(layer: "CompressedLayer", real: Tensor | None = None) -> Tensor:
    """Scores ``[B, H, S]`` with protection applied, once the policy dropped what it drops."""
    held = layer.revised(real)
    scores = layer.protected_scores(held)
    if layer.policy.drops:
        gone = layer.policy.dropped(held, scores) & (scores < torch.inf)
        gone = gone if real is None else gone & real[:, None, None]
        if layer.policy.merges:
            present = layer.positions >= 0
            evicted = layer.keys, layer.values, present & gone
            merged = layer.policy.merged(layer.keys, layer.values, present & ~gone, evicted)
            layer.values.copy_(merged)
        scores = scores.masked_fill(gone, -torch.inf)
        layer.drop(gone)
    return scores


def write(
    layer: "CompressedLayer", key: Tensor, value: Tensor, slot: Tensor, real: Tensor | None
) -> None:
    """Puts tokens ``[B, H, L, D]`` at the next position into slots ``[B, H, L]``."""
    if layer.policy.prunes_channels:
        key, tail = key.split([layer.keys.shape[3], layer.tails.shape[3]], dim=3)
        place = (layer.next_position % layer.tails.shape[2])[:, None, None].expand_as(slot)
        put(layer.tails, place, tail, real)
    put(layer.keys, slot, key, real)
    put(layer.values, slot, value, real)
    put(layer.positions, slot, layer.next_position[:, None, None].expand_as(slot), real)
    if layer.policy.observes_attention:
        _forget(layer, slot, real)


def put(memory: Tensor, slot: Tensor, new: Tensor, real: Tensor | None) -> None:
    """Overwrites ``[B, H, S, ...]`` with ``[B, H, L, ...]`` where tokens are real."""
    _scatter(memory, 2, _index(slot, memory), new, real)


def _scatter(memory: Tensor, dim: int, index: Tensor, new: Tensor, real: Tensor | None) -> None:
    # Without padding nothing is read, which keeps the write in place in a compiled step.
    if real is not None:
        new = where_real(real, new, memory.gather(dim, index))
    memory.scatter_(dim, index, new)


def _merge(layer: "CompressedLayer", slot: Tensor, real: Tensor | None) -> None:
    """Puts what is about to be overwritten into the values of others."""
    held = layer.positions >= 0
    tensors = layer.keys, layer.values, held
    key, value, present = (tensor.gather(2, _index(slot, tensor)) for tensor in tensors)
    present = present if real is None else present & real[:, None, None]
    others = held.scatter(2, slot, False)
    merged = layer.policy.merged(layer.keys, layer.values, others, (key, value, present))
    layer.values.copy_(where_real(real, merged, layer.values))


def _index(slot: Tensor, tensor: Tensor) -> Tensor:
    """Slots ``[B, H, L]`` as an index of ``[B, H, S]`` or ``[B, H, S, D]``."""
    return slot if tensor.dim() == 3 else slot.unsqueeze(-1).expand(*slot.shape, tensor.shape[3])


def _forget(layer: "CompressedLayer", slot: Tensor, real: Tensor | None) -> None:
    if real is None:
        layer.attention.scatter_(2, _index(slot, layer.attention), 0.0)
    else:
        nothing = layer.attention.new_zeros(()).expand(*slot.shape, *layer.attention.shape[3:])
        put(layer.attention, slot, nothing, real)


def _note(
    layer: "CompressedLayer", key: Tensor, value: Tensor, slot: Tensor, real: Tensor | None
) -> None:
    notes = layer.note(key, value, layer.next_position[:, None, None].expand_as(slot))
    put(layer.notes, slot, notes, real)


def _remember(layer: "CompressedLayer", weights: Tensor, real: Tensor | None) -> None:
    if layer.policy.observes_attention:
        weights = weights.detach().nan_to_num(0.0)
        own = layer.next_position[:, None]
        seen = layer.accumulate(layer.attention, weights, own, layer.positions)
        layer.attention.copy_(where_real(real, seen, layer.attention))


def record_query(layer: "CompressedLayer", query: Tensor, real: Tensor | None) -> None:
    """Writes a query ``[B, H * G, 1, D]`` to its place in the ring."""
    if layer.policy.num_queries:
        place = (layer.next_position % layer.query_positions.shape[1])[:, None]
        grouped = attention.group_queries(channels.kept(layer, query), layer.keys.shape[1])
        index = place[:, None, None, :, None].expand_as(grouped)
        _scatter(layer.queries, 3, index, grouped.to(layer.queries.dtype), real)
        _scatter(layer.query_positions, 1, place, layer.next_position[:, None], real)
