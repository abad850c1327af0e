"""A policy at one layer: what it has to be shown there, and what it says of tokens."""

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor, nn

from compressed_cache.ops import eviction
from compressed_cache.ops.attention import LogitTransform
from compressed_cache.ops.tensor_parallel import Shard
from compressed_cache.policies.base import Policy
from compressed_cache.policies.capabilities import (
    KeepsFirstTokens,
    MergesValues,
    ObservesQueries,
    PrunesChannels,
    RanksBlocks,
    Rerotates,
    RevisesNotes,
    SharesSlots,
    find,
    find_dropping,
    find_observer,
    needs_of,
    own_view,
    revise_notes,
    same_for_all_heads,
    write_notes,
)
from compressed_cache.policies.eviction_config import EvictionConfig
from compressed_cache.policies.view import AttentionRows, Slots


class BoundPolicy:
    """What is known of a layer once it has met its attention module.

    Attributes:
        budget: slots of every head; of the one with the fewest where they differ.
        head_budgets: slots of each head where they differ, else empty.
        floor: tokens that each head keeps where slots go to the head with the highest scores; None
            where they do not.
        window: of a layer with a sliding window.
    """

    def __init__(
        self,
        policy: Policy,
        eviction: EvictionConfig,
        *,
        layer: int,
        budget: int | tuple[int, ...],
        transform: LogitTransform,
        constants: dict[str, Tensor] | None = None,
        window: int | None = None,
        shard: Shard | None = None,
    ) -> None:
        self.policy = policy
        self.eviction = eviction
        self.layer = layer
        self.transform = transform
        self.constants = constants or {}
        self.window = window
        self.shard = shard or Shard()
        self.head_budgets = () if isinstance(budget, int) else budget
        self.budget = budget if isinstance(budget, int) else min(budget)
        # Looked up once, not in every step.
        self.needs = needs_of(policy)
        self.observer = find_observer(policy)
        self.adds_attention = self.observer is not None and (
            type(self.observer).accumulate is Policy.accumulate and not self.needs.all_heads
        )
        self.is_same_for_all_heads = same_for_all_heads(policy)
        self.revises = any(isinstance(part, RevisesNotes) for part in policy.parts)
        rerotating = find(policy, Rerotates)
        self.rerotates = rerotating is not None and rerotating.rerotates
        self.merging = find(policy, MergesValues)
        self.pruning = find(policy, PrunesChannels)
        self.query_observer = find(policy, ObservesQueries)
        self.dropping = find_dropping(policy)
        sharing = find(policy, SharesSlots)
        self.floor = None
        if sharing is not None:
            # As written: 0.07 * 100 is more than 7.
            self.floor = math.ceil(Fraction(str(sharing.head_floor)) * self.budget)
        self.keeping = find(policy, KeepsFirstTokens)
        blocks = find(policy, RanksBlocks)
        self.prompt_block = None if blocks is None else blocks.prompt_block

    @property
    def place(self) -> str:
        """Where in a model the budget is this one, if it is not that of the cache; for readers."""
        whole = self.eviction.budget
        if self.budget == whole:
            return ""
        head = "a head of " if self.head_budgets else ""
        share = f" (its share of {whole})" if isinstance(whole, int) else ""
        return f" in {head}layer {self.layer}{share}"

    def scores(self, slots: Slots) -> Tensor:
        """Scores ``[B, H, S]`` of the policy."""
        scores = self.policy.scores(slots)
        if scores.shape != slots.positions.shape or scores.dtype != torch.float32:
            hint = ". What needs does not ask for is empty" if scores.numel() == 0 else ""
            raise ValueError(
                f"{type(self.policy).__name__}.scores must return float32 of shape [B, H, S] = "
                f"{list(slots.positions.shape)}, got {scores.dtype} of shape {list(scores.shape)}"
                f"{hint}"
            )
        return self.shard.mean(scores) if self.is_same_for_all_heads else scores

    def prefix(self, protected: Tensor) -> Tensor:
        """Positions below it are never evicted, ``[B]`` or ``[B, H]`` int64, by what the cache
        protects, ``[B]``."""
        if self.keeping is None:
            return protected
        recent = self.eviction.least_recent
        first = self.keeping.first_tokens(self.budget, recent, self.constants)
        return torch.maximum(protected[:, None], first)

    def protect(self, scores: Tensor, slots: Slots) -> Tensor:
        """Scores ``[B, H, S]`` of these tokens with protection applied."""
        return eviction.protect(
            scores,
            slots.positions,
            next_position=slots.text_end,
            protected_prefix=self.prefix(slots.protected_prefix),
            recent=slots.recent,
        )

    def dropped(self, slots: Slots, scores: Tensor) -> Tensor:
        """Which tokens ``[B, H, S]`` go without being overwritten, by protected scores; none that
        is protected or that the policy always keeps."""
        assert self.dropping is not None
        gone = self.dropping.dropped(own_view(self.policy, self.dropping, slots), scores)
        return gone & (scores < eviction.HIGHEST_SCORE)

    def note(self, tokens: Slots) -> Tensor:
        """What the policy writes down of new tokens, ``[B, H, S, N]``."""
        return write_notes(self.policy, tokens)

    def revise(self, slots: Slots, evicts: Tensor) -> Slots:
        """The same tokens with the notes they have at a ranking, new ones in heads ``[B, H, 1]``
        bool that evict some of them."""
        if not self.revises:
            return slots
        notes = revise_notes(self.policy, slots)
        return slots._replace(notes=torch.where(evicts.unsqueeze(-1), notes, slots.notes))

    def observe_queries(
        self, state: Mapping[str, Tensor], queries: Tensor, positions: Tensor
    ) -> Mapping[str, Tensor]:
        """What the policy makes of queries ``[B, H, G, L, D]`` that follow those of ``state``."""
        if self.query_observer is None or not state:
            return {}
        return self.query_observer.observe_queries(state, queries, positions, self.constants)

    def accumulate(
        self, state: Tensor, weights: Tensor, query_positions: Tensor, positions: Tensor
    ) -> Tensor:
        """What the policy remembers once it saw these weights ``[B, H, G, Q, S]``."""
        assert self.observer is not None
        rows = AttentionRows(weights.float(), query_positions, positions)
        state = self.observer.accumulate(state, rows)
        return self.shard.mean(state) if self.needs.all_heads else state


# In place of one born in inference mode nothing could be written outside of it.
@torch.inference_mode(False)
@torch.no_grad()
def copied(
    constants: Mapping[str, Tensor], *, into: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Constants of a layer in memory of their own, but parameters, which stay those of the model.

    Args:
        constants: by name.
        into: copies made before, which are overwritten where they are alike.
    """
    copies = {}
    for name, tensor in constants.items():
        held = None if into is None else into.get(name)
        if isinstance(tensor, nn.Parameter):
            copies[name] = tensor
        elif held is None or isinstance(held, nn.Parameter) or _kind(held) != _kind(tensor):
            copies[name] = tensor.clone()
        else:
            copies[name] = held.copy_(tensor)
    return copies


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device
