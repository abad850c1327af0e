"""The tensors of one layer: allocated once, changed only in place."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from compressed_cache.ops.kernels import operators
from compressed_cache.ops.rings import moved_to, places_of
from compressed_cache.ops.tokens import Sizes, Tokens
from compressed_cache.stores.bound_policy import BoundPolicy, copied
from compressed_cache.stores.inputs import AttentionInputs


class SlotMemory:
    """What one layer keeps between two steps; addresses hold as long as the sizes do.

    Attributes:
        tokens: ``[B, H, S, ...]``, what the slots hold; what the policy does not need is empty.
            Where it prunes channels, keys have ``D'`` of them.
        counts: ``[B, 3]`` int64, for each row the position of the incoming token, the tokens seen,
            padding included, and which of the victims is due: one tensor, so that a step counts in
            one launch.
        protected_prefix: ``[B]`` int64, positions below it are never evicted.
        victims: ``[B, H, interval]`` int64, the slots to overwrite next, lowest first (read with
            ``interval > 1``).
        prompt_length: ``[B]`` int64, tokens of the first prompt.
        queries, query_positions: ``[B, H, G, W, D]`` and ``[B, W]`` int64, a ring of the last
            queries; ``W = 0`` unless the policy needs it.
        query_state: ``[B, H, G, ...]`` float32 by name, what the policy made of the queries of the
            first prompt; empty unless it observes them.
        is_fused: whether one kernel takes a whole step.
        arrived: ``[B, H + 1]`` int32, what that kernel counts within a step; empty without it.
        has_gradients: whether a token was read with gradients, which then end at it.
    """

    tokens: Tokens
    counts: Tensor
    protected_prefix: Tensor
    victims: Tensor
    prompt_length: Tensor
    queries: Tensor
    query_positions: Tensor
    arrived: Tensor

    def __init__(self, bound: BoundPolicy, tag: Callable[[Tensor], None]) -> None:
        bound.constants = copied(bound.constants)
        self.bound = bound
        self.tag = tag
        """Marks keys as those of a layer."""
        self.sizes: Sizes | None = None
        self.query_state: dict[str, Tensor] = {}
        self.is_fused = False
        self.has_gradients = False

    def rebind(self, bound: BoundPolicy) -> None:
        """Goes on with the policy as it is for another text; constants stay where they are."""
        bound.constants = copied(bound.constants, into=self.bound.constants)
        self.bound = bound
        if self.sizes is not None:
            self.mark()

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
    def nbytes(self) -> int:
        """Bytes held on the device."""
        held = sum(tensor.nbytes for tensor in self.named_tensors().values())
        return held - self.offloaded_bytes

    @property
    def offloaded_bytes(self) -> int:
        """Bytes held off the device."""
        return 0

    @property
    def num_heads(self) -> int:
        """``H``, also where slots are of no head."""
        assert self.sizes is not None
        return self.sizes.heads

    @property
    def slots_per_head(self) -> int:
        """Slots of a head, on average."""
        assert self.sizes is not None
        return self.tokens.positions[0].numel() // self.sizes.heads

    def room(self) -> Tensor | int:
        """How many tokens a head can hold: one number, or ``[B, 1, 1]`` or ``[H, 1]`` int64."""
        return self.tokens.positions.shape[2]

    def prepare(self, inputs: AttentionInputs) -> None:
        """Makes room for a first prompt; memory that fits is kept."""
        self.provide(inputs.key, inputs.value, inputs.query.shape[1] // inputs.key.shape[1])

    def provide(self, keys: Tensor, values: Tensor, groups: int) -> None:
        """Allocates slots for a prompt ``[B, H, L, D]``, unless those there are fit."""
        batch, heads, length, dim = keys.shape
        capacity, context = self.capacities(length, heads)
        sizes = Sizes(
            *(batch, heads, groups, capacity, dim, values.shape[-1]),
            *(keys.dtype, values.dtype, keys.device, context),
        )
        if sizes != self.sizes:
            self.allocate(sizes)

    def capacities(self, length: int, heads: int) -> tuple[int, int]:
        """Slots in each row of slots for a prompt of this length, and tokens that must fit off the
        device."""
        return self.bound.budget, 0

    def key_channels(self, dim: int) -> int:
        """Channels of the keys in the slots, of ``dim``."""
        return dim

    # A tensor born in inference mode could not be reset outside of it.
    @torch.inference_mode(False)
    def allocate(self, sizes: Sizes) -> None:
        """New memory, empty."""
        bound, needs = self.bound, self.bound.needs
        batch, heads, capacity = sizes.batch, sizes.heads, sizes.capacity

        def full(*shape: int, dtype: torch.dtype = torch.int64, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=dtype, device=sizes.device)

        self.sizes = sizes
        dim = self.key_channels(sizes.dim)
        observed = capacity if bound.observer is not None else 0
        width = () if needs.state_width == 1 else (needs.state_width,)
        self.tokens = Tokens(
            keys=full(batch, heads, capacity, dim, dtype=sizes.dtype),
            values=full(batch, heads, capacity, sizes.value_dim, dtype=sizes.value_dtype),
            positions=full(batch, heads, capacity, fill=-1),
            attention_state=full(batch, heads, observed, *width, dtype=torch.float32),
            notes=full(batch, heads, capacity, needs.notes, dtype=torch.float32),
        )
        self.counts = full(batch, 3)
        self.protected_prefix = full(batch)
        self.prompt_length = full(batch)
        self.victims = full(batch, heads, bound.eviction.interval)
        self.queries = full(batch, heads, sizes.groups, needs.queries, dim, dtype=sizes.dtype)
        self.query_positions = full(batch, needs.queries, fill=-1)
        observer = bound.query_observer
        shapes = {} if observer is None else observer.query_state_shapes(sizes.dim)
        self.query_state = {
            name: full(batch, heads, sizes.groups, *shape, dtype=torch.float32)
            for name, shape in shapes.items()
        }
        self.is_fused = bound.policy.evicts and not bound.rerotates and operators.serves(sizes)
        self.arrived = full(batch, heads + 1 if self.is_fused else 0, dtype=torch.int32)
        self.mark()

    def mark(self) -> None:
        """Says what these tensors are to attention, and to the compiler that they stay."""
        # Without it every in-place write would make the compiler give up CUDA graphs, and what is
        # only read would be copied in each step.
        named, constants = self.named_tensors().values(), self.bound.constants.values()
        for tensor in (*named, *constants, self.arrived):
            torch._dynamo.mark_static_address(tensor)
        self.tag(self.tokens.keys)

    def named_tensors(self) -> dict[str, Tensor]:
        """Everything that is held between two steps, by name."""
        held = {name: value for name, value in vars(self).items() if name != "arrived"}
        others = {name: value for name, value in held.items() if isinstance(value, Tensor)}
        others |= {f"query_state.{name}": value for name, value in self.query_state.items()}
        return {**self.tokens._asdict(), **others} if self.sizes is not None else others

    def grow(self, tokens: int) -> None:
        """Makes room for ``tokens`` tokens; where tokens are evicted, there is."""

    def reset(self) -> None:
        """Forgets all tokens and keeps the memory."""
        self.has_gradients = False
        for name, tensor in self.named_tensors().items():
            tensor.fill_(-1 if name in ("positions", "query_positions") else 0)

    def load(self, tensors: Mapping[str, Tensor], sizes: Sizes) -> None:
        """Takes over the contents of another memory, in place where the sizes are the same."""
        if sizes != self.sizes:
            self.allocate(sizes)
        for name, tensor in self.named_tensors().items():
            tensor.copy_(tensors[name])

    def cast(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values in the dtypes of the slots, or the slots in theirs where these are
        wider: autocast brings both about."""
        assert self.sizes is not None
        dtype = torch.promote_types(self.sizes.dtype, keys.dtype)
        value_dtype = torch.promote_types(self.sizes.value_dtype, values.dtype)
        if (dtype, value_dtype) != (self.sizes.dtype, self.sizes.value_dtype):
            sizes = self.sizes._replace(dtype=dtype, value_dtype=value_dtype)
            self.load(self.named_tensors(), sizes)
        return keys.to(dtype), values.to(value_dtype)

    def reorder(self, rows: Tensor) -> None:
        """Row ``b`` becomes a copy of row ``rows[b]``, in place."""
        for tensor in self.named_tensors().values():
            tensor.copy_(tensor.index_select(0, rows.to(tensor.device)))

    def select(self, rows: Tensor) -> None:
        """Keeps the given rows, in new memory where their number is another."""
        if self.sizes is None:
            return
        if len(rows) == self.sizes.batch:
            self.reorder(rows)
            return
        held = self.named_tensors()
        self.allocate(self.sizes._replace(batch=len(rows)))
        for name, tensor in self.named_tensors().items():
            tensor.copy_(held[name][rows.to(tensor.device)])

    def check_renumber(self, moved: Tensor) -> None:
        """Raises ``NotImplementedError`` where :meth:`renumber` cannot be done."""

    def renumber(self, moved: Tensor) -> None:
        """Moves tokens to other positions, and empties the slots of those that have none.

        Args:
            moved: ``[B, P]`` int64 by old position, ascending but for -1, which is none.
        """
        positions = self.tokens.positions
        moved = moved.to(positions.device)
        before = torch.nn.functional.pad((moved >= 0).cumsum(dim=1), (1, 0))
        positions.copy_(moved_to(positions, moved))
        for count in (self.next_position, self.prompt_length):
            count.copy_(before.gather(1, count[:, None]).squeeze(1))
        self.protect_prefix(self.prompt_length)
        if self.query_positions.shape[1]:
            own = moved_to(self.query_positions, moved)
            place, found = places_of(own)
            index = place[:, None, None, :, None].expand_as(self.queries)
            self.queries.copy_(self.queries.gather(3, index))
            self.query_positions.copy_(own.gather(1, place).masked_fill(~found, -1))

    def protect_prefix(self, length: Tensor | None) -> None:
        """Protects the sinks, and a prompt of this length ``[B]`` if prompts are to be."""
        eviction = self.bound.eviction
        if length is None:
            self.protected_prefix.fill_(eviction.sinks)
        else:
            self.protected_prefix.copy_(eviction.protected(length, self.bound.budget))
