"""Quotas for segments of the text."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from tests.reference.policies.view import View, attention_row, mean, neighbours

_LEAST = 1e-12


def ams(
    view: View,
    base: Callable[..., list[float]],
    *,
    mass_window: int = 32,
    mass_kernel_size: int = 5,
    segment_mass: float = 0.02,
    min_segment_length: int = 32,
    max_segment_length: int = 1024,
    min_keep_per_segment: int = 8,
    credit_decay: float = 0.8,
    mix_beta: float = 0.7,
    **options: Any,
) -> list[float]:
    """Places by the scores of the base, those in the quota of their segment above all others.

    AMS (https://arxiv.org/abs/2605.23200), as ``compress`` of the authors' code does it for one
    row. The average of the mass is written down where something goes, as their code returns before
    it where all fits.
    """
    scores = base(view, **options)
    heads = list(view.layer_views) or [view]
    is_prompt = any(len(one.held) > one.rules.slots(one.layer, one.head) for one in heads)
    attended = [
        attention_before_window(one, min(mass_window, kept_of(one, is_prompt)), mass_kernel_size)
        for one in heads
    ]
    largest = max((vote for votes in attended for vote in votes), default=0.0)
    kept = kept_of(view, is_prompt)
    own = attention_before_window(view, min(mass_window, kept), mass_kernel_size)
    own += [largest] * (len(view.held) - len(own))
    mass = to_mass(own)
    credit = [
        credit_decay * view.memory.get(~token.position, 0.0) + (1 - credit_decay) * share
        for token, share in zip(view.held, mass, strict=True)
    ]
    if kept < len(view.held):
        for token, share in zip(view.held, credit, strict=True):
            # Of positions that nobody else has, as the base may write something down too.
            view.memory[~token.position] = share
    mixed = to_mass(
        [
            mix_beta * now + (1 - mix_beta) * before
            for now, before in zip(mass, to_mass(credit), strict=True)
        ]
    )
    segments = cut(mixed, segment_mass, min_segment_length, max_segment_length)
    masses = [math.fsum(mixed[start:end]) for start, end in segments]
    lengths = [end - start for start, end in segments]
    chosen: set[int] = set()
    for (start, end), quota in zip(
        segments, quotas_of(masses, lengths, kept, min_keep_per_segment), strict=True
    ):
        # Of equals the newer one stays.
        best_first = sorted(range(start, end), key=lambda i: (scores[i], i), reverse=True)
        chosen.update(best_first[:quota])
    worst_first = sorted(range(len(scores)), key=lambda i: (i in chosen, scores[i], i))
    return [
        score if math.isinf(score) else float(worst_first.index(i))
        for i, score in enumerate(scores)
    ]


def kept_of(view: View, is_prompt: bool) -> int:
    """How many tokens stay of a prompt, or when as many came in as there are steps to the next
    ranking."""
    slots = view.rules.slots(view.layer, view.head)
    return slots if is_prompt else max(1, slots - view.rules.interval)


def attention_before_window(view: View, window: int, kernel_size: int) -> list[float]:
    """What the last ``window`` queries attend to of the tokens before them, smoothed."""
    first = view.incoming - window
    votes = [0.0 for token in view.held if token.position < first]
    for position in range(max(0, first), view.incoming):
        visible = [token for token in view.held if token.position <= position]
        rows = [attention_row(query, visible) for query in view.queries[position]]
        for index in range(len(votes)):
            weights = [row.get(view.held[index].position, 0.0) for row in rows]
            votes[index] += mean(weights) / window
    return [
        math.fsum(neighbours(votes, index, kernel_size)) / kernel_size
        for index in range(len(votes))
    ]


def to_mass(values: Sequence[float]) -> list[float]:
    """Parts of the sum, none of them nothing."""
    total = math.fsum(value + _LEAST for value in values)
    return [(value + _LEAST) / total for value in values]


def cut(
    mass: Sequence[float], segment_mass: float, shortest: int, longest: int
) -> list[tuple[int, int]]:
    """Where segments start and end."""
    length, places, step = len(mass), set[int](), 1
    while step * segment_mass < 1 - 1e-9:
        total, place = 0.0, 0
        while place < length:
            total += mass[place]
            if total >= step * segment_mass:
                break
            place += 1
        places.add(min(max(place, 1), length - 1))
        step += 1
    borders = [0, *sorted(places - {0}), length]
    pieces: list[tuple[int, int]] = []
    for start, end in pairwise(borders):
        while end - start > longest:
            pieces.append((start, start + longest))
            start += longest
        pieces.append((start, end))
    merged: list[tuple[int, int]] = []
    while pieces:
        start, end = pieces.pop(0)
        while end - start < shortest and pieces:
            end = pieces.pop(0)[1]
        merged.append((start, end))
    return merged


def quotas_of(masses: Sequence[float], lengths: Sequence[int], kept: int, least: int) -> list[int]:
    """How many tokens of each segment stay."""
    floors = [min(length, least) for length in lengths]
    quotas = list(floors)
    if sum(quotas) >= kept:
        while sum(quotas) > kept and max(quotas) > 1:
            for index, quota in enumerate(quotas):
                if quota > 1 and sum(quotas) > kept:
                    quotas[index] -= 1
        return quotas
    rest, total = kept - sum(quotas), math.fsum(masses) + _LEAST
    for index, (share, length) in enumerate(zip(masses, lengths, strict=True)):
        quotas[index] = min(length, quotas[index] + round(rest * (share / total)))
    while sum(quotas) > kept and any(q > f for q, f in zip(quotas, floors, strict=True)):
        for index, floor in enumerate(floors):
            if quotas[index] > floor and sum(quotas) > kept:
                quotas[index] -= 1
    while sum(quotas) < kept and sum(quotas) < sum(lengths):
        for index, length in enumerate(lengths):
            if quotas[index] < length and sum(quotas) < kept:
                quotas[index] += 1
    return quotas
