"""Scores that no attention goes into: recency, and what keys and values are like."""

from itertools import pairwise

import numpy as np

from tests.reference.policies.view import View, softmax


def full(view: View) -> list[float]:
    """No preference: used with a budget that is never reached."""
    return [0.0 for _ in view.held]


def streaming_llm(view: View) -> list[float]:
    """Recency; the attention sinks are ``Rules.sinks``.

    StreamingLLM, section 3.2 (https://arxiv.org/abs/2309.17453), but the kept keys stay rotated to
    their positions in the text.
    """
    return [float(token.position) for token in view.held]


def knorm(view: View) -> list[float]:
    """Minus the length of the key: long keys receive little attention.

    "A simple and effective L2 norm-based strategy" (https://arxiv.org/abs/2406.11430).
    """
    return [-float(np.linalg.norm(token.key)) for token in view.held]


def keydiff(view: View) -> list[float]:
    """Minus the cosine between a key and the mean direction of all keys held.

    KeyDiff (https://arxiv.org/abs/2504.15364).
    """
    directions = [token.key / np.linalg.norm(token.key) for token in view.held]
    anchor = sum(directions, np.zeros_like(directions[0])) / len(directions)
    length = float(np.linalg.norm(anchor))
    return [-float(direction @ anchor) / length for direction in directions]


def lagkv(
    view: View, *, lag: int = 32, num_sinks: int = 4, cross_scoring: bool = False
) -> list[float]:
    """Spread of a token's channels on the scale of the block of ``lag`` tokens after its own.

    LagKV (https://arxiv.org/abs/2504.04704). The last full block, what follows it and the sinks
    are above all others, the newer the better.
    """
    scores = [2.0 + token.position for token in view.held]
    indices = [i for i, token in enumerate(view.held) if token.position >= num_sinks]
    blocks = [indices[i : i + lag] for i in range(0, len(indices) - lag + 1, lag)]
    for block, following in pairwise(blocks):
        shares = [0.0 for _ in block]
        for kind in ("key", "value"):
            reference = np.stack([getattr(view.held[i], kind) for i in following])
            low, high = reference.min(axis=0), reference.max(axis=0)
            spreads = [
                float(np.std((getattr(view.held[i], kind) - low) / (high - low), ddof=1))
                for i in block
            ]
            for i, share in enumerate(softmax(spreads)):
                shares[i] += share / 2
        for i, index in enumerate(block):
            lower = sum(share < shares[i] for share in shares)
            scores[index] = shares[i] if cross_scoring else lower / lag
    return scores
