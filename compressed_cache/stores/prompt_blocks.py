"""How a prompt is ranked block by block, each block on its own.

Rows are padded on the left, so a block is at other columns in each of them. It is gathered to the
right end of as many columns, where it looks like a short prompt::

    columns      .  .  a0 a1 a2 a3 a4      block of positions 0 to 2     a0 a1 a2     .  .  b0
                 .  .  .  .  .  .  b0      block of positions 3 to 5     .  a3 a4     .  .  .
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from compressed_cache.ops import attention, eviction
from compressed_cache.ops.tokens import Tokens, expand, gather
from compressed_cache.stores.slots import SlotStore


class Block(NamedTuple):
    """Where the tokens of a block are."""

    columns: Tensor
    """``[B, n]`` int64 of the prompt; any where there is no token."""
    positions: Tensor
    """``[B, n]`` int64, positions of the tokens, ``-1`` where there is none."""
    end: Tensor
    """``[B]`` int64, the position after the last token read until then."""

    def take(self, prompt: Tensor) -> Tensor:
        """Of ``[B, H, L, ...]`` the tokens of the block, ``[B, H, n, ...]``."""
        return gather(prompt, self.columns[:, None])

    def put(self, prompt: Tensor, tokens: Tensor) -> Tensor:
        """``[B, H, L, ...]`` with ``[B, H, n, ...]`` in the place of the block."""
        # One more column takes what is of no token.
        columns = torch.where(self.positions >= 0, self.columns, prompt.shape[2])
        longer = torch.cat([prompt, prompt[:, :, :1]], dim=2)
        return longer.scatter(2, expand(columns[:, None], prompt), tokens)[:, :, :-1]


def split(positions: Tensor, length: int) -> Iterator[Block]:
    """The blocks of a prompt.

    Args:
        positions: ``[B, L]`` int64 from 0 on, ``-1`` at padding, which is on the left.
        length: of a block, in positions.
    """
    columns = positions.shape[1]
    length = min(length, columns)
    lengths = (positions >= 0).sum(dim=1)
    for start in range(0, columns, length):
        end = lengths.clamp(max=start + length)
        own = end[:, None] + torch.arange(-length, 0, device=positions.device)
        place = (own + (columns - lengths)[:, None]).clamp(min=0)
        yield Block(place, torch.where(own >= start, own, -1), end)


def rank(
    store: SlotStore, query: Tensor, tokens: Tokens, positions: Tensor
) -> tuple[Tensor, Tokens]:
    """Scores of a prompt's tokens by their rank in their block, and these with revised notes.

    Where the policy has no blocks, the prompt is one.

    Args:
        store: whose counts are those of the end of the prompt.
        query: ``[B, H * G, L, D]``, all channels.
        tokens: ``[B, H, L, ...]``, keys with all channels.
        positions: ``[B, L]`` int64, as for :func:`split`.

    Returns:
        ``[B, H, L]`` float32, protection applied, and the tokens.
    """
    bound, notes = store.bound, tokens.notes
    scores = torch.zeros(tokens.positions.shape, device=positions.device)
    evicts = store.evicts(tokens.positions, incoming=0)
    for block in split(positions, bound.prompt_block or positions.shape[1]):
        slots = store.view(tokens.map(block.take), is_prompt=True)
        nothing = {name: torch.zeros_like(x) for name, x in store.query_state.items()}
        grouped = attention.group_queries(block.take(query), tokens.keys.shape[1])
        queries, query_positions = _last_queries(store, block, grouped)
        slots = bound.revise(
            slots._replace(
                next_position=block.end,
                prompt_end=store.next_position,
                prompt_length=block.end,
                queries=queries,
                query_positions=query_positions,
                query_state=bound.observe_queries(nothing, grouped, block.positions),
                positions=block.positions[:, None].expand_as(slots.positions),
            ),
            evicts,
        )
        place = eviction.places(bound.protect(store.scores(slots), slots), slots.positions)
        above = place.shape[2] - 1 - place
        size = (block.positions >= 0).sum(dim=1)[:, None, None].clamp(min=1)
        scores = block.put(scores, -(above + 0.5) / size)
        notes = block.put(notes, slots.notes)
    return bound.protect(scores, store.view(tokens)), tokens._replace(notes=notes)


def _last_queries(store: SlotStore, block: Block, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Of the queries ``[B, H, G, n, D]`` of a block the last ones ``[B, H, G, W, D]`` and their
    positions ``[B, W]``."""
    window = store.bound.needs.queries
    last = slice(-window, None) if window else slice(0, 0)
    queries, positions = queries[:, :, :, last], block.positions[:, last]
    missing = window - positions.shape[1]
    queries = torch.nn.functional.pad(queries, (0, 0, missing, 0))
    return queries, torch.nn.functional.pad(positions, (missing, 0), value=-1)
