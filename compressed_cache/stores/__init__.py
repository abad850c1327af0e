"""Where a layer keeps its tokens: six stores behind one protocol, and how they are read.

:class:`~compressed_cache.stores.slots.SlotStore` is the protocol and the plain store; the others
override what is different. :mod:`~compressed_cache.stores.decode_step` is the way of one token,
:mod:`~compressed_cache.stores.prefill` that of a prompt.
"""

from compressed_cache.policies.budgets import is_per_head
from compressed_cache.policies.capabilities import find_store
from compressed_cache.stores.bound_policy import BoundPolicy
from compressed_cache.stores.growing import GrowingStore
from compressed_cache.stores.lazy import LazyStore
from compressed_cache.stores.offloaded import OffloadedStore
from compressed_cache.stores.pool import PoolStore
from compressed_cache.stores.pruned import PrunedLazyStore, PrunedStore
from compressed_cache.stores.slots import SlotStore

STORES: dict[str, type[SlotStore]] = {
    "slots": SlotStore,
    "offloaded": OffloadedStore,
    "pool": PoolStore,
    "lazy": LazyStore,
}
"""By :attr:`Policy.store <compressed_cache.policies.base.Policy.store>`."""


def store_for(bound: BoundPolicy) -> type[SlotStore]:
    """What keeps the tokens of a layer."""
    kind = STORES[find_store(bound.policy)]
    if not bound.policy.evicts:
        return GrowingStore if kind is SlotStore else kind
    if is_per_head(bound.eviction.budget):
        kind = PoolStore
    if bound.pruning is None:
        return kind
    return PrunedLazyStore if kind is LazyStore else PrunedStore
