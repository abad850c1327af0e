"""A store of keys without the channels that matter least, except those of the last tokens.

With ``D'`` the channels that stay, ``R`` the last tokens that keep all, and channels in an order of
each key/value head that begins with those that stay::

                     channels
                  0 .. D'-1  D' .. D-1
    every slot      keys         0
    position p      keys     recent[p % R]     of the last R tokens

Products of queries and keys do not depend on that order as long as both have the same.
"""

import torch
from torch import Tensor

from compressed_cache.ops import attention, eviction
from compressed_cache.ops.rings import moved_to, places_of, write_last, write_one
from compressed_cache.ops.tokens import Sizes, Tokens, gather
from compressed_cache.policies.capabilities import PrunesChannels
from compressed_cache.stores.inputs import AttentionInputs
from compressed_cache.stores.lazy import LazyStore
from compressed_cache.stores.slots import SlotStore


class PrunedStore(SlotStore):
    """Slots of one attention layer whose keys have only some of their channels.

    Attributes:
        tokens: as everywhere, and keys are ``[B, H, S, D']``.
        channels: ``[B, H, D]`` int64, their order.
        recent_channels: ``[B, H, R, D - D']``, a ring with the other channels of the last tokens.
    """

    channels: Tensor
    recent_channels: Tensor

    # Memory.

    def key_channels(self, dim: int) -> int:
        """``D'``."""
        return self._pruning.key_channels(dim)

    @torch.inference_mode(False)
    def allocate(self, sizes: Sizes) -> None:
        """New memory, empty."""
        super().allocate(sizes)
        self.is_fused = False
        held = self.tokens.keys
        batch, heads, _, dim = held.shape
        recent = self._pruning.recent_whole_keys
        self.channels = torch.zeros(batch, heads, sizes.dim, dtype=torch.int64, device=held.device)
        self.recent_channels = held.new_zeros(batch, heads, recent, sizes.dim - dim)
        self.mark()

    def renumber(self, moved: Tensor) -> None:
        """Moves tokens to other positions, and empties the slots of those that have none."""
        last = self.next_position[:, None] - 1
        ring = torch.arange(self.recent_channels.shape[2], device=last.device)
        own = moved_to(last - (last - ring) % len(ring), moved.to(last.device))
        super().renumber(moved)
        place, found = places_of(own)
        recent = gather(self.recent_channels, place[:, None])
        self.recent_channels.copy_(recent.masked_fill(~found[:, None, :, None], 0))

    # A prompt.

    def choose_channels(self, query: Tensor, real: Tensor, tokens: Tokens, scores: Tensor) -> None:
        """Settles the order of channels by the queries of a first prompt and the keys it keeps."""
        keys, positions = tokens.keys, tokens.positions
        place = eviction.places(scores, positions)
        kept = (positions >= 0) & (place >= place.shape[2] - self.room())
        self.channels.copy_(self._order(query, real, keys, kept))

    def choose_late_channels(self, query: Tensor, key: Tensor, positions: Tensor) -> None:
        """Settles the order of channels of rows that had only padding so far, by all their keys."""
        real = positions >= 0
        order = self._order(query, real, key, real[:, None].expand(key.shape[:3]))
        is_late = (self.next_position == 0)[:, None, None]
        self.channels.copy_(torch.where(is_late, order, self.channels))

    def _order(self, query: Tensor, real: Tensor, keys: Tensor, kept: Tensor) -> Tensor:
        """The order of channels by these queries, and those keys that are kept."""
        grouped = attention.group_queries(query, keys.shape[1])
        scores = self._pruning.channel_scores(grouped, real, keys, kept)
        return order_of(scores, self.tokens.keys.shape[3])

    def held_for_chunk(
        self, inputs: AttentionInputs, *, is_first_prompt: bool
    ) -> tuple[Tokens, Tensor]:
        """What the tokens of a chunk may see of what was read before, and its keys as a whole."""
        held, _ = super().held_for_chunk(inputs, is_first_prompt=is_first_prompt)
        return held, self.whole_keys()

    def record_channels(self, key: Tensor, positions: Tensor) -> None:
        """Writes the other channels of the last of many keys, once they are counted."""
        others = key[..., self.tokens.keys.shape[3] :].unsqueeze(2)
        write_last(self.recent_channels.unsqueeze(2), others, positions, self.next_position)

    # A step.

    def write(self, key: Tensor, value: Tensor, slot: Tensor, real: Tensor | None) -> None:
        """Puts tokens ``[B, H, 1, D]`` at the next position into slots ``[B, H, 1]``."""
        key, others = key.split([self.tokens.keys.shape[3], self.recent_channels.shape[3]], dim=3)
        write_one(self.recent_channels, 2, others, self.next_position, real)
        super().write(key, value, slot, real)

    def ordered(self, x: Tensor) -> Tensor:
        """Queries or keys ``[B, H * G | H, L, D]`` with channels in the order of the slots."""
        return ordered(x, self.channels)

    def kept(self, x: Tensor) -> Tensor:
        """Of ordered channels those that stay, ``[..., D']``."""
        return x[..., : self.tokens.keys.shape[3]]

    def whole_keys(self, *, written: int = 0) -> Tensor:
        """All that is known of the keys in the slots, ``[B, H, S, D]`` in their order."""
        keys, _, positions = self.tokens[:3]
        return whole_keys(keys, self.recent_channels, positions, self.next_position + written)

    @property
    def _pruning(self) -> PrunesChannels:
        assert self.bound.pruning is not None
        return self.bound.pruning


class PrunedLazyStore(PrunedStore, LazyStore):
    """Both."""


def order_of(scores: Tensor, count: int) -> Tensor:
    """An order ``[B, H, D]`` int64 that begins with the ``count`` channels of highest score."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    parts = order[..., :count].sort(dim=-1).values, order[..., count:].sort(dim=-1).values
    return torch.cat(parts, dim=-1)


def ordered(x: Tensor, order: Tensor) -> Tensor:
    """Queries or keys ``[B, H * G | H, L, D]`` with their channels in ``order`` ``[B, H, D]``."""
    grouped = x.unflatten(1, (order.shape[1], -1))
    return grouped.gather(-1, order[:, :, None, None].expand_as(grouped)).flatten(1, 2)


def whole_keys(keys: Tensor, recent: Tensor, positions: Tensor, next_position: Tensor) -> Tensor:
    """All that is known of the keys in the slots, ``[B, H, S, D]``.

    Args:
        keys: ``[B, H, S, D']``.
        recent: ``[B, H, R, D - D']``, the ring with the other channels of the last tokens.
        positions: ``[B, H, S]`` int64.
        next_position: ``[B]`` int64, the first position that was not yet written.
    """
    size = recent.shape[2]
    place = (positions % size).unsqueeze(-1)
    others = recent.gather(2, place.expand(*place.shape[:3], recent.shape[3]))
    is_recent = positions >= (next_position - size)[:, None, None]
    return torch.cat([keys, others.where(is_recent.unsqueeze(-1), 0.0)], dim=-1)
