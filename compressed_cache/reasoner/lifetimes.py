"""Until when each token of a solved ledger is needed: what training may hide from the model."""

import torch
from torch import Tensor

from compressed_cache.reasoner.problems import PRICES, Problem

SHORTEST_WINDOW = 28  # a line and what it copies from the line before


def needed_until(problem: Problem) -> list[int]:
    """For each token of ``prompt trace``, the position of the last query that has to see it.

    Facts live until their last lookup. All other tokens get their own position: how long the line
    that is being written stays in sight is the caller's business.
    """
    tokens = f"{problem.prompt} {problem.trace}".split()
    goods, order, start = tokens.index("goods"), tokens.index("order"), tokens.index("solve") + 1
    until = list(range(len(tokens)))

    entry, price, cost, tax = {}, {}, {}, 1
    for i in range(start, len(tokens)):
        if tokens[i - 1] == "good":
            entry[tokens[i]], price[tokens[i + 1]] = i, i + 1
        elif tokens[i - 1] == "step":
            entry[tokens[i]], cost[tokens[i + 1]] = i, i + 1
        elif tokens[i] == "tax":
            tax = i

    until[0] = until[1] = tax
    for i in range(goods + 1, start - 1):
        if tokens[i] in entry:
            until[i] = entry[tokens[i]]
            until[i + 1] = max(until[i], price.get(tokens[i + 1], 0) if i < order else 0)
        elif tokens[i] in PRICES:
            until[i] = price[tokens[i - 1]]
    for i in range(start, len(tokens)):
        if tokens[i] == "now":
            until[i + 1] = until[i + 2] = max(i + 2, cost.get(tokens[i + 1], 0))
    return until


def visible(until: Tensor, *, layers: int, heads: int, groups: int) -> list[Tensor]:
    """Which keys each query may see when a random share of the stale ones is hidden for good.

    Args:
        until: ``[B, L]`` position of the last query that needs each token.
        layers: number of masks, all different.
        heads: key/value heads, each with its own pattern, as policies evict per head.
        groups: query heads for each of them.

    Returns:
        ``[B, heads * groups, L, L]`` bool for each layer.
    """
    batch, length = until.shape
    positions = torch.arange(length)
    share = (torch.rand(batch, 1, 1) * 1.25).clamp(max=1)
    spread = torch.randint(8, 100, (batch, 1, 1))
    keep_first = torch.rand(batch, 1) < 0.85
    masks = []
    for _ in range(layers):
        window = SHORTEST_WINDOW + torch.rand(batch, heads, length) * spread
        last = torch.maximum(positions + window, until[:, None].float())
        last = last.masked_fill(torch.rand(batch, heads, length) >= share, length)
        last[..., 0].masked_fill_(keep_first, length)
        seen = (positions[:, None] >= positions) & (positions[:, None] <= last[:, :, None])
        masks.append(seen.repeat_interleave(groups, dim=1))
    return masks
