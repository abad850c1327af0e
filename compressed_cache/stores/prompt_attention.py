"""What a policy is shown of the attention of a first prompt."""

import torch
from torch import Tensor

from compressed_cache.ops import attention
from compressed_cache.ops.attention_sums import attend_and_sum, attention_sums
from compressed_cache.ops.masks import Mask, is_causal
from compressed_cache.stores import prompt_blocks
from compressed_cache.stores.inputs import AttentionInputs
from compressed_cache.stores.slots import SlotStore


def observed(
    store: SlotStore, query: Tensor, key: Tensor, positions: Tensor, mask: Mask | None
) -> Tensor:
    """What the policy makes of the attention of a first prompt, or of that within its blocks."""
    length = store.bound.prompt_block
    if length is None:
        return _at_once(store, query, key, positions, mask)
    state = store.tokens.attention_state
    state = state.new_zeros(*key.shape[:3], *state.shape[3:])
    for block in prompt_blocks.split(positions, length):
        own = _at_once(store, block.take(query), block.take(key), block.positions, None)
        state = block.put(state, own)
    return state


def attend(store: SlotStore, inputs: AttentionInputs) -> tuple[Tensor, Tensor] | None:
    """The attention of a first prompt, and what the policy makes of it, made in one pass.

    Returns:
        ``[B, L, H * G, D]`` and the same as :func:`observed`. None where no such pass serves.
    """
    bound, (query, key, value, real, mask, _) = store.bound, inputs
    if not bound.adds_attention or bound.prompt_block is not None or not is_causal(mask, real):
        return None
    return attend_and_sum(query, key, value, real, transform=bound.transform)


def _at_once(
    store: SlotStore, query: Tensor, key: Tensor, positions: Tensor, mask: Mask | None
) -> Tensor:
    """The same of all these tokens, ``[B, H, L]`` or ``[B, H, L, R]``."""
    bound, see = store.bound, None
    if mask is not None and not is_causal(mask, positions >= 0):
        see = store.see(mask, positions.new_zeros(*key.shape[:2], 0))
    elif bound.adds_attention:
        assert store.sizes is not None
        sums = attention_sums(
            query, key, positions >= 0, transform=bound.transform, sizes=store.sizes
        )
        if sums is not None:
            return sums
    shape = *key.shape[:3], *store.tokens.attention_state.shape[3:]
    state = torch.zeros(shape, dtype=torch.float32, device=key.device)
    for weights, own in attention.attention_rows(
        query,
        key,
        query_positions=positions,
        positions=positions[:, None],
        transform=bound.transform,
        last=bound.needs.prompt_queries,
        see=see,
    ):
        state = bound.accumulate(state, weights, own, positions[:, None].expand(key.shape[:3]))
    return state
