"""The way of a prompt through a layer: the first one, and a further one or the next chunk."""

import torch
from torch import Tensor

from compressed_cache.ops import attention
from compressed_cache.ops.rerotation import rerotate_to_ranks
from compressed_cache.stores import prompt_blocks
from compressed_cache.stores.inputs import AttentionInputs
from compressed_cache.stores.prompt_attention import observed
from compressed_cache.stores.slots import SlotStore
from compressed_cache.stores.traced import constant


def prefill(store: SlotStore, inputs: AttentionInputs, seen: Tensor | None = None) -> None:
    """Takes the first prompt and keeps its best tokens; the model computes its output.

    Args:
        store: an empty one.
        inputs: the prompt, without gradients.
        seen: what the policy makes of its attention, where it is known.
    """
    store.prepare(inputs)
    query, key, value, real, mask, hidden = inputs
    positions = inputs.positions(0)
    store.next_position.copy_(real.sum(dim=1))
    store.counts[:, 1] = key.shape[2]
    if seen is None and store.bound.observer is not None:
        seen = observed(store, query, key, positions, mask)
    _observe_queries(store, query, positions)
    store.protect_prefix(None)
    tokens = store.new_tokens(key, value, positions, hidden)
    if seen is not None:
        tokens = tokens._replace(attention_state=seen)
    _end_prompt(store)
    scores = None
    if store.bound.prompt_block is not None or store.bound.pruning is not None:
        scores, tokens = prompt_blocks.rank(store, query, tokens, positions)
        store.choose_channels(query, real, tokens, scores)
    query, key = store.ordered(query), store.ordered(key)
    store.record_channels(key, positions)
    store.record_queries(query, positions)
    store.keep(tokens._replace(keys=store.kept(key)), scores)


def prefill_chunk(
    store: SlotStore,
    inputs: AttentionInputs,
    *,
    is_first_prompt: bool,
    wants_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """A further prompt, or the next chunk of one, attends over the slots and over itself.

    Then the tokens held and the new ones are ranked together and the best are kept. Until then no
    more than the slots and the new tokens are in memory.

    Args:
        store: one that holds a prompt.
        inputs: the new tokens.
        is_first_prompt: whether they go on with the first prompt.
        wants_weights: whether the weights are returned.

    Returns:
        The output ``[B, L, H * G, D]`` and the weights ``[B, H * G, L, S + L]`` over what was held
        and then the new tokens, or None.
    """
    query, key, value, real, mask, hidden = inputs
    bound = store.bound
    count = real.sum(dim=1)
    positions = inputs.positions(store.next_position[:, None])
    store.choose_late_channels(query.detach(), key.detach(), positions)
    held, held_keys = store.held_for_chunk(inputs, is_first_prompt=is_first_prompt)
    query, key = store.ordered(query), store.ordered(key)
    known, known_values = (
        constant(store, tensor, query, key, value) for tensor in (held_keys, held.values)
    )
    keys, values = torch.cat([known, key], dim=2), torch.cat([known_values, value], dim=2)
    # A graph through the slots would live as long as the cache.
    new = store.new_tokens(store.kept(key.detach()), value.detach(), positions, hidden)
    tokens = held.cat(new)
    before = tokens.attention_state

    def observe(weights: Tensor, own: Tensor) -> None:
        nonlocal tokens
        if bound.observer is not None:
            state = tokens.attention_state
            state = bound.accumulate(state, weights.detach(), own, tokens.positions)
            tokens = tokens._replace(attention_state=state)

    own = query
    if bound.rerotates:
        own, keys = rerotate_to_ranks(
            query,
            keys,
            query_positions=positions,
            positions=tokens.positions,
            constants=bound.constants,
        )
    rows = attention.attention_rows(
        own,
        keys,
        query_positions=positions,
        positions=tokens.positions,
        transform=bound.transform,
        window=bound.window,
        see=store.see(mask, held.positions),
    )
    result = attention.read_values(rows, values, wants_weights=wants_weights, observe=observe)
    if bound.observer is not None:
        # A row that only had padding saw nothing new.
        saw = (count > 0).view(-1, *[1] * (before.dim() - 1))
        state = torch.where(saw, tokens.attention_state, before)
        tokens = tokens._replace(attention_state=state)
    query, key = query.detach(), key.detach()
    store.next_position.add_(count)
    store.record_channels(key, positions)
    store.record_queries(query, positions)
    if is_first_prompt:
        _observe_queries(store, inputs.query.detach(), positions)
        _end_prompt(store)
    store.keep_chunk(tokens, new, is_first_prompt=is_first_prompt)
    store.counts[:, 1] += key.shape[2]
    return result


def _observe_queries(store: SlotStore, query: Tensor, positions: Tensor) -> None:
    grouped = attention.group_queries(query, store.num_heads)
    for name, seen in store.bound.observe_queries(store.query_state, grouped, positions).items():
        store.query_state[name].copy_(seen)


def _end_prompt(store: SlotStore) -> None:
    store.prompt_length.copy_(store.next_position)
    store.protect_prefix(store.next_position)
