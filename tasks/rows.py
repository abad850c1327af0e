"""Rows of a benchmark: from a local file, from the hub, or made for the shipped model."""

import json
import os
from pathlib import Path
from typing import Any

from compressed_cache.reasoner.problems import make_problem
from compressed_cache.tasks.benchmarks import Benchmark

FOLDER_VARIABLE = "COMPRESSED_CACHE_DATA"
_SHIPPED_ROWS = 100


def local_rows(path: Path, benchmark: Benchmark) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file in the hub's schema; only the needed columns are kept.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no JSON object, lacks a column, or has no valid answer; the
            message names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no local rows at {path}: this task reads a file of that name, one JSON object a line"
        )
    rows = []
    # As bytes, because text also has line breaks that JSON allows inside strings.
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(checked_row(json.loads(line), benchmark))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def hub_rows(
    path: str, name: str | None, split: str, benchmark: Benchmark, **arguments: Any
) -> list[dict[str, Any]]:
    """Rows of a dataset on the hub.

    Raises:
        RuntimeError: the hub does not give it: not reachable, not there, or gated.
        ValueError: a row that lacks a column or has no valid answer; the message names the row.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(path, name, split=split, **arguments)
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise RuntimeError(f"{type(error).__name__}: {first_line}") from None
    rows = []
    for number, row in enumerate(loaded):
        try:
            rows.append(checked_row(row, benchmark))
        except ValueError as error:
            raise ValueError(f"{path}, {split} row {number}: {error}") from None
    return rows


def shipped_rows(steps: int) -> list[dict[str, Any]]:
    """Held-out problems of the shipped model, always the same."""
    problems = [make_problem(seed, steps) for seed in range(_SHIPPED_ROWS)]
    return [{"prompt": problem.prompt, "answer": problem.answer} for problem in problems]


def data_folder(metadata: dict[str, Any]) -> Path | None:
    """The user's folder of local rows: ``--metadata data_dir=...``, or the environment variable."""
    folder = metadata.get("data_dir") or os.environ.get(FOLDER_VARIABLE)
    return Path(folder).expanduser() if folder else None


def checked_row(row: Any, benchmark: Benchmark) -> dict[str, Any]:
    """The needed columns of one row.

    Raises:
        ValueError: what is wrong with it.
    """
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object, got {type(row).__name__}")
    for column, kind in benchmark.columns.items():
        if column not in row:
            raise ValueError(
                f"column {column!r} is missing, needed are {', '.join(benchmark.columns)}"
            )
        # A bool is an int to Python, not to us.
        if type(row[column]) is not kind:
            raise ValueError(
                f"column {column!r} must be {kind.__name__}, got {type(row[column]).__name__}"
            )
    kept = {column: row[column] for column in benchmark.columns}
    try:
        benchmark.gold(kept)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"no answer can be read from it ({type(error).__name__}: {error})"
        ) from None
    return kept
