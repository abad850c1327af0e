"""What one key/value head has seen, which of it is kept, and what scores are made with.

Nothing is incremental here. Each score is recomputed from the whole history (all queries, all rows
of attention), so that a mistake in a running state of the library cannot be repeated.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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
        prompt_start: Where a block of it begins that is ranked on its own.
        block_of: Of such a block the number of tokens of the whole prompt.
        memory: What a policy wrote down about a position when it last ranked this head.
        projections: ``[hidden, D]`` for each query head of the group: its part of the matrix that
            attention ends with.
        hidden: ``hidden[t]`` is what the attention module was given at position ``t``.
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
    hidden: Sequence[Vector] = ()
    layer_views: Sequence["View"] = ()
    prompt_start: int = 0
    block_of: int | None = None

    @property
    def incoming(self) -> int:
        """Position of the token that comes in next; at prefill the length of the prompt."""
        return len(self.queries)

    @property
    def text_end(self) -> int:
        """The same of the whole text, where this is a block of the prompt."""
        return self.incoming if self.block_of is None else self.block_of


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

    def of_head(self, layer: int, head: int) -> "Rules":
        """Those of one head; of another kind of rules others."""
        return self

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
