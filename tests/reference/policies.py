"""The scores of every policy, token by token, from everything a key/value head has seen.

Nothing is incremental here. Each score is recomputed from the whole history (all queries, all rows
of attention), so that a mistake in a running state of the library cannot be repeated.
"""

import cmath
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

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
        rules: What is kept whatever its score, and the budget.
        prompt_length: Tokens of the prompt.
        memory: What a policy wrote down about a position when it last ranked this head.
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
    memory: dict[int, float] = field(default_factory=dict)
    projections: Sequence[Vector] = ()
    layer_views: Sequence["View"] = ()

    @property
    def incoming(self) -> int:
        """Position of the token that comes in next; at prefill the length of the prompt."""
        return len(self.queries)


Score = Callable[[View], list[float]]
"""One number for every token of ``View.held``, in that order. Larger is kept longer.

While decoding, minus infinity frees the place at once.
"""


@dataclass(frozen=True)
class Rules:
    """How many tokens a head keeps, when it ranks them, and which it never gives up."""

    budget: int | tuple[int, ...] | tuple[tuple[int, ...], ...]
    """Of every head, of every head of each layer, or of each head of each layer."""
    interval: int = 1
    sinks: int = 0
    recent: int = 0
    protect_prompt: bool = False

    def slots(self, layer: int, head: int) -> int:
        """How many tokens one head keeps."""
        if isinstance(self.budget, int):
            return self.budget
        share = self.budget[layer]
        return share if isinstance(share, int) else share[head]

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


def observed_attention(view: View) -> list[float]:
    """What a token has received from each query that could see it, on average.

    kvpress (https://github.com/NVIDIA/kvpress), "observed attention": row ``t`` counts for the
    tokens up to position ``t``, so the divisor shrinks towards the end of the text.
    """
    return [
        mean(
            [
                mean([row[token.position] for row in rows])
                for rows in view.group_rows[token.position :]
            ]
        )
        for token in view.held
    ]


def hash32(number: int) -> int:
    """A bijection of 32-bit integers without visible order.

    Two rounds of xor-shift and odd factor, shifts 16, 15, 16, factors 0x7feb352d and 0x6c8e9cf5.
    """
    number %= 2**32
    number = (number ^ number // 2**16) * 0x7FEB352D % 2**32
    number = (number ^ number // 2**15) * 0x6C8E9CF5 % 2**32
    return number ^ number // 2**16


def hash_of(*numbers: int) -> int:
    """One 32-bit integer for a sequence: each number is added to the hash of those before it."""
    hashed = 0
    for number in numbers:
        hashed = hash32(hashed + number)
    return hashed


def random(view: View, *, seed: int = 0, redraw: bool = True) -> list[float]:
    """As good as chance, but the same whenever it is asked the same.

    With ``redraw`` the position of the incoming token counts, so every ranking is another draw.
    Tokens are told apart by 24 of the 32 bits.
    """
    drawn = (seed, view.layer, view.head, *[view.incoming] * redraw)
    return [float(hash_of(*drawn, token.position) // 2**8) for token in view.held]


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
    redundancy = rkv_redundancy(view.held, similarity_threshold=similarity_threshold)
    return rkv_joint(
        view, redundancy, window=window, kernel_size=kernel_size, mix_lambda=mix_lambda
    )


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


def gauss(*numbers: int) -> float:
    """A number of the standard normal distribution, drawn by the hashes of two sequences.

    Box and Muller: the sequence that ends with ``2 * n`` gives the length and the one that ends
    with ``2 * n + 1`` the angle, ``n`` the last of ``numbers``.
    """
    *drawn, last = numbers
    length, angle = (uniform(hash_of(*drawn, 2 * last + part)) for part in (0, 1))
    return math.sqrt(-2 * math.log(length)) * math.cos(2 * math.pi * angle)


def uniform(hashed: int) -> float:
    """Between 0 and 1: the middle of the ``2**23`` equal parts of which the hash names one."""
    return (hashed // 2**9 + 0.5) / 2**23


def vase(view: View, *, window: int = 64, large_share: float = 0.25, seed: int = 0) -> list[float]:
    """The largest value ranges, then a draw by attention (https://arxiv.org/abs/2606.03928).

    The draw without replacement is that of the largest sums of log-probability and Gumbel noise.
    Attention is a softmax over all that is not recent, whether it can be evicted or not.
    """
    before = [t for t in view.held if t.position < view.incoming - view.rules.recent]
    votes = {token.position: 0.0 for token in view.held}
    window_queries = list(enumerate(view.queries))[-window:]
    for position, group in window_queries:
        for query in group:
            row = attention_row(query, [token for token in before if token.position <= position])
            for key, weight in row.items():
                votes[key] += weight / len(group) / len(window_queries)
    free = [
        token
        for token in before
        if not view.rules.protects_for_good(token.position, prompt_length=view.prompt_length)
    ]
    free.sort(key=lambda token: (token.value.max() - token.value.min(), token.position))
    num_large = int(large_share * (view.rules.slots(view.layer, view.head) - view.rules.recent))
    large = {token.position: token.value for token in free[len(free) - min(num_large, len(free)) :]}
    scores = []
    for position, vote in votes.items():
        noise = uniform(hash_of(seed, view.layer, view.head, view.incoming, position))
        drawn = math.log(max(vote, float(np.finfo(np.float32).tiny))) - math.log(-math.log(noise))
        if position in large:
            # More than any logarithm, the smallest range first where even these are too many.
            drawn = 1e9 * (1 + float(np.ptp(large[position])))
        scores.append(drawn)
    return scores


def vase_dkv(view: View, *, rank: int = 20, seed: int = 0) -> list[float]:
    """Squared lengths of key and value in a random subspace, multiplied.

    VaSE without attention (https://arxiv.org/abs/2606.03928). All heads of a layer share the
    Gaussian matrix ``[D, rank]``, whose entry ``(d, r)`` is number ``d * rank + r``.
    """
    dim = max(len(view.held[0].key), len(view.held[0].value))
    projection = np.array(
        [
            [
                gauss(seed, view.layer, view.incoming, d * rank + column) / math.sqrt(rank)
                for column in range(rank)
            ]
            for d in range(dim)
        ]
    )

    def size(vector: Vector) -> float:
        projected = vector @ projection[: len(vector)]
        return float(projected @ projected)

    return [size(token.key) * size(token.value) for token in view.held]


def raas(view: View, *, share: float = 0.5) -> list[float]:
    """When a token was last among the most attended, at the earliest when it came in.

    RaaS (https://arxiv.org/abs/2502.11147): of a row, averaged over the group, the top ``share`` of
    the tokens that its query could see, rounded up, is important.
    """
    stamps = {token.position: token.position for token in view.held}
    for position, rows in enumerate(view.group_rows):
        weights = {key: mean([row[key] for row in rows]) for key in rows[0]}
        least = sorted(weights.values(), reverse=True)[math.ceil(share * len(weights)) - 1]
        for key, weight in weights.items():
            if weight >= least and key in stamps:
                stamps[key] = max(stamps[key], position)
    return [float(stamp) for stamp in stamps.values()]


def morphkv(view: View, *, window: int = 3, fuse: str = "max") -> list[float]:
    """Attention of the last ``window`` queries, each normalised without what was recent to it.

    MorphKV (https://arxiv.org/abs/2503.00979). A query and the ``window`` tokens before it are
    recent to it. The logits of a group are added up, which the sum of the logarithms of its
    probabilities is as well, but for a number that is the same for all tokens.
    """
    seen: dict[int, list[float]] = {token.position: [0.0] for token in view.held}
    for position, rows in list(enumerate(view.group_rows))[-window:]:
        old = [key for key in rows[0] if key < position - window]
        weights = softmax([math.fsum(math.log(row[key]) for row in rows) for key in old])
        for key, weight in zip(old, weights, strict=True):
            seen.get(key, []).append(weight)
    return [
        math.inf
        if key >= view.incoming - 1 - window
        else {"max": max, "sum": math.fsum}[fuse](weights)
        for key, weights in seen.items()
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


def finch(view: View, *, window: int = 32, normalize_scores: bool = True) -> list[float]:
    """Attention of the last ``window`` queries, weighed by how many tokens each could see.

    FINCH (https://doi.org/10.1162/tacl_a_00716), with the group of query heads averaged.
    """
    totals = [0.0 for _ in view.held]
    first = max(0, view.incoming - window)
    for position in range(first, view.incoming):
        visible = [token for token in view.held if token.position <= position]
        weight = len(visible) if normalize_scores else 1
        rows = [attention_row(query, visible) for query in view.queries[position]]
        for index, token in enumerate(view.held):
            vote = mean([row.get(token.position, 0.0) for row in rows])
            totals[index] += weight * vote / (view.incoming - first)
    return totals


def rpc(
    view: View, *, window: int = 32, kernel_size: int = 7, compression: float = 0.0
) -> list[float]:
    """Attention of the last queries among the generated tokens before them, over all heads.

    Reasoning Path Compression (https://arxiv.org/abs/2505.13866). With ``compression`` no more of
    these tokens stay than one in so many generated ones.
    """
    last = view.incoming - window
    voted = [t.position for t in view.held if view.prompt_length <= t.position < last]
    votes = [0.0 for _ in voted]
    for rows in view.layer_rows[-window:]:
        for row in rows:
            # A softmax among some tokens is one among all, divided by what these have of it.
            total = math.fsum(row.get(position, 0.0) for position in voted)
            for index, position in enumerate(voted):
                if total:
                    votes[index] += row[position] / total / len(rows)
    smooth = [mean(neighbours(votes, index, kernel_size)) for index in range(len(votes))]
    scores = dict(zip(voted, smooth, strict=True))
    if compression:
        quota = int((view.incoming - view.prompt_length) / compression)
        best = sorted(voted, key=lambda position: (scores[position], position), reverse=True)
        scores |= dict.fromkeys(best[quota:], -math.inf)
    return [scores.get(t.position, window + 1.0 + t.position) for t in view.held]


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
    this is the one score that writes down something.
    """
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
        view.memory[token.position] = remembered[-1]
    redundancy = rkv_redundancy(view.held, similarity_threshold=similarity_threshold)[: len(prefix)]
    scores = [
        mix_lambda * max(neighbours(remembered, index, kernel_size))
        - (1 - mix_lambda) * redundancy[index] / max(redundancy)
        for index in range(len(prefix))
    ]
    return scores + [2.0 + token.position for token in view.held[len(prefix) :]]


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


def key_rerotation(view: View, base: Callable[..., list[float]], **options: Any) -> list[float]:
    """The scores of another policy; attention sees held tokens at the positions 0, 1, 2 and so on.

    StreamingLLM, section 3.2 (https://arxiv.org/abs/2309.17453).
    """
    return base(view, **options)


def think(
    view: View,
    base: Callable[..., list[float]],
    *,
    channel_ratio: float = 0.4,
    think_recent: int = 32,
    think_window: int = 32,
    **options: Any,
) -> list[float]:
    """The scores of another policy, which sees keys and queries without the pruned channels."""
    return base(view, **options)


def least_channels(
    keys: Sequence[Vector], queries: Sequence[Vector], *, channel_ratio: float
) -> list[int]:
    """Channels in which ``queries``, each ``[G, D]``, and ``keys``, each ``[D]``, are smallest.

    ThinK, section 3.2 (https://arxiv.org/abs/2407.21018), but one choice for a group.
    """
    energy = []
    for channel in range(len(keys[0])):
        query_energy = mean([float(query[channel] ** 2) for group in queries for query in group])
        key_energy = mean([float(key[channel] ** 2) for key in keys])
        energy.append((query_energy * key_energy, channel))
    energy.sort()
    return [channel for _, channel in energy[: int(len(energy) * channel_ratio)]]


@dataclass(frozen=True)
class Layout:
    """How tokens are held and attended, where a policy changes that.

    Attributes:
        contiguous: Attention sees the held tokens without gaps between them.
        channel_ratio: Share of the channels that keys lose once they are old.
        whole: So many of the last tokens keep all channels.
        window: So many of the last queries of the prompt choose the channels.
    """

    contiguous: bool = False
    channel_ratio: float = 0.0
    whole: int = 0
    window: int = 1


def layout_of(score: Score) -> Layout:
    """What a policy changes beside which tokens are kept."""
    asked = score.func if isinstance(score, partial) else score
    if asked is not think:
        return Layout(contiguous=asked is key_rerotation)
    given = {**(think.__kwdefaults__ or {}), **getattr(score, "keywords", {})}
    return Layout(
        channel_ratio=given["channel_ratio"],
        whole=given["think_recent"],
        window=given["think_window"],
    )


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


def chunk(
    view: View, base: Callable[..., list[float]], *, block_length: int = 1024, **options: Any
) -> list[float]:
    """The rank of a token in its block of the prompt, as a share of the block; later the base's.

    Queries of the prompt saw nothing but their own block.
    """
    rows = [
        within_block(group, at, block_length) if at < view.prompt_length else group
        for at, group in enumerate(view.group_rows)
    ]
    view = replace(view, group_rows=rows)
    if len(view.held) <= view.rules.slots(view.layer, view.head):
        return base(view, **options)
    result: list[float] = []
    for start in range(0, view.prompt_length, block_length):
        end = min(start + block_length, view.prompt_length)
        block = replace(
            view,
            held=view.held[start:end],
            queries=view.queries[:end],
            group_rows=rows[:end],
            prompt_length=end,
        )
        safe = [
            view.rules.protects(at, incoming=view.incoming, prompt_length=view.prompt_length)
            for at in range(start, end)
        ]
        worst_first = sorted(
            range(end - start), key=lambda at: (safe[at], base(block, **options)[at], at)
        )
        # A half-way point, so that the only token of a block is neither the best nor the worst.
        result += [(worst_first.index(at) + 0.5) / (end - start) - 1.0 for at in range(end - start)]
    return result


def within_block(group: Sequence[Row], at: int, block_length: int) -> list[Row]:
    """What a query attends to if it sees nothing before its block."""
    first = at // block_length * block_length
    seen = [{p: weight for p, weight in row.items() if p >= first} for row in group]
    return [{p: weight / math.fsum(row.values()) for p, weight in row.items()} for row in seen]


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
    count = int(view.rules.slots(view.layer, view.head) * first_stage_ratio)
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
    "expected_attention": expected_attention,
    "finch": finch,
    "full": full,
    "gkv": gkv,
    "h2o": h2o,
    "keydiff": keydiff,
    "knorm": knorm,
    "lagkv": lagkv,
    "morphkv": morphkv,
    "observed_attention": observed_attention,
    "qfilter": qfilter,
    "raas": raas,
    "random": random,
    "random_prompt": random,
    "rkv": rkv,
    "rkv_lsh": rkv_lsh,
    "rpc": rpc,
    "snapkv": snapkv,
    "streaming_llm": streaming_llm,
    "tova": tova,
    "triattention": triattention,
    "vase": vase,
    "vase_dkv": vase_dkv,
    "h2o+caote": partial(caote, base=h2o),
    "h2o+key_rerotation": partial(key_rerotation, base=h2o),
    "snapkv+key_rerotation": partial(key_rerotation, base=snapkv),
    "streaming_llm+key_rerotation": partial(key_rerotation, base=streaming_llm),
    "h2o+think": partial(think, base=h2o),
    "rkv+think": partial(think, base=rkv),
    "snapkv+think": partial(think, base=snapkv),
    "snapkv+caote": partial(caote, base=snapkv),
    "h2o+criticalkv": partial(criticalkv, base=h2o),
    "snapkv+criticalkv": partial(criticalkv, base=snapkv),
    "h2o+merging": partial(merging, base=h2o),
    "snapkv+merging": partial(merging, base=snapkv),
    "h2o+chunk": partial(chunk, base=h2o),
    "keydiff+chunk": partial(chunk, base=keydiff),
    "rkv+chunk": partial(chunk, base=rkv),
    "snapkv+chunk": partial(chunk, base=snapkv),
    "knorm+chunkkv": partial(chunkkv, base=knorm),
    "rkv+chunkkv": partial(chunkkv, base=rkv),
    "snapkv+chunkkv": partial(chunkkv, base=snapkv),
}
