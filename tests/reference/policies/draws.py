"""Scores with chance in them, the same whenever they are asked the same."""

import math

import numpy as np

from tests.reference.policies.view import Vector, View, attention_row, neighbours


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


def uniform(hashed: int) -> float:
    """Between 0 and 1: the middle of the ``2**23`` equal parts of which the hash names one."""
    return (hashed // 2**9 + 0.5) / 2**23


def gauss(*numbers: int) -> float:
    """A number of the standard normal distribution, drawn by the hashes of two sequences.

    Box and Muller: the sequence that ends with ``2 * n`` gives the length and the one that ends
    with ``2 * n + 1`` the angle, ``n`` the last of ``numbers``.
    """
    *drawn, last = numbers
    length, angle = (uniform(hash_of(*drawn, 2 * last + part)) for part in (0, 1))
    return math.sqrt(-2 * math.log(length)) * math.cos(2 * math.pi * angle)


def random(view: View, *, seed: int = 0, redraw: bool = True) -> list[float]:
    """As good as chance, but the same whenever it is asked the same.

    With ``redraw`` the position of the incoming token counts, so every ranking is another draw.
    Tokens are told apart by 24 of the 32 bits.
    """
    drawn = (seed, view.layer, view.head, *[view.incoming] * redraw)
    return [float(hash_of(*drawn, token.position) // 2**8) for token in view.held]


def vase(
    view: View,
    *,
    window: int = 64,
    large_share: float = 0.25,
    kernel_size: int = 5,
    seed: int = 0,
) -> list[float]:
    """The largest value ranges, then a draw by attention (https://arxiv.org/abs/2606.03928).

    The draw without replacement is that of the largest sums of log-probability and Gumbel noise.
    Attention is a softmax over all that is not recent, whether it can be evicted or not, and is
    pooled among the same, with zeros beyond the ends. The first four tokens have a range of
    infinity where they are sinks; other tokens that never go have none.
    """
    before = [t for t in view.held if t.position < view.text_end - view.rules.recent]
    votes = {token.position: 0.0 for token in view.held}
    window_queries = list(enumerate(view.queries))[-window:]
    for position, group in window_queries:
        for query in group:
            row = attention_row(query, [token for token in before if token.position <= position])
            for key, weight in row.items():
                votes[key] += weight / len(group) / len(window_queries)
    raw = [votes[token.position] for token in before]
    for index, token in enumerate(before):
        votes[token.position] = math.fsum(neighbours(raw, index, kernel_size)) / kernel_size
    free = [
        token
        for token in before
        if not view.rules.protects_for_good(token.position, prompt_length=view.prompt_length)
    ]
    free.sort(key=lambda token: (token.value.max() - token.value.min(), token.position))
    may_go = {token.position for token in free}
    num_sinks = sum(token.position < 4 and token.position not in may_go for token in before)
    num_large = int(large_share * view.rules.slots(view.layer, view.head)) - num_sinks
    num_large = min(max(0, num_large), len(free))
    large = {token.position: token.value for token in free[len(free) - num_large :]}
    scores = []
    for position, vote in votes.items():
        noise = uniform(hash_of(seed, view.layer, view.head, view.incoming, position))
        drawn = math.log(max(vote, float(np.finfo(np.float32).tiny))) - math.log(-math.log(noise))
        if position in large:
            # More than any logarithm, the smallest range first where even these are too many.
            drawn = 1e9 * (1 + float(np.ptp(large[position])))
        scores.append(drawn)
    return scores


def curdkv(
    view: View, *, rank: int = 20, local_window: int = 16, num_sinks: int = 4, seed: int = 0
) -> list[float]:
    """Squared length as a share of that of the neighbours, of the key times of the value.

    CurDKV (https://arxiv.org/abs/2509.15038). One Gaussian matrix ``[D, rank]`` for each layer.
    """
    dim = len(view.held[0].key)
    projection = np.eye(dim)
    if rank:
        entries = [gauss(seed, view.layer, number) for number in range(dim * rank)]
        projection = np.array(entries).reshape(dim, rank) / math.sqrt(rank)
    product = [1.0 for _ in view.held]
    for vectors in ([t.key for t in view.held], [t.value for t in view.held]):
        sizes = [float(np.linalg.norm(vector @ projection)) ** 2 for vector in vectors]
        length = local_window or len(sizes)
        for index, size in enumerate(sizes):
            first = index - index % length
            product[index] *= size / math.fsum(sizes[first : first + length])
    total = math.fsum(product)
    return [
        1.0 if token.position < num_sinks else score / total
        for token, score in zip(view.held, product, strict=True)
    ]


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
