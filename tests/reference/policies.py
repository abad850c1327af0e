"""The scores of every policy, token by token, from everything a key/value head has seen.

Nothing is incremental here. Each score is recomputed from the whole history (all queries, all rows
of attention), so that a mistake in a running state of the library cannot be repeated.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
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
        rules: What is kept whatever its score, and the budget.
        prompt_length: Tokens of the prompt.
        projections: ``[hidden, D]`` for each query head of the group: its part of the matrix that
            attention ends with.
        layer_views: The same of all heads of the layer; left out there.
    """

    layer: int
    head: int
    held: Sequence[Token]
    queries: Sequence[Vector]
    group_rows: Sequence[Sequence[Row]]
    layer_rows: Sequence[Sequence[Row]]
    rules: "Rules"
    prompt_length: int
    projections: Sequence[Vector] = ()
    layer_views: Sequence["View"] = ()

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


def caote(view: View, base: Callable[..., list[float]], **options: Any) -> list[float]:
    """Change of the output of attention when a token goes and the others share its weight.

    CAOTE (https://arxiv.org/abs/2504.14051), found by leaving the token out and comparing.
    """
    attention = base(view, **options)
    total = math.fsum(attention)
    weights = [weight / total for weight in attention]
    output = sum(w * token.value for w, token in zip(weights, view.held, strict=True))
    changes = []
    for left_out in range(len(weights)):
        rest = [0.0 if j == left_out else weight for j, weight in enumerate(weights)]
        share = math.fsum(rest)
        without = sum(w / share * token.value for w, token in zip(rest, view.held, strict=True))
        changes.append(float(np.linalg.norm(without - output)))
    return changes


def chunkkv(
    view: View, base: Callable[..., list[float]], *, chunk_length: int = 10, **options: Any
) -> list[float]:
    """Mean over the chunk of a token and over all heads.

    ChunkKV (https://arxiv.org/abs/2502.00299).
    """
    heads = [base(other, **options) for other in view.layer_views]
    assert len({tuple(token.position for token in other.held) for other in view.layer_views}) == 1
    chunks: dict[int, list[float]] = {}
    always: set[int] = set()
    for token, scores in zip(view.held, zip(*heads, strict=True), strict=True):
        if math.inf in scores:
            always.add(token.position)
        else:
            chunks.setdefault(token.position // chunk_length, []).append(mean(scores))
    return [
        math.inf if token.position in always else mean(chunks[token.position // chunk_length])
        for token in view.held
    ]


def criticalkv(
    view: View,
    base: Callable[..., list[float]],
    *,
    first_stage_ratio: float = 0.5,
    score_offset: float = 1e-4,
    **options: Any,
) -> list[float]:
    """Half of the budget to the best tokens, the rest weighted by the reach of the value.

    CriticalKV, algorithm 1 (https://arxiv.org/abs/2502.03805).
    """
    scores = base(view, **options)
    weighted = []
    for token, score in zip(view.held, scores, strict=True):
        norms = [float(np.abs(matrix @ token.value).sum()) for matrix in view.projections]
        weighted.append((score / math.fsum(scores) + score_offset) * mean(norms))
    safe = [
        view.rules.protects(
            token.position, incoming=view.incoming, prompt_length=view.prompt_length
        )
        for token in view.held
    ]
    order = sorted(range(len(scores)), key=lambda i: (safe[i], scores[i], view.held[i].position))
    count = int(view.rules.budget * first_stage_ratio)
    best = set(order[len(order) - count :])
    return [2 * max(weighted) if i in best else weighted[i] for i in range(len(weighted))]


def merging(
    view: View, base: Callable[..., list[float]], *, merge_threshold: float = 0.0, **options: Any
) -> list[float]:
    """Scores as ever: see :func:`merge` for what happens to the victims."""
    return base(view, **options)


def merge(score: Score, kept: Sequence[Token], evicted: Sequence[Token]) -> list[Token]:
    """The kept tokens with what ``score`` makes of the values of the evicted ones.

    kvpress (https://github.com/NVIDIA/kvpress), "merging".
    """
    if not (isinstance(score, partial) and score.func is merging and kept):
        return list(kept)
    shares: dict[int, list[tuple[float, Vector]]] = {}
    for token in evicted:
        cosines = [
            float(token.key @ other.key / np.linalg.norm(token.key) / np.linalg.norm(other.key))
            for other in kept
        ]
        target = int(np.argmax(cosines))
        if cosines[target] > score.keywords.get("merge_threshold", 0.0):
            length = float(np.linalg.norm(token.value))
            other = float(np.linalg.norm(kept[target].value))
            weight = cosines[target] * length / (length + other)
            shares.setdefault(target, []).append((weight, token.value))
    merged = list(kept)
    for target, parts in shares.items():
        total = sum((weight * value for weight, value in parts), kept[target].value)
        value = total / (1 + math.fsum(weight for weight, _ in parts))
        merged[target] = kept[target]._replace(value=value)
    return merged


POLICIES: dict[str, Callable[..., list[float]]] = {
    "full": full,
    "h2o": h2o,
    "keydiff": keydiff,
    "knorm": knorm,
    "rkv": rkv,
    "snapkv": snapkv,
    "streaming_llm": streaming_llm,
    "tova": tova,
    "h2o+caote": partial(caote, base=h2o),
    "snapkv+caote": partial(caote, base=snapkv),
    "h2o+criticalkv": partial(criticalkv, base=h2o),
    "snapkv+criticalkv": partial(criticalkv, base=snapkv),
    "h2o+merging": partial(merging, base=h2o),
    "snapkv+merging": partial(merging, base=snapkv),
    "knorm+chunkkv": partial(chunkkv, base=knorm),
    "rkv+chunkkv": partial(chunkkv, base=rkv),
    "snapkv+chunkkv": partial(chunkkv, base=snapkv),
}
