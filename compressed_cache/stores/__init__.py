"""Where a layer keeps its tokens: four stores behind one protocol, and how they are read.

:class:`~compressed_cache.stores.slots.SlotStore` is the protocol and the plain store; the others
override what is different. :mod:`~compressed_cache.stores.decode_step` is the way of one token,
:mod:`~compressed_cache.stores.prefill` that of a prompt.
"""

from compressed_cache.stores.lazy import LazyStore
from compressed_cache.stores.offloaded import OffloadedStore
from compressed_cache.stores.pool import PoolStore
from compressed_cache.stores.slots import SlotStore

STORES: dict[str, type[SlotStore]] = {
    "slots": SlotStore,
    "offloaded": OffloadedStore,
    "pool": PoolStore,
    "lazy": LazyStore,
}
"""By :attr:`Policy.store <compressed_cache.policies.base.Policy.store>`."""
