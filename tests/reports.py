"""Results of every kind that a report reads, small and made up."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import binomtest

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "bench" / "results"
PROMPT, STEPS, BUDGET = 5, 7, 4


def result(policy: str, budget: int | None, solved: str, **changes: Any) -> dict[str, Any]:
    """A line of a sweep in which each document was solved, 1, or not, 0."""
    interval = binomtest(solved.count("1"), len(solved)).proportion_ci(0.95, method="wilson")
    return {
        "format": 1,
        "model": "some/model",
        "task": "sums",
        "policy": policy,
        "options": {"protect_prompt": False, "recent": 4},
        "budget": budget,
        "seed": 0,
        "documents": len(solved),
        "accuracy": solved.count("1") / len(solved),
        "accuracy_low": float(interval.low),
        "accuracy_high": float(interval.high),
        "tokens": 100.0 + 7 * solved.count("0"),
        "truncated": 0.25,
        "evicted_tokens": 30.0,
        "held_tokens": 64.0,
        "cache_bytes": 2.0**20,
        "tokens_per_s": 50.0,
        "seconds": 3.0,
        "correct": {f"document {i}": float(score) for i, score in enumerate(solved)},
        "versions": {"torch": "9.9"},
        "machine": {"processor": "abacus"},
    } | changes


SWEEP = [
    result("full", None, "1111111110"),
    result("random", 64, "1111000000"),
    result("random", 128, "1111110000"),
    result("h2o", 64, "1111111000"),
    result("h2o", 128, "1111111100"),
    result("knorm", 64, "0011000000"),
    result("knorm", 128, "0111110000"),
]


def write_sweep(path: Path, rows: list[dict[str, Any]] = SWEEP) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evictions(*, layers: int = 4, heads: int = 2) -> dict[str, np.ndarray]:
    """Of each head the token that is gone from each step on: those of least position + head."""
    rows = []
    for layer in range(layers):
        for head in range(heads):
            gone = (position + head for position in range(PROMPT + STEPS))
            for position in range(PROMPT + STEPS):
                inserted = max(0, position - PROMPT + 1)
                evicted = next(gone) + layer
                ever = inserted < evicted <= STEPS
                rows.append((0, layer, head, position, inserted, evicted if ever else -1, 0.5))
    names = ("row", "layer", "head", "position", "inserted", "evicted", "attention")
    return dict(zip(names, map(np.array, zip(*rows, strict=True)), strict=True))


def losses(*, layers: int = 4, heads: int = 2) -> dict[str, np.ndarray]:
    rows = [
        (0, step, layer, head, (step + head) / 20 / (layer + 1), 0.01)
        for step in range(1, STEPS + 1)
        for layer in range(layers)
        for head in range(heads)
    ]
    names = ("row", "step", "layer", "head", "lost", "dropped")
    return dict(zip(names, map(np.array, zip(*rows, strict=True)), strict=True))


def write_parquet(path: Path, columns: dict[str, np.ndarray], **about: Any) -> Path:
    kinds = dict.fromkeys(("attention", "lost", "dropped"), np.float32)
    table = pa.table({k: v.astype(kinds.get(k, np.int32)) for k, v in columns.items()})
    told = {"format": "1", "policy": "h2o", "model": "some/model", "steps": STEPS} | about
    pq.write_table(table.replace_schema_metadata({"compressed_cache": json.dumps(told)}), path)
    return path


TIMING: dict[str, Any] = {
    "prefill_s": 0.5,
    "decode_s": 0.03,
    "tokens_in": 40,
    "tokens_out": 3,
    "tokens_per_s": 100.0,
    "evicted_tokens": 7,
    "cache_bytes": 2**20,
    "peak_allocated_bytes": None,
    "peak_reserved_bytes": None,
    "peak_rss_bytes": 2**29,
    "step_s": [0.01, 0.011, 0.009],
}


def write_timing(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(TIMING | changes))
    return path


def one_of_each(folder: Path) -> list[str]:
    """A sweep, a trace with its losses, a timing and the recorded benchmarks."""
    made = [
        write_sweep(folder / "results.jsonl"),
        write_parquet(folder / "trace.parquet", evictions(), versions={"torch": "9.9"}),
        write_parquet(folder / "losses.parquet", losses(), model=f"someone/{'long-name-' * 5}7B"),
        write_timing(folder / "timing.json"),
    ]
    return [str(path) for path in (*made, RECORDED / "on-cpu-amd-epyc.json")]
