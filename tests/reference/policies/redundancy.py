"""Attention minus how much a key resembles the others."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from tests.reference.policies.view import Token, Vector, View, attention_row, neighbours, softmax


def rkv(
    view: View,
    *,
    window: int = 8,
    kernel_size: int = 7,
    mix_lambda: float = 0.1,
    similarity_threshold: float = 0.5,
) -> list[float]:
    """Importance minus redundancy; the last ``window`` positions are always kept.

    R-KV, "joint eviction" (https://arxiv.org/abs/2505.24133).
    """
    redundancy = rkv_redundancy(view.held, similarity_threshold=similarity_threshold)
    return rkv_joint(
        view, redundancy, window=window, kernel_size=kernel_size, mix_lambda=mix_lambda
    )


def rkv_importance(
    prefix: Sequence[Token], queries: Sequence[Vector], *, kernel_size: int
) -> list[float]:
    """Attention of ``queries``, each ``[G, D]``, among the tokens of ``prefix`` alone.

    R-KV, "importance scoring" (https://arxiv.org/abs/2505.24133): the strongest query head speaks
    for its group, and a token shines on its neighbours.
    """
    votes = [0.0 for _ in prefix]
    for group in queries:
        scale = 1 / math.sqrt(group.shape[1])
        logits = [max(float(query @ token.key) * scale for query in group) for token in prefix]
        for index, weight in enumerate(softmax(logits)):
            votes[index] += weight / len(queries)
    return [max(neighbours(votes, index, kernel_size)) for index in range(len(votes))]


def rkv_redundancy(held: Sequence[Token], *, similarity_threshold: float) -> list[float]:
    """How much a key resembles the others, as a softmax over ``held``.

    R-KV, "redundancy estimation" (https://arxiv.org/abs/2505.24133); the details are those of the
    authors' ``cal_similarity``: every token spares the newest other token that is similar to it,
    and one that is similar to none spares the oldest token.
    """
    directions = [token.key / (float(np.linalg.norm(token.key)) + 1e-8) for token in held]
    sums = [0.0 for _ in held]
    for i, direction in enumerate(directions):
        cosines = [
            0.0 if i == j else float(direction @ other) for j, other in enumerate(directions)
        ]
        similar = [j for j, cosine in enumerate(cosines) if cosine > similarity_threshold]
        cosines[max(similar, default=0)] = 0.0
        for j, cosine in enumerate(cosines):
            sums[j] += cosine
    return softmax([total / len(held) for total in sums])


def rkv_joint(
    view: View, redundancy: Sequence[float], *, window: int, kernel_size: int, mix_lambda: float
) -> list[float]:
    """R-KV, "joint eviction", with the redundancy of every token held."""
    prefix = [token for token in view.held if token.position < view.incoming - window]
    importance = rkv_importance(prefix, view.queries[-window:], kernel_size=kernel_size)
    return [
        mix_lambda * importance[index] - (1 - mix_lambda) * redundancy[index]
        if index < len(prefix)
        else math.inf
        for index in range(len(view.held))
    ]


def rkv_lsh(
    view: View,
    *,
    window: int = 8,
    kernel_size: int = 7,
    mix_lambda: float = 0.1,
    bits: int = 6,
    seed: int = 0,
) -> list[float]:
    """R-KV, but two keys have the cosine that the number of hyperplanes between them suggests.

    An angle is pi times the share of random hyperplanes that separate the two (Charikar 2002).
    """
    dim = len(view.held[0].key)
    # The hyperplanes are what both sides must agree on.
    drawn = torch.randn(dim, bits, generator=torch.Generator().manual_seed(seed))
    sides = [
        [float(token.key @ plane) > 0 for plane in drawn.double().numpy().T] for token in view.held
    ]
    sums: list[float] = []
    for i, own in enumerate(sides):
        cosines: list[float] = []
        for j, other in enumerate(sides):
            separating = sum(a != b for a, b in zip(own, other, strict=True))
            if i != j:
                cosines.append(math.cos(math.pi * separating / bits))
        sums.append(math.fsum(cosines))
    redundancy = softmax([total / len(view.held) for total in sums])
    return rkv_joint(
        view, redundancy, window=window, kernel_size=kernel_size, mix_lambda=mix_lambda
    )


def gkv(
    view: View,
    *,
    window: int = 16,
    kernel_size: int = 1,
    alpha: float = 0.8,
    mix_lambda: float = 0.5,
    similarity_threshold: float = 0.5,
) -> list[float]:
    """Remembered attention minus redundancy; the last ``window`` positions are above all others.

    G-KV (https://arxiv.org/abs/2512.00504). What is remembered depends on the rankings so far, so
    this is the one score that writes down something; not at a ranking after which nothing goes, as
    the authors' code returns before it scores what fits.
    """
    slots = view.rules.slots(view.layer, view.head)
    evicts = len(view.held) + view.rules.interval > slots
    prefix = [token for token in view.held if token.position < view.incoming - window]
    local = [0.0 for _ in prefix]
    queries = range(max(0, view.incoming - window), view.incoming)
    for position in queries:
        visible = [token for token in view.held if token.position <= position]
        rows = [attention_row(query, visible) for query in view.queries[position]]
        for index, token in enumerate(prefix):
            local[index] += max(row[token.position] for row in rows) / len(queries)
    remembered: list[float] = []
    for token, score in zip(prefix, local, strict=True):
        remembered.append(max(alpha * view.memory.get(token.position, 0.0), score / max(local)))
        if evicts:
            view.memory[token.position] = remembered[-1]
    redundancy = rkv_redundancy(view.held, similarity_threshold=similarity_threshold)[: len(prefix)]
    scores = [
        mix_lambda * max(neighbours(remembered, index, kernel_size))
        - (1 - mix_lambda) * redundancy[index] / max(redundancy)
        for index in range(len(prefix))
    ]
    return scores + [2.0 + token.position for token in view.held[len(prefix) :]]
