"""One attention layer that does with few slots in the rows whose prompt shows it."""

import torch
from torch import Tensor

from compressed_cache.layer import CompressedLayer
from compressed_cache.ops import attention
from compressed_cache.ops import eviction as slots
from compressed_cache.policies import Slots
from compressed_cache.policies.base import Laziness
from compressed_cache.stores.prefill import States, positions_of
from compressed_cache.stores.slots import Sizes

CLOSED = -2
"""In ``positions``: a slot that its row does without."""


class LazyLayer(CompressedLayer):
    """Keys and values of one attention layer in as many slots as its rows need.

    When the first prompt is read, each row is judged by :meth:`Policy.laziness`. A lazy row keeps
    its first and last tokens in few slots. There are as many slots as the row that needs most asks
    for, and what the others do without is closed: empty for good.

    A layer with a sliding window is a plain one.

    Attributes:
        positions: as of every layer, and ``-2`` where a slot is closed.
        row_slots: ``[B]`` int64, slots of a row; less than the budget where it is lazy.
    """

    row_slots: Tensor
    needed = 0
    """Slots of the row that needs most."""

    # Memory.

    def capacities(self, length: int, heads: int) -> tuple[int, int]:
        """Slots of each row."""
        return super().capacities(length, heads) if self.is_sliding else (self.needed, 0)

    @torch.inference_mode(False)
    def _allocate(self, sizes: Sizes) -> None:
        super()._allocate(sizes)
        if self.is_sliding:
            vars(self).pop("row_slots", None)
            return
        self.is_fused = False
        self.row_slots = torch.zeros_like(self.prompt_length)
        torch._dynamo.mark_static_address(self.row_slots)

    # A prompt.

    def fill(self, states: States) -> None:
        """Judges the rows of a first prompt, then takes it."""
        if not self.is_sliding:
            needed = self._judged(states)
            self.needed = int(needed.max())
            self.provide(states.query, states.key, states.value)
            self.row_slots.copy_(needed)
        super().fill(states)

    def read_block(self, states: States, *, weighs: bool = False) -> tuple[Tensor, Tensor | None]:
        """A further prompt, or the next chunk of the first one."""
        grows = self.rules.protect_prompt and self.clock.is_first_prompt
        if not self.is_sliding and grows and bool(self._is_lazy.any()):
            raise NotImplementedError(
                f"protect_prompt must be False with {self.policy.label!r} where a prompt is read "
                "in chunks: how many slots a lazy layer has is decided by the first of them"
            )
        return super().read_block(states, weighs=weighs)

    def keep_best(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        seen: Tensor,
        notes: Tensor,
        scores: Tensor | None = None,
    ) -> None:
        """Copies the best of these tokens ``[B, H, L, ...]`` into the open slots."""
        super().keep_best(keys, values, positions, seen, notes, scores)
        if self.is_sliding or not bool(self._is_lazy.any()):
            return
        self.positions.clamp_(min=-1)
        order = slots.rank(self.protected_scores(self.held()), self.positions)
        place = torch.arange(order.shape[2], device=order.device).expand_as(order)
        place = torch.empty_like(order).scatter(2, order, place)
        closed = place < order.shape[2] - self.row_slots[:, None, None]
        self.positions.masked_fill_(closed, CLOSED)

    def _judged(self, states: States) -> Tensor:
        """How many slots each row needs, ``[B]`` int64."""
        rows = positions_of(states.real, 0)
        lengths = states.real.sum(dim=1)
        numbers, rules = self._numbers, self.rules
        mass = torch.zeros(lengths.shape, device=lengths.device)
        last = lengths - (numbers.slots - numbers.sinks)
        kept = (rows >= 0) & ((rows < numbers.sinks) | (rows >= last[:, None]))
        for weights, _ in attention.attention_rows(
            states.query,
            states.key,
            query_positions=rows,
            positions=rows[:, None],
            form=self.form,
            last=numbers.queries,
        ):
            mass += (weights * kept[:, None, None, None]).sum(dim=(3, 4)).mean(dim=(1, 2))
        share = self.shard.mean(mass) / lengths.clamp(min=1, max=numbers.queries)
        # Rounding may make more than 1 of it.
        is_lazy = (share.clamp(max=1.0) > numbers.threshold) & (lengths > numbers.slots)
        protected = lengths if rules.protect_prompt else torch.full_like(lengths, rules.sinks)
        few = (protected + rules.recent + 1).clamp(min=numbers.slots)
        return torch.where(is_lazy, few, self.budget).clamp(max=self.budget)

    # What the policy says.

    def scores(self, held: Slots) -> Tensor:
        """Scores ``[B, H, S]`` of the policy; of lazy rows, first and last tokens are best."""
        scores = super().scores(held)
        if self.is_sliding:
            return scores
        recency = held.positions.float()
        first = held.positions < self._numbers.sinks
        recency = recency.masked_fill(first, torch.finfo(torch.float32).max)
        return torch.where(self._is_lazy[:, None, None], recency, scores)

    def choose(self, scores: Tensor, count: int) -> Tensor:
        """The open slots to overwrite in so many steps, ``[B, H, count]``."""
        if self.is_sliding:
            return super().choose(scores, count)
        return slots.next_victims_among(
            self.positions != CLOSED,
            scores,
            self.positions,
            protected_prefix=self.protected_prefix,
            count=count,
        )

    @property
    def _numbers(self) -> Laziness:
        return self.policy.laziness(self.budget, self.rules.sinks + self.rules.recent)

    @property
    def _is_lazy(self) -> Tensor:
        return self.row_slots < self.budget
