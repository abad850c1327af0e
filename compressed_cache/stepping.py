"""How a layer takes one token: into the slot of a victim, then attention, then the policy."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressed_cache import attention, channels
from compressed_cache.kernels import ops

if TYPE_CHECKING:
    from compressed_cache.layer import CompressedLayer


def step(
    layer: "CompressedLayer",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    ranks: bool,
    weighs: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Puts one token per row into the slot of the victim, and attends with its query.

    Args:
        layer: a filled layer.
        query: ``[B, H * G, 1, D]``.
        key: ``[B, H, 1, D]``.
        value: ``[B, H, 1, D]``.
        ranks: whether the slots are ranked before, for this step and the next ``interval - 1``.
        weighs: whether the weights are wanted even where they must be made for it.

    Returns:
        The output ``[B, H * G, 1, D]`` and the attention weights ``[B, H, G, 1, S]`` float32, None
        where there are none.
    """
    # Detached everywhere: a graph through the slots would live as long as the cache.
    key, value = key.detach(), value.detach()
    planned = _planned_slot(layer, ranks)
    if layer.policy.merges:
        planned = _slot(layer) if planned is None else planned
        _merge(layer, planned)
    if layer.is_fused and not query.requires_grad:
        output, weights = _fused(layer, query, key, value, planned, weighs)
    else:
        query, key = channels.ordered(layer, query), channels.ordered(layer, key)
        slot = _slot(layer) if planned is None else planned
        write(layer, key, value, slot)
        if layer.policy.num_notes:
            _note(layer, key, value, slot)
        keys = channels.whole_keys(layer, layer.next_position + 1)
        seen, keys = layer.attended(query, keys, layer.next_position[:, None], layer.positions)
        output, weights = attention.attend(
            seen, keys, layer.values, layer.positions >= 0, layer.form
        )
        _remember(layer, weights)
    record_query(layer, query.detach())
    layer.counts.add_(1)
    return output, weights


def _fused(
    layer: "CompressedLayer",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot: Tensor | None,
    weighs: bool,
) -> tuple[Tensor, Tensor | None]:
    """All of it in one kernel, but for what only this policy does."""
    if slot is None and (layer.policy.num_notes or layer.policy.drops):
        # The notes of the new token go where it went.
        slot = _slot(layer)
    scores = None if slot is not None else layer.scores(layer.revised())
    if weighs or (layer.policy.observes_attention and not layer.policy.adds_attention):
        record = "weights"
    else:
        record = "total" if layer.policy.adds_attention else "nothing"
    output, weights = ops.decode_step(
        *(query, key, value, layer.keys, layer.values, layer.positions),
        *(layer.attention if layer.policy.num_rows == 1 else layer.attention[:, :, :0, 0],),
        *(layer.next_position, layer.protected_prefix, slot),
        # A tensor that is changed must not be given twice.
        None if scores is layer.attention else scores,
        layer.form.sinks,
        recent=layer.rules.recent,
        scaling=layer.form.scaling,
        softcap=layer.form.softcap,
        record=record,
    )
    if slot is not None and layer.policy.num_notes:
        _note(layer, key, value, slot)
    if record != "weights":
        return output, None
    if slot is not None and layer.policy.num_rows > 1:
        _forget(layer, slot)
    _remember(layer, weights)
    return output, weights


def _planned_slot(layer: "CompressedLayer", ranks: bool) -> Tensor | None:
    """The slot to overwrite, ``[B, H, 1]``, where that was decided in an earlier step."""
    if not layer.policy.evicts:
        return layer.free_slot.expand(*layer.positions.shape[:2], 1)
    if layer.rules.interval == 1:
        return None
    if ranks:
        layer.victims.copy_(layer.choose(ranked(layer), layer.rules.interval))
        # In every row: beams exchange theirs.
        layer.counts[:, 2].zero_()
    return layer.victims.index_select(2, layer.phase)


def _slot(layer: "CompressedLayer") -> Tensor:
    return layer.choose(ranked(layer), 1)


def ranked(layer: "CompressedLayer") -> Tensor:
    """Scores ``[B, H, S]`` with protection applied, once the policy dropped what it drops."""
    held = layer.revised()
    scores = layer.protected_scores(held)
    if layer.policy.drops:
        gone = layer.policy.dropped(held, scores) & (scores < torch.inf)
        if layer.policy.merges:
            present = layer.positions >= 0
            evicted = layer.keys, layer.values, present & gone
            merged = layer.policy.merged(layer.keys, layer.values, present & ~gone, evicted)
            layer.values.copy_(merged)
        scores = scores.masked_fill(gone, -torch.inf)
        layer.drop(gone)
    return scores


def write(layer: "CompressedLayer", key: Tensor, value: Tensor, slot: Tensor) -> None:
    """Puts tokens ``[B, H, L, D]`` at the next position into slots ``[B, H, L]``."""
    if layer.policy.prunes_channels:
        key, tail = key.split([layer.keys.shape[3], layer.tails.shape[3]], dim=3)
        place = (layer.next_position % layer.tails.shape[2])[:, None, None, None]
        layer.tails.scatter_(2, place.expand_as(tail), tail)
    layer.keys.scatter_(2, slot.unsqueeze(-1).expand_as(key), key)
    layer.values.scatter_(2, slot.unsqueeze(-1).expand_as(value), value)
    layer.positions.scatter_(2, slot, layer.next_position[:, None, None].expand_as(slot))
    if layer.policy.observes_attention:
        _forget(layer, slot)


def _merge(layer: "CompressedLayer", slot: Tensor) -> None:
    """Puts what is about to be overwritten into the values of others."""
    held = layer.positions >= 0
    tensors = layer.keys, layer.values, held
    key, value, present = (tensor.gather(2, _index(slot, tensor)) for tensor in tensors)
    others = held.scatter(2, slot, False)
    merged = layer.policy.merged(layer.keys, layer.values, others, (key, value, present))
    layer.values.copy_(merged)


def _index(slot: Tensor, tensor: Tensor) -> Tensor:
    slot = slot.reshape(*slot.shape, *[1] * (tensor.dim() - 3))
    return slot.expand(*slot.shape[:3], *tensor.shape[3:])


def _forget(layer: "CompressedLayer", slot: Tensor) -> None:
    layer.attention.scatter_(2, _index(slot, layer.attention), 0.0)


def _note(layer: "CompressedLayer", key: Tensor, value: Tensor, slot: Tensor) -> None:
    notes = layer.note(key, value, layer.next_position[:, None, None].expand_as(slot))
    layer.notes.scatter_(2, slot.unsqueeze(-1).expand_as(notes), notes)


def _remember(layer: "CompressedLayer", weights: Tensor) -> None:
    if layer.policy.observes_attention:
        weights = weights.detach().nan_to_num(0.0)
        own = layer.next_position[:, None]
        layer.attention.copy_(layer.accumulate(layer.attention, weights, own, layer.positions))


def record_query(layer: "CompressedLayer", query: Tensor) -> None:
    """Writes a query ``[B, H * G, 1, D]`` to its place in the ring."""
    if layer.policy.num_queries:
        place = (layer.next_position % layer.query_positions.shape[1])[:, None]
        grouped = attention.group_queries(channels.kept(layer, query), layer.keys.shape[1])
        layer.queries.scatter_(3, place[:, None, None, :, None].expand_as(grouped), grouped)
        layer.query_positions.scatter_(1, place, layer.next_position[:, None])
