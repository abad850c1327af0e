"""What a policy is shown of a layer's slots, and which of them it gives up."""

import torch
from torch import Tensor

from compressed_cache.ops import eviction
from compressed_cache.ops.tokens import Tokens, where_real
from compressed_cache.policies.view import Slots
from compressed_cache.stores.memory import SlotMemory


class RankedSlots(SlotMemory):
    """Slots that the policy ranks.

    A store that lays out its slots in another way says so in :meth:`held`, :meth:`laid_out` and
    :meth:`owned`.
    """

    # What the policy is shown.

    def held(self) -> Tokens:
        """The tokens of each head."""
        return self.tokens

    def held_positions(self) -> Tensor:
        """``[B, H, S]`` int64, those of :meth:`held`."""
        return self.tokens.positions

    def view(self, tokens: Tokens, *, is_prompt: bool = False) -> Slots:
        """What the policy is shown of tokens ``[B, H, S, ...]``."""
        bound = self.bound
        return Slots(
            *tokens,
            next_position=self.next_position,
            layer=bound.layer,
            first_head=bound.shard.rank * tokens.positions.shape[1],
            transform=bound.transform,
            queries=self.queries,
            query_positions=self.query_positions,
            query_state=self.query_state,
            prompt_length=self.prompt_length,
            protected_prefix=self.protected_prefix,
            recent=bound.eviction.recent,
            interval=bound.eviction.interval,
            budget=bound.budget,
            is_prompt=is_prompt,
            constants=bound.constants,
            head_budgets=bound.head_budgets,
            floor=bound.floor,
        )

    def new_tokens(
        self, keys: Tensor, values: Tensor, positions: Tensor, hidden: Tensor | None = None
    ) -> Tokens:
        """New tokens with their notes, and nothing seen of them yet.

        Args:
            keys: ``[B, H, L, D']``.
            values: ``[B, H, L, D]``.
            positions: ``[B, L]`` int64, ``-1`` at padding.
            hidden: ``[B, L, E]``, if the policy needs hidden states.
        """
        shape, held = keys.shape[:3], self.tokens
        width = held.attention_state.shape[3:]
        seen = shape if self.bound.observer is not None else (*shape[:2], 0)
        new = Tokens(
            keys,
            values,
            positions[:, None].expand(shape),
            held.attention_state.new_zeros(*seen, *width),
            held.notes.new_zeros(*shape, self.bound.needs.notes),
        )
        if not self.bound.needs.notes:
            return new
        nothing = new.attention_state[:, :, :0], new.notes[:, :, :0]
        bare = self.view(Tokens(*new[:3], *nothing))._replace(hidden_states=hidden)
        return new._replace(notes=self.bound.note(bare))

    def owned(self, values: Tensor) -> Tensor:
        """Values ``[B, H, S, ...]`` as slots hold them."""
        return values

    def laid_out(self, new: Tensor) -> Tensor:
        """New tokens ``[B, H, 1, ...]`` as slots hold them."""
        return new

    # What the policy says.

    def slots_due(self, ranks: bool, real: Tensor | None) -> Tensor | None:
        """The slots to overwrite, ``[B, H, 1]``, where that was decided in an earlier step.

        Args:
            ranks: whether it is decided now, for the next ``interval`` steps.
            real: ``[B]`` bool, rows whose token is real; None: all.
        """
        interval = self.bound.eviction.interval
        if interval == 1:
            return None
        if ranks:
            self.victims.copy_(self.lowest(interval, real))
            # In every row: beams exchange theirs.
            self.counts[:, 2].zero_()
        return self.victims_due()

    def victims_due(self) -> Tensor:
        """Of the victims those of this step, ``[B, H, 1]``."""
        return self.victims.index_select(2, self.phase)

    def lowest(self, steps: int, real: Tensor | None) -> Tensor:
        """The slots to overwrite in ``steps`` steps, ``[B, H, steps]``."""
        scores, positions = self.ranked(steps, real), self.tokens.positions
        if steps == 1:
            return eviction.lowest_slot(scores, positions)
        return eviction.next_victims(
            scores,
            positions,
            next_position=self.next_position,
            protected_prefix=self.protected_prefix,
            count=steps,
        )

    def ranked(self, steps: int, real: Tensor | None) -> Tensor:
        """Scores ``[B, H, S]`` with protection applied, once the policy dropped what it drops."""
        slots = self.revised(steps, real)
        scores = self.bound.protect(self.scores(slots), slots)
        if self.bound.dropping is not None:
            gone = self.bound.dropped(slots, scores)
            gone = gone if real is None else gone & real[:, None, None]
            keys, values, positions = self.tokens[:3]
            if self.bound.merging is not None:
                evicted = keys, values, (positions >= 0) & gone
                self.merge((positions >= 0) & ~gone, evicted, None)
            scores = scores.masked_fill(gone, -torch.inf)
            positions.masked_fill_(self.owned(gone), -1)
        return scores

    def revised(self, steps: int, real: Tensor | None) -> Slots:
        """What is held, right before it is ranked for so many steps; notes change in rows ``[B]``
        that are real."""
        slots = self.view(self.held())
        if not self.bound.revises:
            return slots
        evicts = self.evicts(slots.positions, incoming=steps)
        notes = self.owned(self.bound.revise(slots, evicts).notes)
        self.tokens.notes.copy_(where_real(real, notes, self.tokens.notes))
        return self.view(self.held())

    def scores(self, slots: Slots) -> Tensor:
        """Scores ``[B, H, S]`` of the policy."""
        return self.bound.scores(slots)

    def rank_prompt(self, tokens: Tokens) -> tuple[Tensor, Tokens]:
        """Scores of the tokens of a prompt, protection applied, and these with revised notes."""
        evicts = self.evicts(tokens.positions, incoming=0)
        prompt = self.bound.revise(self.view(tokens, is_prompt=True), evicts)
        scores = self.bound.protect(self.scores(prompt), prompt)
        return scores, tokens._replace(notes=prompt.notes)

    def evicts(self, positions: Tensor, *, incoming: int) -> Tensor:
        """Whether some of these tokens ``[B, H, S]`` go as so many more come into each head,
        ``[B, H, 1]`` bool."""
        return (positions >= 0).sum(dim=-1, keepdim=True) + incoming > self.room()

    def merge(
        self, kept: Tensor, evicted: tuple[Tensor, Tensor, Tensor], real: Tensor | None
    ) -> None:
        """Puts what goes into the values of what is kept, see :class:`MergesValues`."""
        assert self.bound.merging is not None
        keys, values = self.tokens.keys, self.tokens.values
        merged = self.bound.merging.merged(keys, values, kept, evicted)
        values.copy_(where_real(real, merged, values))

    def observe(self, weights: Tensor, real: Tensor | None) -> None:
        """Shows the policy the weights ``[B, H, G, 1, S]`` of a step."""
        if self.bound.observer is not None:
            held, state = self.held(), self.tokens.attention_state
            weights = weights.detach().nan_to_num(0.0)
            own = self.next_position[:, None]
            seen = self.bound.accumulate(held.attention_state, weights, own, held.positions)
            state.copy_(where_real(real, self.owned(seen), state))
