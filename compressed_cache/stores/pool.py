"""A store whose heads have different numbers of slots, all in one pool."""

from itertools import accumulate

import torch
from torch import Tensor

from compressed_cache.ops import eviction
from compressed_cache.ops.masks import Mask
from compressed_cache.ops.tokens import Sizes, Tokens
from compressed_cache.policies.view import Slots
from compressed_cache.stores.slots import SlotStore, put


class PoolStore(SlotStore):
    """Slots of one attention layer, in a pool for all its heads.

    The pool has as many slots ``P`` as the heads have together. Each slot belongs to the head whose
    token it holds. Policies are shown every head with all ``P`` slots, those of other heads empty,
    which takes no memory. All query heads attend over the whole pool in one product and mask what
    is not theirs: keys and values are read once, whoever owns them, for ``H`` times the arithmetic.

    Where heads have a number of slots each, that is how many they own. Where they have one number,
    it is the mean, and slots go where scores are high: before each step the ``H`` lowest of the
    pool are taken from their owners and every head is given one. Its best tokens, the part of that
    number that :class:`~compressed_cache.policies.capabilities.SharesSlots` says, a head always
    keeps.

    Attributes:
        tokens: ``[B, 1, P, ...]``, and so are all others: ``H`` is 1, and queries are
            ``[B, 1, H * G, W, D]``.
        owners: ``[B, 1, P]`` int64, key/value head of each slot.
        victims: ``[B, 1, interval * H]`` int64, first those of the next step.
    """

    owners: Tensor

    # Memory.

    def capacities(self, length: int, heads: int) -> tuple[int, int]:
        """Slots of the pool."""
        return sum(self.bound.head_budgets) or heads * self.bound.budget, 0

    @torch.inference_mode(False)
    def allocate(self, sizes: Sizes) -> None:
        """New memory, empty."""
        super().allocate(sizes._replace(heads=1, groups=sizes.heads * sizes.groups))
        self.sizes = sizes
        self.is_fused = False
        self.owners = torch.zeros_like(self.tokens.positions)
        self.victims = self.victims.repeat(1, 1, sizes.heads)
        self.query_state = {
            name: state.view(sizes.batch, sizes.heads, sizes.groups, *state.shape[3:])
            for name, state in self.query_state.items()
        }
        self.mark()

    # What the policy is shown.

    def held(self) -> Tokens:
        """The tokens of each head: every head with all slots, its own held."""
        tokens = self.tokens.map(lambda x: x.expand(-1, self.num_heads, *x.shape[2:]))
        return tokens._replace(positions=self.held_positions())

    def held_positions(self) -> Tensor:
        """``[B, H, P]`` int64, -1 where a slot is empty or another's."""
        return torch.where(self._is_own, self.tokens.positions, -1)

    def view(self, tokens: Tokens, *, is_prompt: bool = False) -> Slots:
        """What the policy is shown of tokens ``[B, H, S, ...]``."""
        view = super().view(tokens, is_prompt=is_prompt)
        queries = self.queries.squeeze(1).unflatten(1, (self.num_heads, -1))
        return view._replace(queries=queries)

    def owned(self, values: Tensor) -> Tensor:
        """Of values ``[B, H, P, ...]`` what the owner of each slot has, ``[B, 1, P, ...]``."""
        index = self.owners.reshape(*self.owners.shape, *[1] * (values.dim() - 3))
        return values.gather(1, index.expand(*self.owners.shape, *values.shape[3:]))

    # Rank.

    def victims_due(self) -> Tensor:
        """Of the victims those of this step, ``[B, 1, H]``."""
        steps = self.victims.unflatten(2, (self.bound.eviction.interval, self.num_heads))
        return steps.index_select(2, self.phase).squeeze(2)

    def lowest(self, steps: int, real: Tensor | None) -> Tensor:
        """The slots to give away in ``steps`` steps, ``[B, 1, steps * H]``."""
        scores, positions = self.ranked(steps, real), self.held_positions()
        if self.bound.head_budgets:
            victims = eviction.next_open_victims(
                self._is_own,
                scores,
                positions,
                next_position=self.next_position,
                protected_prefix=self.bound.prefix(self.protected_prefix),
                count=steps,
            )
            return victims.transpose(1, 2).flatten(1, 2).unsqueeze(1)
        # Of equal positions the one of the first head is the oldest.
        return eviction.next_victims(
            self.owned(self._floored(scores, positions, incoming=steps)),
            self.tokens.positions * self.num_heads + self.owners,
            next_position=self.next_position * self.num_heads,
            protected_prefix=self.protected_prefix * self.num_heads,
            count=steps * self.num_heads,
        )

    def _floored(self, scores: Tensor, positions: Tensor, *, incoming: int) -> Tensor:
        """Scores ``[B, H, S]`` with the best of each head protected.

        Args:
            scores: ``[B, H, S]`` with protection applied.
            positions: ``[B, H, S]`` int64.
            incoming: tokens that each head is given before the next ranking.
        """
        assert self.bound.floor is not None
        return eviction.protect_best(scores, positions, count=self.bound.floor - incoming)

    def evicts(self, positions: Tensor, *, incoming: int) -> Tensor:
        """Whether some of these tokens ``[B, H, S]`` go as so many more come into each head,
        ``[B, H, 1]`` bool."""
        if self.bound.head_budgets:
            return super().evicts(positions, incoming=incoming)
        held = (positions >= 0).sum(dim=(1, 2), keepdim=True)
        evicts = held + incoming * self.num_heads > self.tokens.positions.shape[2]
        return evicts.expand(-1, self.num_heads, -1)

    def room(self) -> Tensor:
        """How many tokens each head can hold, ``[H, 1]`` int64."""
        return eviction.per_head(self.bound.head_budgets, self.owners)

    # Write.

    def write(self, key: Tensor, value: Tensor, slot: Tensor, real: Tensor | None) -> None:
        """Puts tokens ``[B, H, 1, D]`` at the next position into slots ``[B, 1, H]``."""
        super().write(key, value, slot, real)
        put(self.owners, slot, self._heads.expand_as(slot), real)

    def laid_out(self, new: Tensor) -> Tensor:
        """New tokens ``[B, H, 1, ...]`` as slots hold them, ``[B, 1, H, ...]``."""
        return new.transpose(1, 2)

    def keep(self, tokens: Tokens, scores: Tensor | None = None) -> None:
        """Copies the best of these tokens ``[B, H, L, ...]`` into the pool."""
        length = tokens.positions.shape[2]
        if length <= self.bound.budget:
            scores = torch.zeros_like(tokens.positions, dtype=torch.float32)
        elif scores is None:
            scores, tokens = self.rank_prompt(tokens)
        best = self._best_of_heads if self.bound.head_budgets else self._best_of_all
        kept, places = best(scores, tokens.positions)
        tokens.map(lambda x: x.flatten(1, 2).unsqueeze(1)).gather(kept).copy_into(
            self.tokens, places
        )
        self.owners[:, :, places] = kept // length

    def _best_of_all(self, scores: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the tokens ``[B, 1, H * L]`` stay, and in which slots."""
        scores = self._floored(scores, positions, incoming=0)
        scores, ages = eviction.as_one_head(scores, positions)
        count = min(ages.shape[2], self.tokens.positions.shape[2])
        kept = eviction.keep_best(scores, ages, count=count)
        return kept, torch.arange(count, device=kept.device)

    def _best_of_heads(self, scores: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The same where each head has slots of its own, those of the first head first."""
        length, budgets = positions.shape[2], self.bound.head_budgets
        kept, places = [], []
        for head, (start, budget) in enumerate(
            zip(accumulate(budgets, initial=0), budgets, strict=False)
        ):
            one, count = slice(head, head + 1), min(length, budget)
            own = eviction.keep_best(scores[:, one], positions[:, one], count=count)
            kept.append(own + head * length)
            places.append(torch.arange(start, start + count, device=own.device))
            # Of a short prompt, slots are left over that are this head's too.
            self.owners[:, :, start : start + budget] = head
        return torch.cat(kept, dim=2), torch.cat(places)

    # Attend.

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Mask | None
    ) -> tuple[Tensor, Tensor]:
        """Attention of one new token per row, whose key and value are among the slots."""
        output, weights = super().attend(query, keys, values, mask)
        return output, weights.squeeze(1).unflatten(1, (self.num_heads, -1))

    def visible(self, mask: Mask | None) -> tuple[Tensor, Tensor | None]:
        """What a new token sees, ``[B, 1, H * G, P]`` bool, and what is added to its logits."""
        visible, bias = super().visible(mask)
        return self._for_queries(visible), None if bias is None else self._for_queries(bias)

    # Between the pool and its heads.

    @property
    def _heads(self) -> Tensor:
        return torch.arange(self.num_heads, device=self.tokens.positions.device)

    @property
    def _is_own(self) -> Tensor:
        """``[B, H, P]`` bool, whose slots are whose."""
        return self.owners == self._heads[:, None]

    def _for_queries(self, heads: Tensor) -> Tensor:
        """``[B, H, P]`` or ``[B, H, G | 1, P]`` as ``[B, 1, H * G, P]``."""
        assert self.sizes is not None
        heads = heads.unsqueeze(2) if heads.dim() == 3 else heads
        return heads.expand(-1, -1, self.sizes.groups, -1).flatten(1, 2).unsqueeze(1)
