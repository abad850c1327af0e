"""A store that does with few slots in the rows whose prompt shows it."""

import torch
from torch import Tensor

from compressed_cache.ops import attention, eviction
from compressed_cache.ops.tokens import Sizes, Tokens
from compressed_cache.policies.capabilities import HasLazyLayers, LazyLayerConfig, find
from compressed_cache.policies.view import Slots
from compressed_cache.stores.inputs import AttentionInputs
from compressed_cache.stores.slots import SlotStore

CLOSED = -2
"""In ``positions``: a slot that its row does without."""


class LazyStore(SlotStore):
    """As many slots as the rows of one attention layer need.

    When the first prompt is read, each row is judged by what
    :class:`~compressed_cache.policies.capabilities.HasLazyLayers` says. A lazy row keeps its first
    and last tokens in few slots. There are as many slots as the row that needs most asks for, and
    what the others do without is closed: empty for good.

    Attributes:
        tokens: as everywhere, and positions are ``-2`` where a slot is closed.
        row_slots: ``[B]`` int64, slots of a row; less than the budget where it is lazy.
    """

    row_slots: Tensor
    needed = 0
    """Slots of the row that needs most."""

    # Memory.

    def prepare(self, inputs: AttentionInputs) -> None:
        """Judges the rows of a first prompt, then makes room for it."""
        needed = self._judge(inputs)
        self.needed = int(needed.max())
        super().prepare(inputs)
        self.row_slots.copy_(needed)

    def capacities(self, length: int, heads: int) -> tuple[int, int]:
        """Slots of each row."""
        return self.needed, 0

    @torch.inference_mode(False)
    def allocate(self, sizes: Sizes) -> None:
        """New memory, empty."""
        super().allocate(sizes)
        self.is_fused = False
        self.row_slots = torch.zeros_like(self.prompt_length)
        self.mark()

    # A prompt.

    def protect_prefix(self, length: Tensor | None) -> None:
        """Protects what every store does, and in lazy rows the first tokens."""
        super().protect_prefix(length)
        prefix = self.protected_prefix
        prefix.copy_(torch.where(self._is_lazy, prefix.clamp(min=self._lazy.sinks), prefix))

    def held_for_chunk(
        self, inputs: AttentionInputs, *, is_first_prompt: bool
    ) -> tuple[Tokens, Tensor]:
        """What the tokens of a chunk may see of what was read before, and its keys as a whole."""
        grows = self.bound.eviction.protect_prompt and is_first_prompt
        if grows and bool(self._is_lazy.any()):
            raise NotImplementedError(
                f"protect_prompt must be False with {self.bound.policy.label!r} where a prompt is "
                "read in chunks: how many slots a lazy layer has is decided by the first of them"
            )
        return super().held_for_chunk(inputs, is_first_prompt=is_first_prompt)

    def keep(self, tokens: Tokens, scores: Tensor | None = None) -> None:
        """Copies the best of these tokens ``[B, H, L, ...]`` into the open slots."""
        super().keep(tokens, scores)
        if not bool(self._is_lazy.any()):
            return
        positions = self.tokens.positions
        positions.clamp_(min=-1)
        slots = self.view(self.held())
        place = eviction.places(self.bound.protect(self.scores(slots), slots), positions)
        positions.masked_fill_(place < place.shape[2] - self.room(), CLOSED)

    def _judge(self, inputs: AttentionInputs) -> Tensor:
        """How many slots each row needs, ``[B]`` int64."""
        bound, lazy = self.bound, self._lazy
        positions, lengths = inputs.positions(0), inputs.real.sum(dim=1)
        mass = torch.zeros(lengths.shape, device=lengths.device)
        last = lengths - (lazy.slots - lazy.sinks)
        kept = (positions >= 0) & ((positions < lazy.sinks) | (positions >= last[:, None]))
        for weights, _ in attention.attention_rows(
            inputs.query,
            inputs.key,
            query_positions=positions,
            positions=positions[:, None],
            transform=bound.transform,
            last=lazy.queries,
        ):
            mass += (weights * kept[:, None, None, None]).sum(dim=(3, 4)).mean(dim=(1, 2))
        share = bound.shard.mean(mass) / lengths.clamp(min=1, max=lazy.queries)
        # Rounding may make more than 1 of it.
        is_lazy = (share.clamp(max=1.0) > lazy.threshold) & (lengths > lazy.slots)
        prefix = bound.eviction.protected(lengths, bound.budget).clamp(min=lazy.sinks)
        few = (prefix + bound.eviction.least_recent + 1).clamp(min=lazy.slots)
        return torch.where(is_lazy, few, bound.budget).clamp(max=bound.budget)

    # Rank.

    def scores(self, slots: Slots) -> Tensor:
        """Scores ``[B, H, S]`` of the policy; of lazy rows, the last tokens are best."""
        recency = slots.positions.float()
        return torch.where(self._is_lazy[:, None, None], recency, super().scores(slots))

    def room(self) -> Tensor:
        """How many tokens a head of each row can hold, ``[B, 1, 1]`` int64."""
        return self.row_slots[:, None, None]

    def lowest(self, steps: int, real: Tensor | None) -> Tensor:
        """The open slots to overwrite in ``steps`` steps, ``[B, H, steps]``."""
        scores = self.ranked(steps, real)
        return eviction.next_open_victims(
            self.tokens.positions != CLOSED,
            scores,
            self.tokens.positions,
            next_position=self.next_position,
            protected_prefix=self.protected_prefix,
            count=steps,
        )

    @property
    def _lazy(self) -> LazyLayerConfig:
        judge = find(self.bound.policy, HasLazyLayers)
        assert judge is not None
        eviction = self.bound.eviction
        return judge.lazy_layer(self.bound.budget, eviction.sinks + eviction.least_recent)

    @property
    def _is_lazy(self) -> Tensor:
        return self.row_slots < self.bound.budget
