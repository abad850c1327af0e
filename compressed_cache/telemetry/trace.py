"""Which token left the cache when, and what that cost: a table in memory and on disk.

Two parquet files, ``NAME.parquet`` and beside it ``NAME.losses.parquet``. Their columns are those
of :data:`TOKENS` and :data:`LOSSES`; both have :attr:`Trace.metadata` as JSON under the key
``compressed_cache`` of the file's own metadata.
"""

import csv
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressed_cache.wording import missing

FORMAT = "1"
KEY = b"compressed_cache"

TOKENS = {
    # Row of the batch.
    "row": "int32",
    # Layer of the model; one with a sliding window only forgets what it no longer sees, and is
    # left out.
    "layer": "int32",
    # Key/value head of the layer.
    "head": "int32",
    # Position of the token, padding not counted.
    "position": "int32",
    # Step in which it came in. 0 is the prompt, all chunks of it; after that, each call of the
    # model is a step.
    "inserted": "int32",
    # Step in which it left, before the query of this step could attend to it (but in step 0, where
    # the prompt is attended first and cut then); -1: held at the end.
    "evicted": "int32",
    # Attention it would have received from then on, one query per step, summed over the steps from
    # 1 on and averaged over the query heads of the group; NaN without a shadow cache.
    "attention": "float32",
}
"""Columns of the first file: one row for each token, of each head, layer and row."""

LOSSES = {
    "row": "int32",
    "step": "int32",
    "layer": "int32",
    "head": "int32",
    # Share of the attention of this step's last query, averaged over the query heads of the group,
    # that a full cache would have given to tokens that are not held. In step 0 it is the prompt's
    # last query, and what the cut then took.
    "lost": "float32",
    # The part of it that falls on tokens evicted in this very step.
    "dropped": "float32",
}
"""Columns of the second file, which has no rows without a shadow cache."""

PRUNES = (
    "prune_step",
    "layer_idx",
    "head_idx",
    "kv_len_pre",
    "attn_len",
    "diff_indices",
    "attn_loss",
)
"""Columns of :meth:`Trace.write_csv`."""

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Trace:
    """What became of every token.

    Each token of a row is there once for each head of each layer: tokens read are tokens held plus
    tokens evicted.
    """

    tokens: Columns
    """See :data:`TOKENS`; arrays of one length, ordered by row, layer, head and position."""
    losses: Columns
    """See :data:`LOSSES`; ordered by row, step, layer and head."""
    metadata: dict[str, Any]
    """``format``, ``policy``, ``options``, ``rules``, ``model``, ``versions``, ``steps`` (the last
    one) and ``prompt_lengths`` (of each row)."""

    def write(self, path: str | Path) -> None:
        """Writes both parquet files.

        Raises:
            ModuleNotFoundError: pyarrow is missing.
        """
        arrow, parquet = _arrow()
        metadata = {KEY: json.dumps(self.metadata).encode()}
        for file, columns in ((Path(path), self.tokens), (losses_path(path), self.losses)):
            table = arrow.table(columns).replace_schema_metadata(metadata)
            parquet.write_table(table, file, compression="zstd")

    @classmethod
    def read(cls, path: str | Path) -> "Trace":
        """Reads what :meth:`write` wrote.

        Raises:
            FileNotFoundError: one of the files is not there.
            ModuleNotFoundError: pyarrow is missing.
            ValueError: a file of something else, or of another version of the format.
        """
        tokens, metadata = _columns(Path(path), TOKENS)
        losses, _ = _columns(losses_path(path), LOSSES)
        return cls(tokens, losses, metadata)

    def write_csv(self, path: str | Path, *, row: int = 0) -> None:
        """Writes the evictions of one row with the columns of the reference's own analysis.

        One ``prune_step``, counted from 0, is one step in which any head of any layer lost a token,
        with a line for each head of each layer (the reference counted once per head).
        ``kv_len_pre`` are the tokens a head held together with those that came in, ``attn_len``
        those that the step's query attended to, ``diff_indices`` the positions evicted, apart by
        spaces, and ``attn_loss`` the share of the step's query that fell on these: empty without a
        shadow cache.

        Raises:
            ValueError: no such row.
        """
        rows = len(self.metadata["prompt_lengths"])
        if not 0 <= row < rows:
            raise ValueError(f"row must be from 0 to {rows - 1}, got {row}")
        tokens = _of(self.tokens, row)
        losses = _of(self.losses, row)
        places = zip(losses["step"], losses["layer"], losses["head"], strict=True)
        lost = dict(zip(places, losses["dropped"], strict=True))
        heads = sorted(set(zip(tokens["layer"].tolist(), tokens["head"].tolist(), strict=True)))
        own = {
            (layer, head): (tokens["layer"] == layer) & (tokens["head"] == head)
            for layer, head in heads
        }
        events = np.unique(tokens["evicted"][tokens["evicted"] >= 0]).tolist()
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(PRUNES)
            lines = {
                place: _prunes({name: column[mask] for name, column in tokens.items()}, events)
                for place, mask in own.items()
            }
            for number, step in enumerate(events):
                for place in heads:
                    before, attended, gone = lines[place][number]
                    loss = lost.get((step, *place), "")
                    positions = " ".join(map(str, gone))
                    writer.writerow([number, *place, before, attended, positions, loss])


def losses_path(path: str | Path) -> Path:
    """Where the losses of a trace are."""
    return Path(path).with_suffix(".losses.parquet")


def _prunes(tokens: Columns, events: list[int]) -> list[tuple[int, int, list[int]]]:
    """Of one head: tokens before each event, tokens attended to, and the positions evicted."""
    inserted, evicted = np.sort(tokens["inserted"]), tokens["evicted"]
    order = np.argsort(evicted, kind="stable")
    ordered = evicted[order]
    stay = int(np.searchsorted(ordered, 0))
    found = []
    for step in events:
        first, last = np.searchsorted(ordered, [step, step + 1])
        before = int(np.searchsorted(inserted, step, side="right")) - (int(first) - stay)
        gone = tokens["position"][order[first:last]].tolist()
        # The prompt is attended in full and cut after that.
        found.append((before, before if step == 0 else before - len(gone), gone))
    return found


def _of(columns: Columns, row: int) -> Columns:
    mask = columns["row"] == row
    return {name: column[mask] for name, column in columns.items()}


def _columns(path: Path, schema: dict[str, str]) -> tuple[Columns, dict[str, Any]]:
    arrow, parquet = _arrow()
    try:
        table = parquet.read_table(path)
    except arrow.ArrowInvalid:
        raise ValueError(f"{str(path)!r} must be a parquet file, got something else") from None
    metadata = json.loads((table.schema.metadata or {}).get(KEY, b"{}"))
    if metadata.get("format") != FORMAT or table.column_names != list(schema):
        raise ValueError(
            f"{str(path)!r} must be an eviction trace in format {FORMAT} with the columns "
            f"{', '.join(schema)}, got format {metadata.get('format')} with "
            f"{', '.join(table.column_names)}"
        )
    return {name: table[name].to_numpy() for name in schema}, metadata


def _arrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(missing(error.name, "report"), name=error.name) from None
