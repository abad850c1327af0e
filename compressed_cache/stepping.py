"""How a layer takes one token: into the slot of a victim, then attention, then the policy."""

from typing import TYPE_CHECKING

from torch import Tensor

from compressed_cache import attention, slots

if TYPE_CHECKING:
    from compressed_cache.layer import CompressedLayer


def write(layer: "CompressedLayer", key: Tensor, value: Tensor, *, ranks: bool) -> None:
    """Puts one token ``[B, H, 1, D]`` into the slot of the victim.

    Args:
        layer: a filled layer.
        key: ``[B, H, 1, D]``.
        value: ``[B, H, 1, D]``.
        ranks: whether the slots are ranked before, for this step and the next ``interval - 1``.
    """
    slot = _victim(layer, ranks)
    layer.keys.scatter_(2, slot.unsqueeze(-1).expand_as(key), key)
    layer.values.scatter_(2, slot.unsqueeze(-1).expand_as(value), value)
    layer.positions.scatter_(2, slot, layer.next_position[:, None, None].expand_as(slot))
    if layer.policy.observes == "attention":
        layer.attention.scatter_(2, slot, 0.0)


def observe(layer: "CompressedLayer", query: Tensor) -> tuple[Tensor, Tensor]:
    """Attends with one query ``[B, H * G, 1, D]`` and remembers what the policy asked for.

    Returns:
        The output ``[B, H * G, 1, D]`` and the attention weights ``[B, H, G, 1, S]`` float32.
    """
    output, weights = attention.attend(
        query, layer.keys, layer.values, layer.positions >= 0, layer.form
    )
    query = query.detach()
    if layer.policy.observes == "attention":
        seen = layer.accumulate(layer.attention, weights.detach().nan_to_num(0.0))
        layer.attention.copy_(seen)
    if layer.policy.observes == "queries":
        place = (layer.next_position % layer.query_positions.shape[1])[:, None]
        grouped = attention.group_queries(query, layer.keys.shape[1])
        layer.queries.scatter_(3, place[:, None, None, :, None].expand_as(grouped), grouped)
        layer.query_positions.scatter_(1, place, layer.next_position[:, None])
    layer.next_position.add_(1)
    layer.tokens_seen.add_(1)
    return output, weights


def _victim(layer: "CompressedLayer", ranks: bool) -> Tensor:
    """The slot to overwrite, ``[B, H, 1]``, from what is known before the step."""
    if not layer.policy.evicts:
        return layer.tokens_seen.expand(*layer.positions.shape[:2], 1)
    if layer.rules.interval == 1:
        return slots.lowest_slot(layer.scores(layer.held()), layer.positions)
    if ranks:
        victims = slots.next_victims(
            layer.scores(layer.held()),
            layer.positions,
            protected_prefix=layer.protected_prefix,
            count=layer.rules.interval,
        )
        layer.victims.copy_(victims)
        layer.phase.zero_()
    slot = layer.victims.index_select(2, layer.phase)
    layer.phase.add_(1)
    return slot
