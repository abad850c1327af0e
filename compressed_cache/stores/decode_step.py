"""The way of one token through a layer: fetch, rank, merge, write, attend, observe, count.

Only some stores fetch, and only some policies merge."""

from torch import Tensor

from compressed_cache.ops.kernels import operators
from compressed_cache.ops.rerotation import rerotate_to_ranks
from compressed_cache.ops.tokens import gather
from compressed_cache.stores.inputs import NewToken
from compressed_cache.stores.slots import SlotStore
from compressed_cache.stores.traced import traced_in, with_gradients


def decode_step(store: SlotStore, token: NewToken) -> tuple[Tensor, Tensor | None]:
    """Puts one token per row into the slot of the victim, and attends with its query.

    Args:
        store: one that holds a prompt.
        token: what comes in.

    Returns:
        The output ``[B, H * G, 1, D]``, zero where a row is padded, and the attention weights
        ``[B, H, G, 1, S]`` float32, None where there are none.
    """
    query, key, value, ranks, _, real, mask, hidden = token
    traced = traced_in(store, query, key, value)
    # Detached everywhere: a graph through the slots would live as long as the cache.
    query, key, value = query.detach(), key.detach(), value.detach()
    store.fetch(query)
    # Rank. None: the victim is the lowest of this very step.
    slot = store.slots_due(ranks, real)
    if store.bound.merging is not None:
        slot = store.lowest(1, real) if slot is None else slot
        _merge(store, slot, real)
    if store.is_fused and traced is None and mask is None:
        output, weights = _fused(store, token, slot)
    else:
        slot = store.lowest(1, real) if slot is None else slot
        query, key = store.ordered(query), store.ordered(key)
        store.write(key, value, slot, real)
        store.write_notes(key, value, slot, real, hidden)
        keys, values = store.whole_keys(written=1), store.tokens.values
        own = query
        if traced is not None:
            own = store.ordered(traced[0])
            keys, values = with_gradients(store, (keys, values), traced, slot, real)
        if store.bound.rerotates:
            own, keys = rerotate_to_ranks(
                own,
                keys,
                query_positions=store.next_position[:, None],
                positions=store.tokens.positions,
                constants=store.bound.constants,
            )
        output, weights = store.attend(own, keys, values, mask)
        store.observe(weights, real)
        store.record_query(query, real)
        store.count_step(real)
    if real is not None:
        output = output.masked_fill(~real[:, None, None, None], 0.0)
    return output, weights


def _fused(store: SlotStore, token: NewToken, slot: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """All of it in one kernel, but for what only this policy does."""
    query, key, value, _, wants_weights, real, _, hidden = token
    bound, tokens = store.bound, store.tokens
    if slot is None and (bound.needs.notes or bound.dropping is not None):
        # The notes of the new token go where it went.
        slot = store.lowest(1, real)
    scores = None if slot is not None else store.scores(store.revised(1, real))
    # Before the kernel counts the token.
    if slot is not None:
        store.write_notes(key, value, slot, real, hidden)
    store.record_query(query, real)
    record = "total" if bound.adds_attention else "nothing"
    if wants_weights or (bound.observer is not None and not bound.adds_attention):
        record = "weights"
    state = tokens.attention_state
    output, weights = operators.decode_step(
        *(query, key, value, tokens.keys, tokens.values, tokens.positions),
        *(state if state.dim() == 3 else state[:, :, :0, 0],),
        *(store.arrived, store.counts, store.protected_prefix, slot),
        # A tensor that is changed must not be given twice.
        None if scores is state else scores,
        bound.transform.sinks,
        real,
        recent=bound.eviction.recent,
        scaling=bound.transform.scaling,
        softcap=bound.transform.softcap,
        record=record,
    )
    if record != "weights":
        return output, None
    if slot is not None and state.dim() > 3:
        store.forget(slot, real)
    store.observe(weights, real)
    store.count_step(real)
    return output, weights


def _merge(store: SlotStore, slot: Tensor, real: Tensor | None) -> None:
    """Puts what is about to be overwritten into the values of others."""
    keys, values, positions = store.tokens[:3]
    held = positions >= 0
    key, value, present = (gather(tensor, slot) for tensor in (keys, values, held))
    present = present if real is None else present & real[:, None, None]
    store.merge(held.scatter(2, slot, False), (key, value, present), real)
