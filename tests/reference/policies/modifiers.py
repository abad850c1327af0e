"""Modifiers of the scores of another policy, and of what is left of the evicted tokens."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from tests.reference.policies.view import Row, Score, Token, Vector, View, mean


def caote(view: View, base: Callable[..., list[float]], **options: Any) -> list[float]:
    """Change of the output of attention when a token goes and the others share its weight.

    CAOTE (https://arxiv.org/abs/2504.14051), found by leaving the token out and comparing.
    """
    attention = base(view, **options)
    always = {index for index, weight in enumerate(attention) if weight == math.inf}
    attention = [0.0 if index in always else weight for index, weight in enumerate(attention)]
    total = math.fsum(attention)
    weights = [weight / total for weight in attention]
    output = sum(w * token.value for w, token in zip(weights, view.held, strict=True))
    changes = []
    for left_out in range(len(weights)):
        if left_out in always:
            changes.append(math.inf)
            continue
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
            prompt_start=start,
            block_of=view.incoming,
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
    slots: int | None = None,
    safe_slots: int = 0,
    **options: Any,
) -> list[float]:
    """Half of the budget to the best tokens, the rest weighted by the reach of the value.

    CriticalKV, algorithm 1 (https://arxiv.org/abs/2502.03805).

    Args:
        slots: of this head; None: what the rules say.
        safe_slots: so many of them are given by the scores alone at least.
    """
    scores = base(view, **options)
    total = math.fsum(score for score in scores if score != math.inf)
    weighted = []
    for token, score in zip(view.held, scores, strict=True):
        norms = [float(np.abs(matrix @ token.value).sum()) for matrix in view.projections]
        weighted.append((score / total + score_offset) * mean(norms))
    safe = [
        view.rules.protects(
            token.position, incoming=view.text_end, prompt_length=view.prompt_length
        )
        for token in view.held
    ]
    order = sorted(range(len(scores)), key=lambda i: (safe[i], scores[i], view.held[i].position))
    slots = view.rules.slots(view.layer, view.head) if slots is None else slots
    count = max(int(slots * first_stage_ratio), safe_slots)
    best = set(order[len(order) - count :])
    ceiling = max((weight for weight in weighted if weight != math.inf), default=0.0)
    # The best of them stays longest.
    return [
        weight if weight == math.inf or i not in best else 2 * ceiling + scores[i] / total
        for i, weight in enumerate(weighted)
    ]


def without_criticalkv(score: Score) -> Score:
    """The scores that CriticalKV changes, where it does."""
    if not (isinstance(score, partial) and score.func is criticalkv):
        return score
    own = {"base", "first_stage_ratio", "score_offset"}
    rest = {name: value for name, value in score.keywords.items() if name not in own}
    return partial(score.keywords["base"], **rest)


def critical_adakv(
    scores: Sequence[Sequence[float]],
    norms: Sequence[Sequence[float]],
    *,
    budget: int,
    floor: int,
    first_stage_ratio: float = 0.5,
    score_offset: float = 1e-4,
) -> list[list[int]]:
    """Which tokens of a prompt each head keeps, ascending.

    CriticalAdaKV of kvpress (https://github.com/NVIDIA/kvpress): the scores alone say how many
    tokens each head keeps, of which its best ones are safe; then each head has two stages.

    Args:
        scores: of each token of each head.
        norms: the reach of their values.
        budget: slots of a head on average.
        floor: slots that each head has at least.
    """
    heads = [
        sorted(range(len(own)), key=lambda token, own=own: own[token], reverse=True)
        for own in scores
    ]
    entries = [
        (place >= floor, -scores[head][token], head)
        for head, order in enumerate(heads)
        for place, token in enumerate(order)
    ]
    winners = [head for _, _, head in sorted(entries)[: budget * len(heads)]]
    kept = []
    for head, order in enumerate(heads):
        count = winners.count(head)
        first = order[: max(int(count * first_stage_ratio), floor)]
        rest = sorted(
            order[len(first) :],
            key=lambda token, head=head: (scores[head][token] + score_offset) * norms[head][token],
            reverse=True,
        )
        kept.append(sorted(first + rest[: count - len(first)]))
    return kept


def merging(
    view: View,
    base: Callable[..., list[float]],
    *,
    merge_threshold: float = 0.0,
    merge_fraction: float = 1.0,
    **options: Any,
) -> list[float]:
    """Scores as ever: see :func:`merge` for what happens to the victims."""
    return base(view, **options)


def merge(score: Score, kept: Sequence[Token], evicted: Sequence[Token]) -> list[Token]:
    """The kept tokens with what ``score`` makes of the values of the evicted ones.

    kvpress (https://github.com/NVIDIA/kvpress), "merging".
    """
    if not (isinstance(score, partial) and score.func is merging and kept):
        return list(kept)
    threshold = score.keywords.get("merge_threshold", 0.0)
    fraction = score.keywords.get("merge_fraction", 1.0)
    shares: dict[int, list[tuple[float, Vector]]] = {}
    nearest: list[tuple[float, int, Token]] = []
    for token in evicted:
        cosines = [
            float(token.key @ other.key / np.linalg.norm(token.key) / np.linalg.norm(other.key))
            for other in kept
        ]
        target = int(np.argmax(cosines))
        nearest.append((cosines[target], target, token))
    # The quantile of kvpress, which is in between where it is not the cosine of a token.
    least = np.quantile([entry[0] for entry in nearest], 1 - fraction) if nearest else 0.0
    for cosine, target, token in nearest:
        if cosine > threshold and cosine >= least:
            length = float(np.linalg.norm(token.value))
            other = float(np.linalg.norm(kept[target].value))
            shares.setdefault(target, []).append((cosine * length / (length + other), token.value))
    merged = list(kept)
    for target, parts in shares.items():
        total = sum((weight * value for weight, value in parts), kept[target].value)
        value = total / (1 + math.fsum(weight for weight, _ in parts))
        merged[target] = kept[target]._replace(value=value)
    return merged
