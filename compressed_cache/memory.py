"""The tensors of one layer: allocated once, changed only in place."""

import torch
from torch import Tensor

from compressed_cache.policies import Policy
from compressed_cache.rules import Rules

_SMALLEST_CAPACITY = 256


class SlotMemory:
    """What one layer keeps between two steps; addresses hold as long as the shapes do.

    Attributes:
        keys, values: ``[B, H, S, D]`` in the dtype of the model.
        positions: ``[B, H, S]`` int64, position of the token in each slot, ``-1`` where empty.
        next_position: ``[B]`` int64, position of the incoming token of each row.
        protected_prefix: ``[B]`` int64, positions below it are never evicted.
        tokens_seen: 0-d int64, tokens seen by every row, padding included.
        victims, phase: ``[B, H, interval]`` and ``[1]`` int64, the slots to overwrite next, lowest
            first, and which of them is due (read with ``interval > 1``).
        attention: ``[B, H, S]`` float32, what the policy made of the attention seen; without slots
            unless it asks for it.
        queries, query_positions: ``[B, H, G, W, D]`` and ``[B, W]`` int64, a ring of the last
            queries, ``W = 0`` unless the policy asks for it.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    next_position: Tensor
    protected_prefix: Tensor
    tokens_seen: Tensor
    victims: Tensor
    phase: Tensor
    attention: Tensor
    queries: Tensor
    query_positions: Tensor

    def __init__(self, policy: Policy, rules: Rules) -> None:
        self.policy = policy
        self.rules = rules

    def provide(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Allocates slots for a prompt ``[B, H * G | H, L, D]``, or keeps those that fit."""
        batch, heads, length, dim = key.shape
        capacity = self.rules.budget if self.policy.evicts else _capacity(length + 1)
        keys = vars(self).get("keys")
        wanted = (batch, heads, capacity, dim), key.dtype, key.device
        if keys is None or (keys.shape, keys.dtype, keys.device) != wanted:
            self._allocate(key, value, capacity, num_groups=query.shape[1] // heads)

    def grow(self, tokens: int) -> None:
        """Doubles the slots until so many tokens fit (policies that do not evict)."""
        capacity = _capacity(tokens)
        kept = {name: getattr(self, name) for name in ("keys", "values", "positions")}
        if capacity <= kept["keys"].shape[2]:
            return
        rest = {
            name: getattr(self, name)
            for name in ("next_position", "protected_prefix", "tokens_seen")
        }
        self._allocate(kept["keys"], kept["values"], capacity, num_groups=0)
        for name, tensor in kept.items():
            getattr(self, name)[:, :, : tensor.shape[2]].copy_(tensor)
        for name, tensor in rest.items():
            getattr(self, name).copy_(tensor)

    def clear(self) -> None:
        """Forgets all tokens and keeps the memory."""
        for tensor in self.tensors():
            tensor.zero_()
        if "positions" in vars(self):
            self.positions.fill_(-1)
            self.query_positions.fill_(-1)

    def reorder(self, rows: Tensor) -> None:
        """Row ``b`` becomes a copy of row ``rows[b]``."""
        shared = (self.tokens_seen, self.phase)
        for tensor in self.tensors():
            if not any(tensor is other for other in shared):
                tensor.copy_(tensor.index_select(0, rows.to(tensor.device)))

    def tensors(self) -> list[Tensor]:
        """Everything this layer keeps in memory."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def _allocate(self, keys: Tensor, values: Tensor, capacity: int, *, num_groups: int) -> None:
        batch, heads, _, dim = keys.shape

        def full(*shape: int, dtype: torch.dtype = torch.int64, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=dtype, device=keys.device)

        self.keys = full(batch, heads, capacity, dim, dtype=keys.dtype)
        self.values = full(batch, heads, capacity, values.shape[-1], dtype=values.dtype)
        self.positions = full(batch, heads, capacity, fill=-1)
        self.next_position = full(batch)
        self.protected_prefix = full(batch)
        self.tokens_seen = full()
        self.phase = full(1)
        self.victims = full(batch, heads, self.rules.interval)
        remembered = capacity if self.policy.observes == "attention" else 0
        self.attention = full(batch, heads, remembered, dtype=torch.float32)
        window = self.policy.num_queries
        self.queries = full(batch, heads, num_groups, window, dim, dtype=keys.dtype)
        self.query_positions = full(batch, window, fill=-1)
        if not torch.compiler.is_compiling():
            # Without it every in-place write would make the compiler give up CUDA graphs.
            for tensor in self.tensors():
                torch._dynamo.mark_static_address(tensor)


def _capacity(tokens: int) -> int:
    """The smallest power of two, at least 256, that holds so many tokens."""
    return max(_SMALLEST_CAPACITY, 1 << (tokens - 1).bit_length())
