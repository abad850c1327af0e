"""The tensors of one layer: allocated once, changed only in place."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from compressed_cache.policies import Policy
from compressed_cache.policies.eviction_config import Rules

_SMALLEST_CAPACITY = 256


class Sizes(NamedTuple):
    """What decides the shapes, dtypes and device of a layer's tensors."""

    batch: int
    heads: int
    groups: int
    capacity: int
    dim: int
    value_dim: int
    dtype: torch.dtype
    value_dtype: torch.dtype
    device: torch.device
    context: int = 0
    """Tokens that fit off the device."""


class SlotMemory:
    """What one layer keeps between two steps; addresses hold as long as the sizes do.

    Attributes:
        keys, values: ``[B, H, S, D]`` in the dtype of the model.
        channels, tails: ``[B, H, D]`` int64 and ``[B, H, R, D - D']``, empty unless the policy
            prunes channels: then ``keys`` and ``queries`` have ``D'`` of them, in an order that is
            ``channels``, and ``tails`` is a ring with the others of the last tokens, see
            :mod:`compressed_cache.stores.channels`.
        positions: ``[B, H, S]`` int64, position of the token in each slot, ``-1`` where empty.
        counts: ``[B, 3]`` int64, for each row the position of the incoming token, the tokens seen,
            padding included, and which of the victims is due: one tensor, so that a step counts in
            one launch.
        protected_prefix: ``[B]`` int64, positions below it are never evicted.
        victims: ``[B, H, interval]`` int64, the slots to overwrite next, lowest first (read with
            ``interval > 1``).
        prompt_length: ``[B]`` int64, tokens of the first prompt.
        attention: ``[B, H, S]`` or ``[B, H, S, R]`` float32, what the policy made of the attention
            seen; without slots unless it asks for it.
        notes: ``[B, H, S, N]`` float32, what the policy wrote down of each token.
        queries, query_positions: ``[B, H, G, W, D]`` and ``[B, W]`` int64, a ring of the last
            queries, that of position ``p`` at ``p % W``; ``W = 0`` unless the policy asks for it.
    """

    keys: Tensor
    values: Tensor
    channels: Tensor
    tails: Tensor
    positions: Tensor
    counts: Tensor
    protected_prefix: Tensor
    prompt_length: Tensor
    victims: Tensor
    attention: Tensor
    notes: Tensor
    queries: Tensor
    query_positions: Tensor

    def __init__(self, policy: Policy, rules: Rules) -> None:
        self.policy = policy
        self.rules = rules
        self.budget = 0
        """Slots of every head; of the one with the fewest where they differ."""
        self.head_budgets: tuple[int, ...] = ()
        """Slots of each head where they differ."""
        self.sizes: Sizes | None = None

    @property
    def next_position(self) -> Tensor:
        """``[B]`` int64, position of the incoming token of each row."""
        return self.counts[:, 0]

    @property
    def tokens_seen(self) -> Tensor:
        """0-d int64, tokens seen by every row, padding included."""
        return self.counts[0, 1]

    @property
    def phase(self) -> Tensor:
        """``[1]`` int64, which of the victims is due."""
        return self.counts[:1, 2]

    @property
    def free_slot(self) -> Tensor:
        """0-d int64, the slot of the incoming token (policies that do not evict)."""
        return self.tokens_seen

    @property
    def offloaded_bytes(self) -> int:
        """Bytes held off the device."""
        return 0

    @property
    def slots_per_head(self) -> int:
        """Slots of a head, on average."""
        assert self.sizes is not None
        return self.positions[0].numel() // self.sizes.heads

    def provide(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Allocates slots for a prompt ``[B, H * G | H, L, D]``, or keeps those that fit."""
        batch, heads, length, dim = key.shape
        capacity, context = self.capacities(length, heads)
        groups = query.shape[1] // heads
        sizes = Sizes(
            *(batch, heads, groups, capacity, dim, value.shape[-1]),
            *(key.dtype, value.dtype, key.device, context),
        )
        if sizes != self.sizes:
            self._allocate(sizes)

    def capacities(self, length: int, heads: int) -> tuple[int, int]:
        """Slots in each of the rows of slots for a prompt of this length, and tokens that must fit
        off the device."""
        return self.budget if self.policy.evicts else power_of_two(length + 1), 0

    def grow(self, tokens: int) -> None:
        """Doubles the slots until so many tokens fit (policies that do not evict)."""
        sizes, capacity = self.sizes, power_of_two(tokens)
        if sizes is None or capacity <= sizes.capacity:
            return
        held = self.named_tensors()
        self._allocate(sizes._replace(capacity=capacity))
        for name, tensor in self.named_tensors().items():
            if name in ("keys", "values", "positions", "notes"):
                tensor = tensor[:, :, : sizes.capacity]
            tensor.copy_(held[name])

    def clear(self) -> None:
        """Forgets all tokens and keeps the memory."""
        for name, tensor in self.named_tensors().items():
            tensor.fill_(-1 if name in ("positions", "query_positions") else 0)

    def count(self, real: Tensor | None) -> None:
        """Counts a step, whose tokens are real in rows ``[B]`` bool, or in all of them (None)."""
        self.counts.add_(1)
        if real is not None:
            self.next_position.sub_((~real).long())

    def check_renumber(self, moved: Tensor) -> None:
        """Raises ``NotImplementedError`` where :meth:`renumber` cannot be done."""

    def renumber(self, moved: Tensor) -> None:
        """Moves tokens to other positions, and empties the slots of those that have none.

        Args:
            moved: ``[B, P]`` int64 by old position, ascending but for -1, which is none.
        """
        moved = moved.to(self.positions.device)
        before = torch.nn.functional.pad((moved >= 0).cumsum(dim=1), (1, 0))
        self.positions.copy_(_moved(self.positions, moved))
        old_next = self.next_position.clone()
        for count in (self.next_position, self.prompt_length):
            count.copy_(before.gather(1, count[:, None]).squeeze(1))
        self.protected_prefix.fill_(self.rules.sinks)
        if self.rules.protect_prompt:
            self.protected_prefix.clamp_(min=self.prompt_length)
        if self.query_positions.shape[1]:
            own = _moved(self.query_positions, moved)
            place, found = _places(own)
            index = place[:, None, None, :, None].expand_as(self.queries)
            self.queries.copy_(self.queries.gather(3, index))
            self.query_positions.copy_(own.gather(1, place).masked_fill(~found, -1))
        if self.tails.shape[2]:
            last = old_next[:, None] - 1
            ring = torch.arange(self.tails.shape[2], device=last.device)
            place, found = _places(_moved(last - (last - ring) % len(ring), moved))
            tails = self.tails.gather(2, place[:, None, :, None].expand_as(self.tails))
            self.tails.copy_(tails.masked_fill(~found[:, None, :, None], 0))

    def reorder(self, rows: Tensor) -> None:
        """Row ``b`` becomes a copy of row ``rows[b]``, in place."""
        for tensor in self.tensors():
            tensor.copy_(tensor.index_select(0, rows.to(tensor.device)))

    def select(self, rows: Tensor) -> None:
        """Keeps the given rows, in new memory where their number is another."""
        if self.sizes is None:
            return
        if len(rows) == self.sizes.batch:
            self.reorder(rows)
            return
        held = self.named_tensors()
        self._allocate(self.sizes._replace(batch=len(rows)))
        for name, tensor in self.named_tensors().items():
            tensor.copy_(held[name][rows.to(tensor.device)])

    def load(self, tensors: Mapping[str, Tensor], sizes: Sizes) -> None:
        """Takes over the contents of another memory, in place where the sizes are the same."""
        if sizes != self.sizes:
            self._allocate(sizes)
        for name, tensor in self.named_tensors().items():
            tensor.copy_(tensors[name])

    def named_tensors(self) -> dict[str, Tensor]:
        """Everything this layer keeps in memory, by the name of its attribute."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def tensors(self) -> list[Tensor]:
        """Everything this layer keeps in memory."""
        return list(self.named_tensors().values())

    # A tensor born in inference mode could not be reset outside of it.
    @torch.inference_mode(False)
    def _allocate(self, sizes: Sizes) -> None:
        batch, heads, capacity = sizes.batch, sizes.heads, sizes.capacity

        def full(*shape: int, dtype: torch.dtype = torch.int64, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=dtype, device=sizes.device)

        self.sizes = sizes
        dim, prunes = self.policy.key_channels(sizes.dim), self.policy.prunes_channels
        self.keys = full(batch, heads, capacity, dim, dtype=sizes.dtype)
        self.channels = full(batch, heads, sizes.dim if prunes else 0)
        tails = self.policy.whole_keys, sizes.dim - dim
        self.tails = full(batch, heads, *tails, dtype=sizes.dtype)
        self.values = full(batch, heads, capacity, sizes.value_dim, dtype=sizes.value_dtype)
        self.positions = full(batch, heads, capacity, fill=-1)
        self.counts = full(batch, 3)
        self.protected_prefix = full(batch)
        self.prompt_length = full(batch)
        self.victims = full(batch, heads, self.rules.interval)
        remembered = capacity if self.policy.observes_attention else 0
        rows = self.policy.num_rows
        shape = (batch, heads, remembered, rows)[: 3 if rows == 1 else 4]
        self.attention = full(*shape, dtype=torch.float32)
        self.notes = full(batch, heads, capacity, self.policy.num_notes, dtype=torch.float32)
        window = self.policy.num_queries
        self.queries = full(batch, heads, sizes.groups, window, dim, dtype=sizes.dtype)
        self.query_positions = full(batch, window, fill=-1)
        self.mark()

    def mark(self) -> None:
        """Says that these tensors stay where they are."""
        # Without it every in-place write would make the compiler give up CUDA graphs.
        for tensor in self.tensors():
            torch._dynamo.mark_static_address(tensor)


def _moved(positions: Tensor, moved: Tensor) -> Tensor:
    """Positions ``[B, ...]`` where ``moved`` puts them; negative ones stay."""
    new = moved.gather(1, positions.clamp(min=0).flatten(1)).view_as(positions)
    return torch.where(positions >= 0, new, positions)


def _places(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Where in a ring of ``W`` the tokens are that belong to each place, and whether there is one.

    Args:
        positions: ``[B, W]`` int64 of the tokens in it, negative where there is none.
    """
    window = positions.shape[1]
    place = torch.where(positions >= 0, positions % window, window)
    found = positions.new_full((len(positions), window + 1), window)
    here = torch.arange(window, device=place.device).expand_as(place)
    found = found.scatter(1, place, here)[:, :window]
    return found.clamp(max=window - 1), found < window


def power_of_two(tokens: int) -> int:
    """The smallest power of two, at least 256, that holds so many tokens."""
    return max(_SMALLEST_CAPACITY, 1 << (tokens - 1).bit_length())
