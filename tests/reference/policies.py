"""The scores of every policy, token by token, from everything a key/value head has seen.

Nothing is incremental here. Each score is recomputed from the whole history (all queries, all rows
of attention), so that a mistake in a running state of the library cannot be repeated.
"""

import cmath
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Row = dict[int, float]
"""Attention of one query: position of a token -> probability."""


class Token(NamedTuple):
    """A token in the cache: its position in the text, its key after RoPE and its value, ``[D]``."""

    position: int
    key: Vector
    value: Vector


@dataclass(frozen=True)
class View:
    """What one key/value head knows before the token at position ``len(queries)`` comes in.

    Attributes:
        layer: Index of the layer.
        head: Index of the key/value head in the layer.
        held: Tokens in the cache, in the order of their positions.
        queries: ``queries[t]`` is ``[G, D]``, the queries of position ``t`` which share this head,
            after RoPE.
        group_rows: ``group_rows[t][g]`` is the row of attention of query head ``g`` of the group
            which shares this head.
        layer_rows: ``layer_rows[t][q]`` is the same for all ``H * G`` query heads of the layer.
        prompt_length: Tokens of the prompt.
    """

    layer: int
    head: int
    held: Sequence[Token]
    queries: Sequence[Vector]
    group_rows: Sequence[Sequence[Row]]
    layer_rows: Sequence[Sequence[Row]]
    prompt_length: int = 0

    @property
    def incoming(self) -> int:
        """Position of the token that comes in next; at prefill the length of the prompt."""
        return len(self.queries)


Score = Callable[[View], list[float]]
"""One number for every token of ``View.held``, in that order. Larger is kept longer."""


@dataclass(frozen=True)
class Rules:
    """How many tokens a head keeps, when it ranks them, and which it never gives up."""

    budget: int
    interval: int = 1
    sinks: int = 0
    recent: int = 0
    protect_prompt: bool = False

    def protects(self, position: int, *, incoming: int, prompt_length: int) -> bool:
        """Whether a token is safe at a ranking made before the token ``incoming`` is stored."""
        return position >= incoming - self.recent or self.protects_for_good(
            position, prompt_length=prompt_length
        )

    def protects_for_good(self, position: int, *, prompt_length: int) -> bool:
        """Whether a token can never become unsafe."""
        return position < self.sinks or (self.protect_prompt and position < prompt_length)


class Ranking(NamedTuple):
    """Tokens which may be evicted, worst first, and the scores they were sorted by."""

    positions: list[int]
    scores: list[float]


def rank(view: View, score: Score, rules: Rules, *, prompt_length: int) -> Ranking:
    """Sort the evictable tokens of one head: lowest score first, of equals the older first."""
    candidates = [
        (value, token.position)
        for token, value in zip(view.held, score(view), strict=True)
        if not rules.protects(token.position, incoming=view.incoming, prompt_length=prompt_length)
        and value != math.inf
    ]
    candidates.sort()
    return Ranking([position for _, position in candidates], [value for value, _ in candidates])


def softmax(logits: Sequence[float]) -> list[float]:
    """Exponentials divided by their sum; an empty list stays empty."""
    if not logits:
        return []
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def attention_row(query: Vector, tokens: Sequence[Token]) -> Row:
    """Scaled dot-product attention of one query ``[D]`` over ``tokens``."""
    scale = 1 / math.sqrt(len(query))
    weights = softmax([float(query @ token.key) * scale for token in tokens])
    return {token.position: weight for token, weight in zip(tokens, weights, strict=True)}


def neighbours(values: Sequence[float], index: int, kernel_size: int) -> Sequence[float]:
    """The up to ``kernel_size`` entries around ``index``; fewer at the ends of the list."""
    reach = kernel_size // 2
    return values[max(0, index - reach) : index + reach + 1]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return math.fsum(values) / len(values)


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


def h2o(view: View) -> list[float]:
    """Attention a token has received from all queries so far: its own, and all later ones.

    H2O (https://arxiv.org/abs/2306.14048). Query heads that share a key are averaged, the authors'
    models had none.
    """
    return [
        math.fsum(mean([row.get(token.position, 0.0) for row in rows]) for rows in view.group_rows)
        for token in view.held
    ]


def tova(view: View) -> list[float]:
    """Attention of the last query, averaged over all query heads of the layer.

    TOVA (https://arxiv.org/abs/2401.06104): one decision for all heads.
    """
    return [mean([row[token.position] for row in view.layer_rows[-1]]) for token in view.held]


def snapkv(view: View, *, window: int = 32, kernel_size: int = 5) -> list[float]:
    """Attention of the last ``window`` queries, smoothed over neighbouring tokens.

    SnapKV (https://arxiv.org/abs/2404.14469). Query heads that share a key are averaged, queries of
    the window vote for the tokens of the window too, and every ranking repeats it in decode.
    """
    first = max(0, view.incoming - window)
    num_queries = view.incoming - first
    totals = [0.0 for _ in view.held]
    heads = range(len(view.queries[-1]))
    for head in heads:
        votes = [0.0 for _ in view.held]
        for position in range(first, view.incoming):
            visible = [token for token in view.held if token.position <= position]
            row = attention_row(view.queries[position][head], visible)
            for index, token in enumerate(view.held):
                votes[index] += row.get(token.position, 0.0) / num_queries
        for index in range(len(votes)):
            totals[index] += mean(neighbours(votes, index, kernel_size))
    return [total / len(heads) for total in totals]


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
    prefix = [token for token in view.held if token.position < view.incoming - window]
    importance = rkv_importance(prefix, view.queries[-window:], kernel_size=kernel_size)
    redundancy = rkv_redundancy(view.held, similarity_threshold=similarity_threshold)
    return [
        mix_lambda * importance[index] - (1 - mix_lambda) * redundancy[index]
        if index < len(prefix)
        else math.inf
        for index in range(len(view.held))
    ]


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
) -> list[float]:
    """Attention that normally distributed queries of the next positions pay, times the value.

    Expected Attention (https://arxiv.org/abs/2510.00636), with given mean and covariance.
    """
    dim, heads = len(view.held[0].key), len(view.queries[0])
    statistics = made_up("expected_attention", view.layer, view.head, heads, dim)
    rotation = mean_rotation(view.incoming, n_future, dim, theta)
    counted = [token for token in view.held if token.position >= n_sinks]
    attention = dict.fromkeys((token.position for token in view.held), 0.0)
    for head in range(heads):
        centre = rotation @ statistics["mean"][head]
        covariance = rotation @ statistics["covariance"][head] @ rotation.T
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
    if policy == "duo_attention":
        return {"gates": generator.uniform(size=())}
    factor = generator.normal(size=(groups, dim, dim)) / math.sqrt(dim)
    return {"mean": centre, "covariance": factor @ factor.transpose(0, 2, 1)}


POLICIES: dict[str, Callable[..., list[float]]] = {
    "expected_attention": expected_attention,
    "full": full,
    "h2o": h2o,
    "keydiff": keydiff,
    "knorm": knorm,
    "qfilter": qfilter,
    "rkv": rkv,
    "snapkv": snapkv,
    "streaming_llm": streaming_llm,
    "tova": tova,
    "triattention": triattention,
}
