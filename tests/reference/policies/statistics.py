"""Scores that need statistics of the model."""

import cmath
import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch

from tests.reference.policies.view import Token, Vector, View, mean, softmax


def qfilter(view: View) -> list[float]:
    """Minus the product of the key with a filter.

    Q-Filters (https://arxiv.org/abs/2503.02812).
    """
    key = view.held[0].key
    filters = made_up("qfilter", view.layer, view.head, len(view.queries[0]), len(key))["filters"]
    return [-float(filters @ token.key) for token in view.held]


def triattention(view: View, *, num_offsets: int = 17, theta: float = 10_000.0) -> list[float]:
    """Mean over distances ahead of a series of cosines, normalised, of the strongest query head.

    TriAttention (https://arxiv.org/abs/2604.04921), literally: keys are turned back to position 0.
    """
    dim, heads = len(view.held[0].key), len(view.queries[0])
    statistics = made_up("triattention", view.layer, view.head, heads, dim)
    scores = np.empty((heads, len(view.held)))
    for head in range(heads):
        for index, token in enumerate(view.held):
            scores[head, index] = trigonometric_series(
                statistics["mean"][head],
                statistics["magnitude"][head],
                token,
                now=view.incoming,
                num_offsets=num_offsets,
                theta=theta,
            )
    counted = [i for i, token in enumerate(view.held) if token.position >= view.prompt_length]
    counted = counted or list(range(len(view.held)))
    for row in scores:
        centre = mean(row[counted].tolist())
        deviation = math.sqrt(mean(((row[counted] - centre) ** 2).tolist()))
        row[:] = (row - centre) / max(deviation, 1e-6)
    return scores.max(axis=0).tolist()


def trigonometric_series(
    centre: Vector, magnitude: Vector, token: Token, *, now: int, num_offsets: int, theta: float
) -> float:
    """Expected logit of one key, averaged over the distances, from the centre of the queries.

    Args:
        centre: ``[D]``, the mean query before RoPE; channel ``i`` is paired with ``i + D / 2``.
        magnitude: ``[D]``, the mean length of each pair, the same for both channels.
        token: The key, after RoPE.
        now: Position of the incoming token.
        num_offsets: How many distances 1, 2, 4, ...
        theta: Base of the frequencies.
    """
    total = 0.0
    for pair, omega in enumerate(frequencies(len(centre), theta)):
        other = pair + len(centre) // 2
        key = complex(token.key[pair], token.key[other])
        key *= complex(math.cos(omega * token.position), -math.sin(omega * token.position))
        query = complex(centre[pair], centre[other])
        phase = cmath.phase(query * key.conjugate())
        for offset in (2**power for power in range(num_offsets)):
            angle = omega * (now - token.position + offset) + phase
            total += abs(query) * abs(key) * math.cos(angle) / num_offsets
        total += (magnitude[pair] - abs(query)) * abs(key)
    return total


def expected_attention(
    view: View,
    *,
    n_future: int = 512,
    n_sinks: int = 4,
    use_covariance: bool = True,
    use_vnorm: bool = True,
    epsilon: float = 0.0,
    theta: float = 10_000.0,
    statistics: Callable[[int, int, int], tuple[Vector, Vector]] | None = None,
) -> list[float]:
    """Attention that normally distributed queries of the next positions pay, times the value.

    Expected Attention (https://arxiv.org/abs/2510.00636).

    Args:
        statistics: Mean ``[D]`` and covariance ``[D, D]`` of the queries before RoPE, given a
            layer, a key/value head and a query head of its group; None: those of the prompt after
            its first ``n_sinks`` tokens, zeros where there are none.
    """
    dim, heads = len(view.held[0].key), len(view.queries[0])
    rotation = mean_rotation(view.incoming, n_future, dim, theta)
    counted = [token for token in view.held if token.position >= n_sinks]
    attention = dict.fromkeys((token.position for token in view.held), 0.0)
    for head in range(heads):
        if statistics is None:
            # Before RoPE: every query turned by minus its position.
            queries = [
                mean_rotation(-position, 1, dim, theta) @ view.queries[position][head]
                for position in range(max(n_sinks, view.prompt_start), view.prompt_length)
            ]
            centre, covariance = moments(queries, dim)
        else:
            centre, covariance = statistics(view.layer, view.head, head)
        centre = rotation @ centre
        covariance = rotation @ covariance @ rotation.T
        logits = []
        for token in counted:
            logit = float(centre @ token.key) / math.sqrt(dim)
            if use_covariance:
                logit += float(token.key @ covariance @ token.key) / (2 * dim)
            logits.append(logit)
        for token, weight in zip(counted, softmax(logits), strict=True):
            attention[token.position] += weight / heads
    scores = []
    for token in view.held:
        score = attention[token.position] + epsilon
        score *= float(np.linalg.norm(token.value)) if use_vnorm else 1.0
        scores.append(score if token.position >= n_sinks else math.inf)
    return scores


def moments(vectors: Sequence[Vector], dim: int) -> tuple[Vector, Vector]:
    """Mean ``[D]`` and covariance ``[D, D]``, the mean of products of deviations; zeros of none."""
    if not vectors:
        return np.zeros(dim), np.zeros((dim, dim))
    centre = sum(vectors, np.zeros(dim)) / len(vectors)
    products = [np.outer(vector - centre, vector - centre) for vector in vectors]
    return centre, sum(products, np.zeros((dim, dim))) / len(vectors)


@cache
def mean_rotation(first: int, count: int, dim: int, theta: float) -> Vector:
    """The mean ``[D, D]`` of the rotations to ``count`` positions from ``first`` on."""
    total = np.zeros((dim, dim))
    for pair, omega in enumerate(frequencies(dim, theta)):
        other = pair + dim // 2
        angles = omega * np.arange(first, first + count)
        cos, sin = float(np.cos(angles).mean()), float(np.sin(angles).mean())
        total[pair, pair] = total[other, other] = cos
        total[pair, other], total[other, pair] = -sin, sin
    return total


def frequencies(dim: int, theta: float) -> list[float]:
    """Radians per token of each pair of channels, in float32 as transformers has them."""
    return (1 / theta ** (torch.arange(0, dim, 2).float() / dim)).tolist()


def made_up(policy: str, layer: int, head: int, groups: int, dim: int) -> dict[str, Vector]:
    """Statistics of one key/value head for models that nobody calibrated."""
    generator = np.random.default_rng([layer, head, groups, dim])
    if policy == "qfilter":
        return {"filters": generator.normal(size=dim)}
    centre = generator.normal(size=(groups, dim))
    if policy == "triattention":
        first, second = np.split(centre, 2, axis=1)
        length = np.hypot(first, second) + generator.uniform(size=first.shape)
        return {"mean": centre, "magnitude": np.concatenate([length, length], axis=1)}
    return {"gates": generator.uniform(size=())}
