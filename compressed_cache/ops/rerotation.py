"""Attention as if the held tokens followed one another without gaps."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import embedding

from compressed_cache.ops.attention import group_queries
from compressed_cache.ops.eviction import ranks_by_position
from compressed_cache.ops.rotary import Rotary


def rerotate_to_ranks(
    queries: Tensor,
    keys: Tensor,
    *,
    query_positions: Tensor,
    positions: Tensor,
    constants: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned to the places of their tokens among those that are held.

    Each head holds other tokens, so each has places of its own.

    Args:
        queries: ``[B, H * G, L, D]`` of tokens that follow one another, rotated at their positions.
        keys: ``[B, H, S, D]``, rotated at theirs, those of the queries' tokens among them.
        query_positions: ``[B, L]`` int64.
        positions: ``[B, H, S]`` int64, ``-1`` where there is no token.
        constants: the :meth:`Rotary.constants` of the layer.

    Returns:
        The same in float32, or float64 where they are.
    """
    rotary = Rotary.among(constants)
    ranks = ranks_by_position(positions)
    # As many positions are missing before all of the queries.
    missing = positions.amax(dim=-1, keepdim=True) - ranks.amax(dim=-1, keepdim=True)
    own = query_positions[:, None]
    grouped = group_queries(queries, keys.shape[1])
    turns = rotary.turns((own - missing)[:, :, None])
    grouped = _move(rotary, grouped, own[:, :, None], turns)
    # All heads have the same places.
    places = rotary.turns(torch.arange(ranks.shape[-1], device=ranks.device))
    turns = tuple(embedding(ranks.clamp(min=0), table) for table in places)
    return grouped.flatten(1, 2), _move(rotary, keys, positions, turns)


def _move(rotary: Rotary, x: Tensor, old: Tensor, new: tuple[Tensor, ...]) -> Tensor:
    """``x`` turned back from its positions, and by the cosines and sines of others."""
    # Not by the angle of the difference: far into a text the model's own angles are rounded, which
    # only the same angles undo.
    (old_cos, old_sin), (cos, sin) = rotary.turns(old), new
    difference = (
        torch.addcmul(cos * old_cos, sin, old_sin),
        torch.addcmul(sin * old_cos, cos, old_sin, value=-1),
    )
    return rotary.turn(x.to(torch.promote_types(x.dtype, torch.float32)), *difference)
