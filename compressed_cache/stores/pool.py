"""One attention layer whose heads have different numbers of slots, all in one pool."""

import math
from fractions import Fraction
from itertools import accumulate

import torch
from torch import Tensor

from compressed_cache.layer import CompressedLayer
from compressed_cache.ops import attention, gradients
from compressed_cache.ops import eviction as slots
from compressed_cache.ops.eviction import where_real
from compressed_cache.policies import Slots
from compressed_cache.stores.decode_step import (
    NewToken,
    put,
    ranked,
    record_query,
    visible_slots,
    with_gradients,
    write,
)
from compressed_cache.stores.slots import Sizes


class PoolLayer(CompressedLayer):
    """Keys and values of one attention layer, in a pool of slots for all its heads.

    The pool has as many slots ``P`` as the heads have together. Each slot belongs to the head whose
    token it holds. Policies are shown every head with all ``P`` slots, those of other heads empty,
    which takes no memory. All query heads attend over the whole pool in one product and mask what
    is not theirs: keys and values are read once, whoever owns them, for ``H`` times the arithmetic.

    Where heads have a number of slots each, that is how many they own. Where they have one number,
    it is the mean, and slots go where scores are high: before each step the ``H`` lowest of the
    pool are taken from their owners and every head is given one. Its best tokens, a part
    :attr:`Policy.head_floor` of that number, a head always keeps.

    A layer with a sliding window is a plain one.

    Attributes:
        keys, values: ``[B, 1, P, D]``, and so are all others: ``H`` is 1, and queries are
            ``[B, 1, H * G, W, D]``.
        owners: ``[B, 1, P]`` int64, key/value head of each slot.
        victims: ``[B, 1, interval * H]`` int64, first those of the next step.
    """

    owners: Tensor
    floor = 0
    """Tokens that each head keeps where slots go where scores are high."""

    # Memory.

    def capacities(self, length: int, heads: int) -> tuple[int, int]:
        """Slots of the pool."""
        if self.is_sliding:
            return super().capacities(length, heads)
        return sum(self.head_budgets) if self.head_budgets else heads * self.budget, 0

    def _see(self, window: int | None, budget: int | tuple[int, ...]) -> None:
        super()._see(window, budget)
        # As written: 0.07 * 100 is more than 7.
        self.floor = math.ceil(Fraction(str(self.policy.head_floor or 0)) * self.budget)

    @torch.inference_mode(False)
    def _allocate(self, sizes: Sizes) -> None:
        if self.is_sliding:
            vars(self).pop("owners", None)
            super()._allocate(sizes)
            return
        super()._allocate(sizes._replace(heads=1, groups=sizes.heads * sizes.groups))
        self.sizes = sizes
        self.is_fused = False
        self.owners = torch.zeros_like(self.positions)
        self.victims = self.victims.repeat(1, 1, sizes.heads)
        for tensor in (self.owners, self.victims):
            torch._dynamo.mark_static_address(tensor)

    # What the policy sees.

    def held(self) -> Slots:
        """What the policy is shown of the pool: every head with all slots, its own held."""
        if self.is_sliding:
            return super().held()
        keys, values = self._for_heads(self.keys), self._for_heads(self.values)
        positions = self._positions_of_heads()
        return self.view(keys, values, positions, self.attention, self.notes)

    def held_positions(self) -> Tensor:
        """``[B, H, P]`` int64, -1 where a slot is empty or another's."""
        return super().held_positions() if self.is_sliding else self._positions_of_heads()

    def revised(self, real: Tensor | None = None) -> Slots:
        """The same, right before a ranking."""
        if self.policy.revises and not self.is_sliding:
            notes = self._of_owners(self.policy.revise(self.held()))
            self.notes.copy_(where_real(real, notes, self.notes))
            return self.held()
        return super().revised(real)

    def drop(self, gone: Tensor) -> None:
        """Empties slots, ``[B, H, P]`` bool by their owners."""
        super().drop(gone if self.is_sliding else self._of_owners(gone))

    def view(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        seen: Tensor,
        notes: Tensor,
        *,
        is_prompt: bool = False,
    ) -> Slots:
        """What the policy is shown of these tokens ``[B, H, L, ...]``."""
        view = super().view(keys, values, positions, seen, notes, is_prompt=is_prompt)
        if self.is_sliding:
            return view
        queries = self.queries.squeeze(1).unflatten(1, (self._num_heads, -1))
        seen, notes = self._for_heads(seen), self._for_heads(notes)
        return view._replace(queries=queries, attention=seen, notes=notes)

    # A prompt.

    def keep_best(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        seen: Tensor,
        notes: Tensor,
        scores: Tensor | None = None,
    ) -> None:
        """Copies the best of these tokens ``[B, H, L, ...]`` into the pool."""
        if self.is_sliding:
            super().keep_best(keys, values, positions, seen, notes, scores)
            return
        length = positions.shape[2]
        if length <= self.budget:
            scores = torch.zeros_like(positions, dtype=torch.float32)
        elif scores is None:
            scores, notes = self.rank_prompt(keys, values, positions, seen, notes)
        if self.head_budgets:
            kept, places = self._best_of_heads(scores, positions)
        else:
            kept, places = self._best_of_all(scores, positions)
        contents = [(self.keys, keys), (self.values, values), (self.positions, positions)]
        contents.append((self.notes, notes))
        if self.policy.observes_attention:
            contents.append((self.attention, seen))
        for memory, tokens in contents:
            flat = tokens.flatten(1, 2).unsqueeze(1)
            index = kept.reshape(*kept.shape, *[1] * (flat.dim() - 3))
            index = index.expand(*kept.shape, *flat.shape[3:])
            memory.index_copy_(2, places, flat.gather(2, index))
        self.owners.index_copy_(2, places, kept // length)

    def _best_of_all(self, scores: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the tokens ``[B, 1, H * L]`` stay, and in which slots."""
        scores = self._floored(scores, positions, incoming=0).flatten(1, 2).unsqueeze(1)
        ages = (positions * self._num_heads + self._heads[:, None]).flatten(1, 2).unsqueeze(1)
        count = min(ages.shape[2], self.positions.shape[2])
        kept = slots.keep_best(scores, ages, count=count)
        return kept, torch.arange(count, device=kept.device)

    def _best_of_heads(self, scores: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The same where each head has slots of its own, those of the first head first."""
        length = positions.shape[2]
        kept, places = [], []
        starts = accumulate(self.head_budgets, initial=0)
        for head, (start, budget) in enumerate(zip(starts, self.head_budgets, strict=False)):
            one, count = slice(head, head + 1), min(length, budget)
            own = slots.keep_best(scores[:, one], positions[:, one], count=count)
            kept.append(own + head * length)
            places.append(torch.arange(start, start + count, device=own.device))
            # Of a short prompt, slots are left over that are this head's too.
            self.owners[:, :, start : start + budget] = head
        return torch.cat(kept, dim=2), torch.cat(places)

    # A decode step.

    def step(self, token: NewToken) -> tuple[Tensor, Tensor | None]:
        """Puts one token per row and head into the pool, and attends with its query.

        See :func:`compressed_cache.stores.decode_step.step`.
        """
        if self.is_sliding:
            return super().step(token)
        query, key, value, ranks, _, real, mask = token
        traced = (query, key, value) if gradients.wants_gradient(query, key, value) else None
        query, key, value = query.detach(), key.detach(), value.detach()
        slot = self._next_slots(ranks, real)
        write(self, key.transpose(1, 2), value.transpose(1, 2), slot, real)
        put(self.owners, slot, self._heads.expand_as(slot), real)
        if self.policy.num_notes:
            now = self.next_position[:, None, None].expand(key.shape[:3])
            put(self.notes, slot, self.note(key, value, now).transpose(1, 2), real)
        keys, values = self.keys, self.values
        if traced is not None:
            traced = traced[0], traced[1].transpose(1, 2), traced[2].transpose(1, 2)
            keys, values = with_gradients(self, (keys, values), traced, slot, real)
        visible, bias = (
            None if one is None else self._for_queries(one) for one in visible_slots(self, mask)
        )
        assert visible is not None
        own = query if traced is None else traced[0]
        output, weights = attention.attend(own, keys, values, visible, self.form, bias)
        weights = weights.squeeze(1).unflatten(1, (self._num_heads, -1))
        if self.policy.observes_attention:
            held = self.held()
            shown = weights.detach().nan_to_num(0.0)
            own = self.next_position[:, None]
            seen = self.accumulate(held.attention, shown, own, held.positions)
            self.attention.copy_(where_real(real, self._of_owners(seen), self.attention))
        record_query(self, query, real)
        self.count(real)
        if real is not None:
            output = output.masked_fill(~real[:, None, None, None], 0.0)
        return output, weights

    def _next_slots(self, ranks: bool, real: Tensor | None) -> Tensor:
        """The slot that each head is given, ``[B, 1, H]``."""
        interval = self.rules.interval
        if interval == 1:
            return self._lowest(1, real)
        if ranks:
            self.victims.copy_(self._lowest(interval, real))
            # In every row: beams exchange theirs.
            self.counts[:, 2].zero_()
        steps = self.victims.unflatten(2, (interval, self._num_heads))
        return steps.index_select(2, self.phase).squeeze(2)

    def _lowest(self, steps: int, real: Tensor | None) -> Tensor:
        """The slots to give away in so many steps, ``[B, 1, steps * H]``."""
        scores = ranked(self, real)
        positions = self._positions_of_heads()
        if self.head_budgets:
            victims = slots.next_victims_among(
                self._is_own,
                scores,
                positions,
                protected_prefix=self.protected_prefix,
                count=steps,
            )
            return victims.transpose(1, 2).flatten(1, 2).unsqueeze(1)
        # Of equal positions the one of the first head is the oldest.
        return slots.next_victims(
            self._of_owners(self._floored(scores, positions, incoming=steps)),
            self.positions * self._num_heads + self.owners,
            protected_prefix=self.protected_prefix * self._num_heads,
            count=steps * self._num_heads,
        )

    def _floored(self, scores: Tensor, positions: Tensor, *, incoming: int) -> Tensor:
        """Scores ``[B, H, S]`` with the best of each head protected.

        Args:
            scores: ``[B, H, S]`` with protection applied.
            positions: ``[B, H, S]`` int64.
            incoming: tokens that each head is given before the next ranking.
        """
        best = self.floor - incoming
        if best <= 0:
            return scores
        order = slots.rank(scores, positions)[..., -best:]
        return scores.scatter(-1, order, torch.inf).masked_fill(positions < 0, -torch.inf)

    # Between the pool and its heads.

    @property
    def _num_heads(self) -> int:
        assert self.sizes is not None
        return self.sizes.heads

    @property
    def _heads(self) -> Tensor:
        return torch.arange(self._num_heads, device=self.positions.device)

    @property
    def _is_own(self) -> Tensor:
        """``[B, H, P]`` bool, whose slots are whose."""
        return self.owners == self._heads[:, None]

    def _positions_of_heads(self) -> Tensor:
        """``[B, H, P]`` int64, -1 where a slot is another's."""
        return torch.where(self._is_own, self.positions, -1)

    def _for_queries(self, heads: Tensor) -> Tensor:
        """``[B, H, P]`` or ``[B, H, G | 1, P]`` as ``[B, 1, H * G, P]``."""
        assert self.sizes is not None
        heads = heads.unsqueeze(2) if heads.dim() == 3 else heads
        return heads.expand(-1, -1, self.sizes.groups, -1).flatten(1, 2).unsqueeze(1)

    def _for_heads(self, pooled: Tensor) -> Tensor:
        """``[B, 1, P, ...]`` as ``[B, H, P, ...]``."""
        return pooled.expand(-1, self._num_heads, *pooled.shape[2:])

    def _of_owners(self, values: Tensor) -> Tensor:
        """Of ``[B, H, P, ...]`` what the owner of each slot has, ``[B, 1, P, ...]``."""
        index = self.owners.reshape(*self.owners.shape, *[1] * (values.dim() - 3))
        return values.gather(1, index.expand(*self.owners.shape, *values.shape[3:]))
