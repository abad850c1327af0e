"""The plain store: how slots are ranked, written and attended, which other stores vary."""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from compressed_cache.ops import attention, eviction, gradients
from compressed_cache.ops.masks import Mask
from compressed_cache.ops.rings import write_last, write_one
from compressed_cache.ops.tokens import Tokens, expand, scatter, where_real
from compressed_cache.policies.view import Slots
from compressed_cache.stores.inputs import AttentionInputs
from compressed_cache.stores.memory import SlotMemory


class SlotStore(SlotMemory):
    """Slots of one attention layer, as many for each head.

    A decode step (:mod:`compressed_cache.stores.decode_step`) and a prompt
    (:mod:`compressed_cache.stores.prefill`) call these methods. Another store overrides those in
    which it differs; one that lays out its slots in another way says so in :meth:`held`,
    :meth:`laid_out` and :meth:`owned`.
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
            query_state=self.grouped(self.query_state),
            prompt_length=self.prompt_length,
            protected_prefix=self.protected_prefix,
            recent=bound.eviction.recent,
            budget=bound.budget,
            is_prompt=is_prompt,
            constants=bound.constants,
            head_budgets=bound.head_budgets,
            floor=bound.floor,
            interval=bound.eviction.interval,
        )

    def grouped(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors ``[B, H * G, ...]`` by name as ``[B, H, G, ...]``."""
        return {name: attention.group_queries(x, self.num_heads) for name, x in state.items()}

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
        return new._replace(notes=self.note(new, hidden)) if self.bound.needs.notes else new

    def note(self, new: Tokens, hidden: Tensor | None) -> Tensor:
        """What the policy writes down of new tokens, ``[B, H, L, N]``."""
        nothing = new.notes[:, :, :0]
        bare = new._replace(attention_state=new.attention_state[:, :, :0], notes=nothing)
        return self.bound.note(self.view(bare)._replace(hidden_states=hidden))

    # Rank.

    def slots_due(self, ranks: bool, real: Tensor | None) -> Tensor | None:
        """The slots to overwrite, ``[B, H, 1]``, where that was decided in an earlier step.

        Args:
            ranks: whether it is decided now, for the next ``interval`` steps.
            real: ``[B]`` bool, rows whose token is real; None: all.
        """
        interval = self.bound.eviction.interval
        if not self.bound.policy.evicts:
            return self.free_slot.expand(*self.tokens.positions.shape[:2], 1)
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
            scores, positions, protected_prefix=self.protected_prefix, count=steps
        )

    def ranked(self, steps: int, real: Tensor | None) -> Tensor:
        """Scores ``[B, H, S]`` with protection applied, once the policy dropped what it drops."""
        slots = self.revised(steps, real)
        scores = self.bound.protect(self.scores(slots), slots)
        if self.bound.dropping is not None:
            gone = self.bound.dropped(slots, scores)
            gone = gone if real is None else gone & real[:, None, None]
            if self.bound.merging is not None:
                keys, values, positions = self.tokens[:3]
                evicted = keys, values, (positions >= 0) & gone
                self.merge((positions >= 0) & ~gone, evicted, None)
            scores = scores.masked_fill(gone, -torch.inf)
            self.drop(gone)
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

    def drop(self, gone: Tensor) -> None:
        """Empties slots, ``[B, H, S]`` bool."""
        self.tokens.positions.masked_fill_(self.owned(gone), -1)

    def owned(self, values: Tensor) -> Tensor:
        """Values ``[B, H, S, ...]`` as slots hold them."""
        return values

    # Write.

    def write(self, key: Tensor, value: Tensor, slot: Tensor, real: Tensor | None) -> None:
        """Puts tokens ``[B, H, 1, D]`` at the next position into slots ``[B, H, 1]``."""
        put(self.tokens.keys, slot, self.laid_out(key), real)
        put(self.tokens.values, slot, self.laid_out(value), real)
        now = self.next_position[:, None, None]
        put(self.tokens.positions, slot, now.expand_as(slot), real)
        self.forget(slot, real)

    def write_notes(
        self,
        key: Tensor,
        value: Tensor,
        slot: Tensor,
        real: Tensor | None,
        hidden: Tensor | None = None,
    ) -> None:
        """Writes down what the policy notes of tokens that were put into slots."""
        if self.bound.needs.notes:
            new = self.new_tokens(self.kept(key), value, self.next_position[:, None], hidden)
            put(self.tokens.notes, slot, self.laid_out(new.notes), real)

    def forget(self, slot: Tensor, real: Tensor | None) -> None:
        """Nothing was seen yet of the tokens in slots ``[B, H, 1]``."""
        state = self.tokens.attention_state
        if self.bound.observer is None:
            return
        if real is None:
            state.scatter_(2, expand(slot, state), 0.0)
        else:
            put(state, slot, state.new_zeros(()).expand(*slot.shape, *state.shape[3:]), real)

    def keep(self, tokens: Tokens, scores: Tensor | None = None) -> None:
        """Copies the best of these tokens ``[B, H, L, ...]`` into the slots.

        Args:
            tokens: those of a prompt, and what was held before.
            scores: ``[B, H, L]`` float32, protection applied; None: what the policy says of all
                together.
        """
        count = min(tokens.positions.shape[2], self.tokens.positions.shape[2])
        if count == tokens.positions.shape[2]:
            tokens.copy_into(self.tokens, slice(0, count))
            return
        if scores is None:
            scores, tokens = self.rank_prompt(tokens)
        best = eviction.keep_best(scores, tokens.positions, count=count)
        tokens.gather(best).copy_into(self.tokens, slice(0, count))
        if self.bound.merging is not None:
            gone = (tokens.positions >= 0).scatter(2, best, False)
            self.merge(self.tokens.positions >= 0, (tokens.keys, tokens.values, gone), None)

    def keep_chunk(self, tokens: Tokens, new: Tokens, *, is_first_prompt: bool) -> None:
        """Keeps what is worth it of a chunk.

        Args:
            tokens: all that it saw.
            new: those of them that are new, the last ones.
            is_first_prompt: whether they go on with the first prompt.
        """
        if self.bound.policy.evicts:
            self.keep(tokens)
        else:
            self.append(new)

    def append(self, tokens: Tokens) -> None:
        """Puts tokens ``[B, H, L, ...]`` into free slots (policies that do not evict)."""
        free = torch.arange(tokens.positions.shape[2], device=tokens.positions.device)
        tokens.copy_into(self.tokens, self.free_slot + free)

    def merge(
        self, kept: Tensor, evicted: tuple[Tensor, Tensor, Tensor], real: Tensor | None
    ) -> None:
        """Puts what goes into the values of what is kept, see :class:`MergesValues`."""
        assert self.bound.merging is not None
        keys, values = self.tokens.keys, self.tokens.values
        merged = self.bound.merging.merged(keys, values, kept, evicted)
        values.copy_(where_real(real, merged, values))

    def laid_out(self, new: Tensor) -> Tensor:
        """New tokens ``[B, H, 1, ...]`` as slots hold them."""
        return new

    def observe_queries(self, query: Tensor, positions: Tensor) -> None:
        """Shows the policy queries ``[B, H * G, L, D]`` of the first prompt."""
        for name, seen in self.queries_observed(self.query_state, query, positions).items():
            self.query_state[name].copy_(seen)

    def queries_observed(
        self, state: Mapping[str, Tensor], query: Tensor, positions: Tensor
    ) -> dict[str, Tensor]:
        """What the policy makes of queries ``[B, H * G, L, D]`` after those behind ``state``."""
        observer = self.bound.query_observer
        if observer is None or not state:
            return {}
        grouped = attention.group_queries(query, self.num_heads)
        seen = observer.observe_queries(
            self.grouped(state), grouped, positions, self.bound.constants
        )
        return {name: x.flatten(1, 2) for name, x in seen.items()}

    # Attend.

    def held_for_chunk(
        self, inputs: AttentionInputs, *, is_first_prompt: bool
    ) -> tuple[Tokens, Tensor]:
        """What the tokens of a chunk may see of what was read before, and its keys as a whole."""
        held = self.held()
        return held, held.keys

    def choose_channels(self, query: Tensor, real: Tensor, tokens: Tokens, scores: Tensor) -> None:
        """Settles the order of channels by a first prompt.

        Args:
            query: ``[B, H * G, L, D]``.
            real: ``[B, L]`` bool.
            tokens: ``[B, H, L, ...]``, keys with all channels.
            scores: ``[B, H, L]`` float32, protection applied, by which they are kept.
        """

    def fetch(self, query: Tensor, real: Tensor | None = None) -> None:
        """Brings to the device what queries ``[B, H * G, L, D]`` ask for; real ``[B, L]`` bool."""

    def ordered(self, x: Tensor) -> Tensor:
        """Queries or keys ``[B, H * G | H, L, D]`` with channels in the order of the slots."""
        return x

    def kept(self, x: Tensor) -> Tensor:
        """Of ordered channels those that stay, ``[..., D']``."""
        return x

    def whole_keys(self, *, written: int = 0) -> Tensor:
        """All that is known of the keys in the slots, ``[B, H, S, D]`` in their order.

        Args:
            written: tokens in slots that are not counted yet.
        """
        return self.tokens.keys

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Mask | None
    ) -> tuple[Tensor, Tensor]:
        """Attention of one new token per row, which is among the slots.

        Args:
            query: ``[B, H * G, 1, D]``.
            keys: ``[B, H, S, D]``.
            values: ``[B, H, S, D]``.
            mask: what the token sees; None: all that is held.

        Returns:
            The output ``[B, H * G, 1, D]`` and the weights ``[B, H, G, 1, S]`` float32.
        """
        visible, bias = self.visible(mask)
        return attention.attend(query, keys, values, visible, self.bound.transform, bias)

    def visible(self, mask: Mask | None) -> tuple[Tensor, Tensor | None]:
        """What a new token sees, ``[B, H, S]`` or ``[B, H, G | 1, S]`` bool, and what is added to
        its logits."""
        positions = self.held_positions()
        held = positions >= 0
        # That of several tokens of which one is left says nothing of what is held.
        if mask is None or mask.past is None:
            return held, None
        see = self.see(mask.over_slots(), positions)
        assert see is not None
        visible, bias = see(held.unsqueeze(2), held.unsqueeze(2), 0)
        return visible.squeeze(3), None if bias is None else bias.squeeze(3)

    def see(self, mask: Mask | None, positions: Tensor) -> attention.See | None:
        """What a mask shows of tokens at ``positions`` ``[B, H, S]`` and of new ones after them."""
        if mask is None:
            return None
        assert self.sizes is not None
        return functools.partial(
            mask.see, positions=positions, groups=self.sizes.groups, window=self.bound.window
        )

    def constant(self, held: Tensor, *traced: Tensor) -> Tensor:
        """What is held of earlier calls, as a constant of one with gradients through ``traced``."""
        is_past = self.has_gradients and gradients.wants_gradient(*traced)
        return gradients.constant(held, *traced) if is_past else held

    def observe(self, weights: Tensor, real: Tensor | None) -> None:
        """Shows the policy the weights ``[B, H, G, 1, S]`` of a step."""
        if self.bound.observer is not None:
            held, state = self.held(), self.tokens.attention_state
            weights = weights.detach().nan_to_num(0.0)
            own = self.next_position[:, None]
            seen = self.bound.accumulate(held.attention_state, weights, own, held.positions)
            state.copy_(where_real(real, self.owned(seen), state))

    # Count.

    def record_query(self, query: Tensor, real: Tensor | None) -> None:
        """Writes a query ``[B, H * G, 1, D]`` to its place in the ring."""
        if self.bound.needs.queries:
            now = self.next_position
            grouped = attention.group_queries(self.kept(query), self.tokens.keys.shape[1])
            write_one(self.queries, 3, grouped, now, real)
            write_one(self.query_positions, 1, now[:, None], now, real)

    def record_queries(self, query: Tensor, positions: Tensor) -> None:
        """Writes the last of many queries ``[B, H * G, L, D]``, once they are counted."""
        if self.bound.needs.queries:
            grouped = attention.group_queries(self.kept(query), self.tokens.keys.shape[1])
            write_last(self.queries, grouped, positions, self.next_position)
            ring, own = (x[:, None, None, :, None] for x in (self.query_positions, positions))
            write_last(ring, own, positions, self.next_position)

    def record_channels(self, key: Tensor, positions: Tensor) -> None:
        """Writes the other channels of the last of many keys, once they are counted."""

    def count_step(self, real: Tensor | None) -> None:
        """Counts a step, whose tokens are real in rows ``[B]`` bool, or in all of them (None)."""
        self.counts.add_(1)
        if real is not None:
            self.next_position.sub_((~real).long())


def put(memory: Tensor, slot: Tensor, new: Tensor, real: Tensor | None) -> None:
    """Overwrites ``[B, H, S, ...]`` with ``[B, H, n, ...]`` where tokens are real."""
    scatter(memory, 2, expand(slot, memory), new, real)
