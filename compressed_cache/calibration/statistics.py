"""What is collected for each policy: sums over tokens, and what is made of them at the end."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compressed_cache.ops.attention import LogitTransform, attention_rows
from compressed_cache.ops.rotary import Rotary

IGNORED_SINKS = 4
"""First queries left out by the expected attention, whose queries are not like later ones."""
DUO_SINKS, DUO_RECENT = 16, 64
"""What a streaming head sees in the measure for the duo attention."""


class Sample(NamedTuple):
    """One layer on one piece of text."""

    queries: Tensor
    """``[H, G, N, D]`` after RoPE."""
    keys: Tensor
    """``[H, N, D]`` after RoPE."""
    positions: Tensor
    """``[N]`` int64, ascending."""
    transform: LogitTransform
    rotary: Callable[[], Rotary]
    """How the layer turns them; refuses a layer where that is unknown."""


Sums = dict[str, Tensor]


class Statistics(NamedTuple):
    """How the statistics of one policy are made."""

    sums: Callable[[Sample], Sums]
    finish: Callable[[Sums], dict[str, Tensor]]
    """Gets the sums over all samples; every result begins with ``[H]``."""


def unrotated(sample: Sample) -> Tensor:
    """Queries as before RoPE, but for its scaling, float64."""
    return sample.rotary().rotate(sample.queries.double(), -sample.positions)


def _second_moments(sample: Sample) -> Sums:
    queries = sample.queries.double()
    return {"sum": queries.sum(dim=2), "products": queries.mT @ queries}


def _filters(sums: Sums) -> dict[str, Tensor]:
    # The right singular vectors of the matrix of all queries are the eigenvectors of its products.
    direction = torch.linalg.eigh(sums["products"]).eigenvectors[..., -1]
    sign = torch.where((direction * sums["sum"]).sum(dim=-1, keepdim=True) < 0, -1.0, 1.0)
    return {"filters": -(sign * direction).mean(dim=1)}


def _centres(sample: Sample) -> Sums:
    queries = unrotated(sample)
    pairs = queries.square() + queries[..., sample.rotary().partners].square()
    return {
        "count": queries.new_tensor(queries.shape[2]),
        "sum": queries.sum(dim=2),
        "magnitudes": pairs.sqrt().sum(dim=2),
    }


def _means(sums: Sums) -> dict[str, Tensor]:
    return {
        "mean": sums["sum"] / sums["count"],
        "magnitude": sums["magnitudes"] / sums["count"],
    }


def _moments(sample: Sample) -> Sums:
    queries = unrotated(sample)[:, :, sample.positions >= IGNORED_SINKS]
    return {
        "count": queries.new_tensor(queries.shape[2]),
        "sum": queries.sum(dim=2),
        "products": queries.mT @ queries,
    }


def _gaussian(sums: Sums) -> dict[str, Tensor]:
    mean = sums["sum"] / sums["count"]
    covariance = sums["products"] / sums["count"] - mean[..., :, None] * mean[..., None, :]
    return {"mean": mean, "covariance": covariance}


def _far_mass(sample: Sample) -> Sums:
    positions = sample.positions
    far, count = sample.keys.new_zeros(sample.keys.shape[0], dtype=torch.float64), 0
    for weights, own in attention_rows(
        sample.queries.flatten(0, 1)[None],
        sample.keys[None],
        query_positions=positions[None],
        positions=positions[None, None],
        transform=sample.transform,
    ):
        own = own[0, :, None]
        outside = (positions >= DUO_SINKS) & (positions <= own - DUO_RECENT)
        # Only queries that have something outside can tell.
        asked = own[:, 0] >= DUO_SINKS + DUO_RECENT
        mass = (weights[0] * outside).sum(dim=-1).amax(dim=1) * asked
        far = far + mass.sum(dim=-1).double()
        count += int(asked.sum())
    return {"count": far.new_tensor(count), "far": far}


def _gates(sums: Sums) -> dict[str, Tensor]:
    return {"gates": (sums["far"] / sums["count"].clamp(min=1)).clamp(0, 1)}


STATISTICS: dict[str, Statistics] = {
    "qfilter": Statistics(_second_moments, _filters),
    "triattention": Statistics(_centres, _means),
    "expected_attention": Statistics(_moments, _gaussian),
    "duo_attention": Statistics(_far_mass, _gates),
}
