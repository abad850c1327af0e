"""How a prompt is ranked block by block, each block on its own.

Rows are padded on the left, so a block is at other columns in each of them. It is gathered to the
right end of as many columns, where it looks like a short prompt::

    columns      .  .  a0 a1 a2 a3 a4      block of positions 0 to 2     a0 a1 a2     .  .  b0
                 .  .  .  .  .  .  b0      block of positions 3 to 5     .  a3 a4     .  .  .
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from compressed_cache.ops import attention
from compressed_cache.ops import eviction as slots

if TYPE_CHECKING:
    from compressed_cache.layer import CompressedLayer


class Block(NamedTuple):
    """Where the tokens of a block are."""

    columns: Tensor
    """``[B, n]`` int64 of the prompt; any where there is no token."""
    rows: Tensor
    """``[B, n]`` int64, positions of the tokens, ``-1`` where there is none."""
    end: Tensor
    """``[B]`` int64, the position after the last token read until then."""

    def take(self, prompt: Tensor) -> Tensor:
        """Of ``[B, H, L, ...]`` the tokens of the block, ``[B, H, n, ...]``; of what is not kept of
        tokens, ``[B, H, 0, ...]``, nothing."""
        return prompt.gather(2, _index(self.columns, prompt)) if prompt.shape[2] else prompt

    def put(self, prompt: Tensor, tokens: Tensor) -> Tensor:
        """``[B, H, L, ...]`` with ``[B, H, n, ...]`` in the place of the block."""
        # One more column takes what is of no token.
        columns = torch.where(self.rows >= 0, self.columns, prompt.shape[2])
        longer = torch.cat([prompt, prompt[:, :, :1]], dim=2)
        return longer.scatter(2, _index(columns, prompt), tokens)[:, :, :-1]


def split(rows: Tensor, length: int) -> Iterator[Block]:
    """The blocks of a prompt.

    Args:
        rows: ``[B, L]`` int64 positions from 0 on, ``-1`` at padding, which is on the left.
        length: of a block, in positions.
    """
    columns = rows.shape[1]
    length = min(length, columns)
    lengths = (rows >= 0).sum(dim=1)
    for start in range(0, columns, length):
        end = lengths.clamp(max=start + length)
        positions = end[:, None] + torch.arange(-length, 0, device=rows.device)
        place = (positions + (columns - lengths)[:, None]).clamp(min=0)
        yield Block(place, torch.where(positions >= start, positions, -1), end)


def rank(
    layer: "CompressedLayer",
    query: Tensor,
    tokens: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """Scores of a prompt's tokens by their rank in their block, and their revised notes.

    Args:
        layer: whose counts are those of the end of the prompt.
        query: ``[B, H * G, L, D]``.
        tokens: keys, values, positions, what was seen of them and notes, ``[B, H, L, ...]``.
        rows: ``[B, L]`` int64, as for :func:`split`.

    Returns:
        ``[B, H, L]`` float32, protection applied, and ``[B, H, L, N]`` float32.
    """
    positions, notes = tokens[2], tokens[4]
    scores = torch.zeros(positions.shape, device=positions.device)
    assert layer.policy.prompt_block is not None
    for block in split(rows, layer.policy.prompt_block):
        held = layer.view(*map(block.take, tokens), is_prompt=True)
        queries, query_positions = _last_queries(layer, block, query, positions.shape[1])
        held = held._replace(
            next_position=block.end,
            prompt_length=block.end,
            queries=queries,
            query_positions=query_positions,
            positions=block.rows[:, None].expand_as(held.positions),
        )
        held = held._replace(notes=layer.policy.revise(held))
        # What is protected ranks above what the policy itself always keeps.
        own = layer.scores(held).clamp(max=torch.finfo(torch.float32).max)
        order = slots.rank(layer.protect(own, held.positions), held.positions)
        above = torch.arange(order.shape[2] - 1, -1, -1, device=order.device).expand_as(order)
        above = torch.empty_like(order).scatter(2, order, above)
        size = (block.rows >= 0).sum(dim=1)[:, None, None].clamp(min=1)
        scores = block.put(scores, -(above + 0.5) / size)
        notes = block.put(notes, held.notes)
    return layer.protect(scores, positions), notes


def _last_queries(
    layer: "CompressedLayer", block: Block, query: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """The last queries of a block ``[B, H, G, W, D]`` and their positions ``[B, W]``."""
    window = layer.policy.num_queries
    last = block._replace(columns=block.columns[:, -window:], rows=block.rows[:, -window:])
    if window == 0:
        last = block._replace(columns=block.columns[:, :0], rows=block.rows[:, :0])
    missing = window - last.rows.shape[1]
    queries = attention.group_queries(last.take(query), heads)
    queries = torch.nn.functional.pad(queries, (0, 0, missing, 0))
    return queries, torch.nn.functional.pad(last.rows, (missing, 0), value=-1)


def _index(columns: Tensor, prompt: Tensor) -> Tensor:
    columns = columns.reshape(columns.shape[0], 1, -1, *[1] * (prompt.dim() - 3))
    return columns.expand(*prompt.shape[:2], -1, *prompt.shape[3:])
