"""Choosing anew among all tokens of a text, where somebody still has those that were evicted."""

import torch
from torch import Tensor

from compressed_cache.policies import Policy
from compressed_cache.policies.capabilities import (
    MergesValues,
    PrunesChannels,
    Rerotates,
    find,
    needs_of,
)
from compressed_cache.stores.slots import SlotStore


def refresh(store: SlotStore, key: Tensor, value: Tensor, real: Tensor) -> None:
    """Keeps the best of all tokens of the text, also of those that were evicted.

    Args:
        store: one that has read the text, of a policy that :func:`can_refresh`.
        key: ``[B, H, T, D]``.
        value: ``[B, H, T, D]``.
        real: ``[B, T]`` bool, ``False`` at padding.
    """
    if key.shape[2] <= store.tokens.positions.shape[2]:
        # Nothing can have been evicted.
        return
    positions = torch.where(real, real.cumsum(dim=1) - 1, -1)
    store.keep(store.new_tokens(key, value, positions))


def can_refresh(policy: Policy) -> bool:
    """Whether keys, values and the last queries say all that its ranking looks at, so that a token
    is worth what it would be if it had never been evicted."""
    needs, others = needs_of(policy), (MergesValues, PrunesChannels, Rerotates)
    return (
        policy.store == "slots"
        and not (needs.attention or needs.notes)
        and not any(find(policy, other) for other in others)
    )
