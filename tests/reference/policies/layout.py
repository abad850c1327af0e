"""Modifiers of how tokens are held and attended, not of their scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.reference.policies.view import Score, Vector, View, mean


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
    """The scores of another policy, which sees keys and queries without the pruned channels, of a
    prompt with all."""
    return base(view, **options)


def least_channels(
    keys: Sequence[Vector], queries: Sequence[Vector], *, channel_ratio: float
) -> list[int]:
    """Channels in which ``queries``, each ``[G, D]``, and ``keys``, each ``[D]``, are smallest.

    ThinK, section 3.2 (https://arxiv.org/abs/2407.21018), but one choice for a group. Keys are
    those that the other policy keeps, as in the authors' code.
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
