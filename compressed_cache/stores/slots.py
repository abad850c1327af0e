"""The plain store: how slots are written, attended and counted, which other stores vary."""

import functools

from torch import Tensor

from compressed_cache.ops import attention, eviction
from compressed_cache.ops.masks import Mask
from compressed_cache.ops.rings import write_last, write_one
from compressed_cache.ops.tokens import Tokens, expand, scatter
from compressed_cache.stores.inputs import AttentionInputs
from compressed_cache.stores.ranking import RankedSlots


class SlotStore(RankedSlots):
    """Slots of one attention layer, as many for each head.

    A decode step (:mod:`compressed_cache.stores.decode_step`) and a prompt
    (:mod:`compressed_cache.stores.prefill`) call these methods and those of
    :class:`~compressed_cache.stores.ranking.RankedSlots`. Another store overrides those in which it
    differs.
    """

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
        if self.bound.observer is not None:
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
        self.keep(tokens)

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

    def choose_late_channels(self, query: Tensor, key: Tensor, positions: Tensor) -> None:
        """Settles the order of channels of rows that had only padding so far.

        Args:
            query: ``[B, H * G, L, D]``.
            key: ``[B, H, L, D]``.
            positions: ``[B, L]`` int64.
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
