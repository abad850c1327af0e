"""Scores by gates over hidden states."""

import math
from typing import NamedTuple

import numpy as np

from tests.reference.policies.view import Vector, View

INNER = 7


class Gate(NamedTuple):
    """What rates tokens for one key/value head: a linear layer, or an MLP where there is ``inner``,
    which all heads of the layer have in common."""

    weight: Vector
    bias: Vector
    inner: tuple[Vector, Vector] | None


def learned_gate(view: View, *, decay: bool = False, activation: str = "gelu") -> list[float]:
    """What the gate makes of what the attention module was given for the token.

    KVzap, section 3 (https://arxiv.org/abs/2601.07891); with ``decay`` the logarithm of
    ``beta ** (t - i)`` with ``beta`` the sigmoid of it, TRIM-KV (https://arxiv.org/abs/2512.03324).
    """
    gate = made_up_gate(view.layer, view.head, len(view.hidden[0]))
    scores = []
    for token in view.held:
        signal = view.hidden[token.position]
        if gate.inner is not None:
            weight, bias = gate.inner
            signal = np.array([activate(x, activation) for x in (weight @ signal + bias).tolist()])
        rating = float(gate.weight @ signal + gate.bias)
        if decay:
            rating = (view.incoming - token.position) * -math.log1p(math.exp(-rating))
        scores.append(rating)
    return scores


def activate(x: float, activation: str) -> float:
    """The function between the layers of an MLP."""
    if activation == "gelu":
        return x * (1 + math.erf(x / math.sqrt(2))) / 2
    return x / (1 + math.exp(-x)) if activation == "silu" else max(x, 0.0)


def made_up_gate(layer: int, head: int, width: int) -> Gate:
    """A gate that nobody trained, in odd layers an MLP."""
    own = np.random.default_rng([1, layer, head, width])
    if layer % 2 == 0:
        return Gate(own.normal(size=width) / math.sqrt(width), own.normal(size=()), None)
    shared = np.random.default_rng([2, layer, width])
    inner = shared.normal(size=(INNER, width)) / math.sqrt(width), shared.normal(size=INNER)
    return Gate(own.normal(size=INNER), own.normal(size=()), inner)
