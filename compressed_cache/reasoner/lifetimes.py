"""Until when each token of a solved walk is needed: what training may hide from the model."""

import torch
from torch import Tensor

from compressed_cache.reasoner.problems import DIGITS, ITEMS, PRICES, Problem

SHORTEST_WINDOW = 28  # a line and what it copies from the line before


def needed_until(problem: Problem) -> list[int]:
    """For each token of ``prompt trace``, the position of the last query that has to see it.

    Facts live until their last lookup. All other tokens get their own position: how long the line
    that is being written stays in sight is the caller's business.
    """
    tokens = f"{problem.prompt} {problem.trace}".split()
    solve = tokens.index("solve")
    until = list(range(len(tokens)))
    found: dict[str, int] = {}  # a place, a good or a cost, and where it was stated

    def look_up(position: int, *names: str) -> None:
        for name in names:
            for fact in (found[name] - 1, found[name]):
                until[fact] = max(until[fact], position)

    for i, token in enumerate(tokens):
        before, after = tokens[i - 1], tokens[min(i + 1, len(tokens) - 1)]
        if i < solve:
            if token in ITEMS:
                found[f"place {before}"], found[f"price {token}"] = i, i + 1
            elif before in ("tax", "start"):
                found[before] = i
        elif before == "tax":
            look_up(i - 1, "tax")
        elif token in DIGITS and after in ITEMS and before in ("solve", ".", "at"):
            look_up(i, f"place {token}")
        elif token in ITEMS and after in PRICES:
            look_up(i, f"price {token}")
        elif token in ITEMS and before == "so":
            found[f"cost {token}"] = i + 1
        elif token in ITEMS:
            look_up(i, f"cost {token}")
    found["steps"] = solve - 1
    first = tokens.index("left")
    look_up(first + 3, "start", "steps")
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
