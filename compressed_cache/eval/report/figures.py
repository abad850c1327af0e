"""Figures of accuracy, speed, memory and of what is held. Data in, matplotlib's figures out."""

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter
from matplotlib.transforms import ScaledTranslation

from compressed_cache.eval.report.rows import Row
from compressed_cache.eval.report.style import (
    EVICTED,
    HEIGHT,
    HELD,
    INK,
    LINES,
    LOST,
    MARKERS,
    MUTED,
    RC,
    SERIES,
    WIDTH,
)
from compressed_cache.eval.results.row import Agreement

MOST = len(SERIES)
"""Lines that a figure tells apart, those of :data:`BESIDE` not counted."""
FULL: dict[str, Any] = {"color": INK, "marker": "", "linestyle": "--"}
BESIDE: dict[str, dict[str, Any]] = {
    "full": FULL,
    "DynamicCache": FULL | {"marker": "."},
    "random": {"color": MUTED, "marker": "x", "linestyle": "-"},
}
"""What others are compared with, drawn the same in every figure."""
T = TypeVar("T")
_LONGEST = 40
"""Characters of a name in a legend that fit on one line."""
Series = Mapping[str, Sequence[Row]]
_colours: ContextVar[dict[str, int]] = ContextVar("colours of lines")


@dataclass(frozen=True)
class Curve:
    """A line over some quantity."""

    x: Sequence[float]
    y: Sequence[float]


@contextmanager
def same_looks() -> Iterator[None]:
    """Within, a line has the same colour and marker in every figure."""
    token = _colours.set({})
    try:
        yield
    finally:
        _colours.reset(token)


def panels(lines: Mapping[str, T]) -> list[dict[str, T]]:
    """Lines divided into as many figures as it takes to tell them apart by colour, all in order.

    Those of :data:`BESIDE` are in every one.
    """
    beside = {name: line for name, line in lines.items() if name in BESIDE}
    parts: list[dict[str, T]] = []
    count = len(lines) - len(beside)
    even = math.ceil(count / max(1, math.ceil(count / MOST)))
    seen: Counter[int] = Counter()
    for name, colour in _coloured(lines, even).items():
        if seen[colour] == len(parts):
            parts.append(dict(beside))
        parts[seen[colour]][name] = lines[name]
        seen[colour] += 1
    return parts or [beside]


@matplotlib.rc_context(RC)
def accuracy(lines: Series) -> Figure:
    """Accuracy against budget with 95% intervals; rows by the names of their lines."""
    figure, axes = _figure(lines)
    draw_accuracy(axes, lines)
    _legend(figure, axes)
    return figure


def draw_accuracy(axes: Axes, lines: Series) -> None:
    """The same into axes of another figure."""
    _against_budget(axes, lines, lambda row: row.accuracy, intervals=True)
    axes.set_ylabel("accuracy")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


@matplotlib.rc_context(RC)
def tokens(lines: Series) -> Figure:
    """Mean tokens to the answer against budget; rows by the names of their lines."""
    figure, axes = _figure(lines)
    _against_budget(axes, lines, lambda row: row.tokens, intervals=False)
    axes.set_ylabel("tokens to answer")
    axes.set_ylim(bottom=0)
    _legend(figure, axes)
    return figure


@matplotlib.rc_context(RC)
def agreement(lines: Mapping[str, Sequence[Agreement]]) -> Figure:
    """Agreement against budget with standard errors; rows that evicted something, by name."""
    figure, axes = _figure(lines)
    looks = _looks(lines)
    budgets = sorted({row.budget for rows in lines.values() for row in rows if row.budget})
    for name, rows in lines.items():
        at = [row.budget or 0 for row in rows]
        means = [row.agreement or 0.0 for row in rows]
        errors = [row.agreement_se or 0.0 for row in rows]
        axes.errorbar(at, means, errors, label=name, elinewidth=1, **looks[name])
    axes.set_xlabel("budget (slots per head)")
    axes.set_ylabel("agreement")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _scale(axes, budgets, log=bool(budgets) and budgets[-1] > 4 * budgets[0])
    _legend(figure, axes)
    return figure


@matplotlib.rc_context(RC)
def curves(
    lines: Mapping[str, Curve], *, x: str, y: str, log: str = "", dots: bool = True
) -> Figure:
    """Lines by name over one quantity.

    Args:
        lines: by name.
        x: what is to the right.
        y: what is upwards, from zero unless logarithmic.
        log: "x", "xy" or "": the logarithmic axes.
        dots: whether each value was measured at an x of its own, which then is marked.
    """
    figure, axes = _figure(lines)
    looks = _looks(lines)
    for name, line in lines.items():
        (drawn,) = axes.plot(line.x, line.y, label=name, **looks[name])
        if not dots:
            drawn.set_marker("")
    every = sorted(set(chain.from_iterable(line.x for line in lines.values())))
    _scale(axes, every if dots else [], log="x" in log)
    if "y" in log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(_short))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    _legend(figure, axes)
    return figure


@matplotlib.rc_context(RC)
def retention(share: np.ndarray, *, steps: int, positions: int, prompt: int) -> Figure:
    """What one head holds: positions to the right, steps downwards.

    Args:
        share: of the positions under each pixel, how many are held; NaN where there are none yet.
        steps: the last step.
        positions: of the text at the last step.
        prompt: how many of them are the prompt's.
    """
    figure, axes = _figure({})
    held, evicted = np.array(to_rgb(HELD)), np.array(to_rgb(EVICTED))
    there = ~np.isnan(share)
    part = np.where(there, share, 0.0)[..., None]
    colour = part * held + (1 - part) * evicted
    alpha = np.where(there[..., None], 0.3 + 0.7 * part, 0.0)
    extent = (-0.5, positions - 0.5, steps + 0.5, -0.5)
    pixels = np.concatenate([colour, alpha], axis=-1)
    axes.imshow(pixels, aspect="auto", interpolation="none", extent=extent)
    if 0 < prompt < positions:
        axes.axvline(prompt - 0.5, color=INK, linestyle=":", linewidth=1.2)
    axes.grid(False)
    axes.set_xlabel("position")
    axes.set_ylabel("decode step")
    return figure


@matplotlib.rc_context(RC)
def lost_by_layer(lost: np.ndarray, *, steps: int) -> Figure:
    """The share of attention lost by each layer (upwards) over steps (to the right).

    `lost` is ``[layers, columns]``, where several steps may share a column.
    """
    figure, axes = _figure({})
    layers = len(lost)
    image = axes.imshow(
        lost,
        aspect="auto",
        interpolation="none",
        origin="lower",
        extent=(0.5, steps + 0.5, -0.5, layers - 0.5),
        cmap=LinearSegmentedColormap.from_list("lost", [to_rgba(EVICTED, 0.15), LOST]),
        vmin=0,
    )
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1.0))
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    axes.grid(False)
    axes.set_yticks(_apart(range(layers), log=False))
    axes.set_xlabel("decode step")
    axes.set_ylabel("layer")
    return figure


def _figure(lines: Iterable[str]) -> tuple[Figure, Axes]:
    """An empty figure with room for a legend below."""
    names = list(lines)
    rows = sum(_wrapped(name).count("\n") + 1 for name in names) / _columns(names)
    legend = 20 * math.ceil(rows)
    figure = Figure(figsize=(WIDTH / 72, (HEIGHT + legend) / 72), dpi=72)
    return figure, figure.subplots()


def _against_budget(
    axes: Axes, lines: Series, value: Callable[[Row], float], *, intervals: bool
) -> None:
    looks = _looks(lines)
    budgets = sorted({row.budget for rows in lines.values() for row in rows if row.budget})
    for number, (name, rows) in enumerate(lines.items()):
        look = looks[name]
        if full := [row for row in rows if row.is_full]:
            level = _mean(map(value, full))
            axes.axhline(level, color=look["color"], linestyle=look["linestyle"], label=name)
            for row in full if intervals else ():
                axes.axhspan(row.accuracy_low, row.accuracy_high, color=MUTED, alpha=0.12, lw=0)
            continue
        # Side by side, so that intervals at the same budget do not hide each other.
        aside = 3.0 * (number - len(lines) / 2)
        shift = ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans)
        transform = axes.transData + shift
        at = sorted({row.budget for row in rows if row.budget})
        means = [_mean(value(row) for row in rows if row.budget == budget) for budget in at]
        axes.plot(at, means, label=name, transform=transform, **look)
        for row in rows if intervals else ():
            ends = np.array([row.accuracy_low, row.accuracy_high])
            x = np.array([row.budget] * 2)
            axes.plot(x, ends, color=look["color"], lw=1, alpha=0.7, transform=transform)
    axes.set_xlabel("budget (slots per head)")
    _scale(axes, budgets, log=bool(budgets) and budgets[-1] > 4 * budgets[0])


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _scale(axes: Axes, at: Sequence[float], *, log: bool) -> None:
    """The scale of x, with ticks where something was measured."""
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    if at:
        axes.set_xticks(_apart(at, log=log))
        low, high = at[0], at[-1]
        if log:
            edge = (high / low) ** 0.08 if high > low else 1.3
            axes.set_xlim(low / edge, high * edge)
        else:
            edge = 0.12 * (high - low) or 0.3 * abs(high) or 1
            axes.set_xlim(low - edge, high + edge)
    axes.xaxis.set_major_formatter(FuncFormatter(_short))


def _apart(at: Iterable[float], *, log: bool) -> list[float]:
    """As many of the sorted values as have labels that do not touch."""
    values = list(at)
    places = np.log(values) if log else np.asarray(values, dtype=float)
    gap = 0.17 * (places[-1] - places[0])
    chosen: list[int] = []
    for i, place in enumerate(places):
        if not chosen or place - places[chosen[-1]] >= gap:
            chosen.append(i)
    return [values[i] for i in chosen]


def _short(at: float, _: object = None) -> str:
    return f"{at / 1e6:,g}M" if abs(at) >= 1e6 else f"{at:,g}"


def _looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    looks = dict(BESIDE)
    seen: Counter[int] = Counter()
    for name, colour in _coloured(names, MOST).items():
        looks[name] = {
            "color": SERIES[colour],
            "marker": MARKERS[colour],
            # Where there are more lines than colours.
            "linestyle": LINES[seen[colour] % len(LINES)],
        }
        seen[colour] += 1
    return looks


def _coloured(names: Iterable[str], count: int) -> dict[str, int]:
    """The colour of each line by its number; lines that are new take so many in turn."""
    known = _colours.get({})
    others = [name for name in names if name not in BESIDE]
    new = [name for name in others if name not in known]
    first = len(others) - len(new)
    known.update({name: i % count for i, name in enumerate(new, first)})
    return {name: known[name] for name in others}


def _legend(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    if names:
        shown = list(map(_wrapped, names))
        figure.legend(handles, shown, loc="outside lower left", ncols=_columns(names))


def _wrapped(name: str) -> str:
    return "\n".join(textwrap.wrap(name, _LONGEST))


def _columns(names: Sequence[str]) -> int:
    longest = max(map(len, names), default=0)
    return 3 if longest <= 8 else 2 if longest <= 17 else 1
