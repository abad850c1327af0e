"""Eviction traces as matrices small enough to draw."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import Table as Arrow

STEPS, POSITIONS = 240, 320
"""Rows and columns of a picture at most."""
ROW = 0
"""The row of the batch that is drawn."""


@dataclass(frozen=True)
class Head:
    """What became of the tokens of one key/value head. Arrays are in the order of positions."""

    layer: int
    head: int
    position: np.ndarray
    inserted: np.ndarray
    evicted: np.ndarray
    """-1: held at the end."""
    attention: np.ndarray
    """The attention each would still have received; NaN: not known."""

    @property
    def held(self) -> int:
        """Tokens held at the end."""
        return int((self.evicted < 0).sum())

    @property
    def lifetime(self) -> float | None:
        """Mean decode steps for which evicted tokens were held."""
        gone = self.evicted >= 0
        return float((self.evicted - self.inserted)[gone].mean()) if gone.any() else None

    @property
    def missed(self) -> float | None:
        """The attention that evicted tokens would still have received."""
        known = self.attention[(self.evicted >= 0) & ~np.isnan(self.attention)]
        return float(known.sum()) if known.size else None

    def share(self, *, steps: int, positions: int) -> np.ndarray:
        """``[rows, columns]``: how many of the positions of a column are held at a row's step.

        NaN where none of them was there yet. Steps beyond :data:`STEPS` are left out at equal
        distances, positions beyond :data:`POSITIONS` share columns.
        """
        inserted = np.full(positions, steps + 1)
        evicted = np.full(positions, -1)
        inserted[self.position] = self.inserted
        evicted[self.position] = np.where(self.evicted < 0, steps + 1, self.evicted)
        shown = np.unique(np.linspace(0, steps, min(steps + 1, STEPS)).round().astype(int))
        starts = np.linspace(0, positions, min(positions, POSITIONS), endpoint=False).astype(int)
        there = inserted <= shown[:, None]
        held = there & (evicted > shown[:, None])
        counts = np.add.reduceat(there, starts, axis=1, dtype=float)
        with np.errstate(invalid="ignore"):
            return np.add.reduceat(held, starts, axis=1, dtype=float) / counts


@dataclass(frozen=True)
class TraceFile:
    """The heads of some layers over one generation."""

    source: str
    about: dict[str, Any]
    """What the file says of itself."""
    layers: int
    """In the file."""
    rows: int
    steps: int
    positions: int
    prompt: int
    heads: list[Head]


@dataclass(frozen=True)
class Losses:
    """The share of attention lost in each step by each layer, the mean of rows and heads."""

    source: str
    about: dict[str, Any]
    lost: np.ndarray
    """``[layers, steps]``."""

    @property
    def shown(self) -> np.ndarray:
        """The same with several steps in one column where there are many."""
        starts = np.linspace(0, self.steps, min(self.steps, POSITIONS), endpoint=False).astype(int)
        sizes = np.diff([*starts, self.steps])
        return np.add.reduceat(self.lost, starts, axis=1) / sizes

    @property
    def steps(self) -> int:
        """Decode steps."""
        return self.lost.shape[1]


def read_trace(
    path: str, source: str, about: dict[str, Any], chosen: list[int] | None
) -> TraceFile:
    """A trace, with the first row's heads of the chosen layers.

    Args:
        path: the file.
        source: its name.
        about: its metadata.
        chosen: layers to draw; None: the first, the middle and the last.

    Raises:
        ValueError: there is no such layer, or nothing at all.
    """
    every = pq.read_table(path, columns=["row", "layer"])
    layers = sorted(every["layer"].unique().to_pylist())
    if not layers:
        raise ValueError(f"{path} must hold the trace of at least one token, got none")
    if chosen is None:
        chosen = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    if missing := [layer for layer in chosen if layer not in layers]:
        raise ValueError(f"--layers must be among those of {path}, {layers}, got {missing}")
    table = pq.read_table(path, filters=[("row", "=", ROW), ("layer", "in", chosen)])
    columns = {name: table[name].to_numpy() for name in table.column_names}
    prompt = columns["position"][columns["inserted"] == 0]
    return TraceFile(
        source=source,
        about=about,
        layers=len(layers),
        rows=len(every["row"].unique()),
        steps=int(max(columns["inserted"].max(), columns["evicted"].max())),
        positions=int(columns["position"].max()) + 1,
        prompt=int(prompt.max()) + 1 if prompt.size else 0,
        heads=_heads(columns),
    )


def read_losses(path: str, source: str, about: dict[str, Any]) -> Losses | None:
    """The losses of all layers from the first decode step on; None: none were recorded."""
    table: Arrow = pq.read_table(path, columns=["layer", "step", "lost"])
    table = table.filter(pc.field("step") > 0)
    mean = table.group_by(["layer", "step"]).aggregate([("lost", "mean")])
    if not len(mean):
        return None
    layer, step = mean["layer"].to_numpy(), mean["step"].to_numpy()
    lost = np.zeros((layer.max() + 1, step.max()))
    lost[layer, step - 1] = mean["lost_mean"].to_numpy()
    return Losses(source, about, lost)


def _heads(columns: dict[str, np.ndarray]) -> list[Head]:
    found = []
    for layer, head in sorted(set(zip(columns["layer"], columns["head"], strict=True))):
        own = (columns["layer"] == layer) & (columns["head"] == head)
        order = np.argsort(columns["position"][own])
        names = ("position", "inserted", "evicted", "attention")
        parts = {name: columns[name][own][order] for name in names}
        found.append(Head(layer=int(layer), head=int(head), **parts))
    return found
