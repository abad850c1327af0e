"""What is held and what is lost by it."""

from typing import Any

import numpy as np

from compressed_cache.eval.report import figures
from compressed_cache.eval.report.figures import Curve
from compressed_cache.eval.report.parts import Part, drawn
from compressed_cache.eval.report.svg import Picture
from compressed_cache.eval.report.tables import Column, table
from compressed_cache.eval.report.tables import field as column
from compressed_cache.eval.report.traces import Head, Losses, TraceFile

_STEPS_DRAWN = 100


def retention(trace: TraceFile) -> Part:
    """What each head of some layers holds over time."""
    pictures = []
    for head in trace.heads:
        name = f"layer {head.layer}, head {head.head}"
        share = head.share(steps=trace.steps, positions=trace.positions)
        figure = figures.retention(
            share, steps=trace.steps, positions=trace.positions, prompt=trace.prompt
        )
        held = f"{head.held} of {len(head.position)} tokens after step {trace.steps}"
        pictures.append(Picture(figure, f"What {name} holds: {held}", name))
    columns: list[Column[Head]] = [
        column("layer", form="d"),
        column("head", form="d"),
        Column("tokens", lambda head: len(head.position), ",d"),
        column("held", "held at the end", ",d"),
        column("lifetime", "mean steps until evicted", ",.1f"),
        column("missed", "attention missed", ",.3f"),
    ]
    shown = sorted({head.layer for head in trace.heads})
    text = f"Layers {', '.join(map(str, shown))} of {trace.layers}"
    text += f", row 0 of {trace.rows}." if trace.rows > 1 else "."
    title = _about(trace.source, trace.about)
    return Part(title, text, pictures, [table(title, columns, trace.heads)])


def lost(losses: list[Losses]) -> list[Part]:
    """What was lost by layer and step, all traces beside each other."""
    if not losses:
        return []
    lines, maps = {}, []
    for each in losses:
        title = _about(each.source, each.about)
        mean = each.lost.mean(axis=0)
        where = np.unique(np.linspace(0, each.steps - 1, _STEPS_DRAWN).round().astype(int))
        lines[title] = Curve((where + 1).tolist(), np.cumsum(mean)[where].tolist())
        figure = figures.lost_by_layer(each.shown, steps=each.steps)
        most = int(each.lost.mean(axis=1).argmax())
        words = f"{title}: {mean.mean():.1%} lost on average, most in layer {most}"
        maps.append(Picture(figure, f"Attention lost by layer and step, {words}", title))
    words = "Attention lost up to each step, the mean of layers"
    axes = {"x": "decode step", "y": "steps' worth of attention", "dots": False}
    summed = drawn(lines, words, **axes)
    columns: list[Column[tuple[str, int, np.ndarray]]] = [
        Column("trace", lambda row: row[0]),
        Column("layer", lambda row: row[1], "d"),
        Column("mean lost %", lambda row: 100 * float(row[2].mean()), ".2f"),
        Column("most in a step %", lambda row: 100 * float(row[2].max()), ".2f"),
        Column("at step", lambda row: int(row[2].argmax()) + 1, ",d"),
    ]
    rows = [
        (title, layer, lost)
        for title, each in zip(lines, losses, strict=True)
        for layer, lost in enumerate(each.lost)
    ]
    text = "The first figure adds up the shares over steps; all are means of heads and rows."
    return [Part("By layer and step", text, [*summed, *maps], [table(words, columns, rows)])]


def _about(source: str, about: dict[str, Any]) -> str:
    known = [about[key] for key in ("policy", "model") if about.get(key)]
    return ", ".join([*known, source])
