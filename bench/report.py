"""The results of the benchmarks as Markdown and as a picture."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressed_cache.bench.markdown import markdown

RESULTS = Path(__file__).resolve().parent / "results"
COMMAND = "pytest bench/ --benchmark-only"
HEADER = (
    "device",
    "batch",
    "cache",
    "decode step",
    "ms per token",
    "times as fast as DynamicCache",
)
Row = dict[str, Any]


def decode() -> str:
    """How long a token takes under each cache."""
    return _report("decode", _measured)


def prompt() -> str:
    """What a long prompt takes in memory."""
    return _report("prompt", _peaks)


def compilation() -> str:
    """How long the decode step takes to compile."""
    return _report("compile", _compile_times)


def _report(table: str, make: Callable[[dict[str, Any]], str]) -> str:
    """What was measured on each device, or the command that would."""
    parts = []
    for device in ("cpu", "cuda"):
        path = RESULTS / f"{table}-{device}.json"
        if path.exists():
            parts.append(make(json.loads(path.read_text())))
        else:
            parts.append(f"On {device}: not measured. `{COMMAND}` fills these rows where it can.")
    return "\n\n".join(parts)


def _peaks(document: dict[str, Any]) -> str:
    rows = document["rows"]
    lengths = list(dict.fromkeys(row["tokens"] for row in rows))
    found = {(row["cache"], row["tokens"]): row for row in rows}
    header = ["peak MiB beyond one chunk", *(f"{tokens:,} tokens" for tokens in lengths)]
    lines = []
    for cache in dict.fromkeys(row["cache"] for row in rows):
        cells = [found.get((cache, tokens)) for tokens in lengths]
        shown = [f"{row['peak_mib']:.0f}" if row else "-" for row in cells]
        lines.append([cache, *shown])
    conditions, versions = document["conditions"], document["conditions"]["versions"]
    device = rows[0]["device"]
    return "\n".join(
        [
            f"{conditions['hardware']}, 1 thread, four layers of hidden size 128, chunks of "
            f"{rows[0]['chunk']:,} tokens, budget {rows[0]['budget']}, torch {versions['torch']}, "
            f"transformers {versions['transformers']}; each cell in a process of its own.",
            "",
            markdown(header, lines),
            "",
            f"![Peak memory against the length of the prompt](bench/results/prompt-{device}.png)",
        ]
    )


def _compile_times(document: dict[str, Any]) -> str:
    rows, versions = document["rows"], document["conditions"]["versions"]
    sizes = list(dict.fromkeys(row["layers"] for row in rows))
    found = {(row["cache"], row["once"], row["layers"]): row for row in rows}
    header = ["cache", "compiles", *(f"{n} layers, {t}" for n in sizes for t in ("cold", "warm"))]
    lines = []
    for cache, once in dict.fromkeys((row["cache"], row["once"]) for row in rows):
        cells = [found.get((cache, once, size), {}) for size in sizes]
        times = [row.get(name) for row in cells for name in ("cold_s", "warm_s")]
        shown = ["-" if seconds is None else f"{seconds:.1f}" for seconds in times]
        lines.append([cache, "one layer" if once else "every layer", *shown])
    return "\n".join(
        [
            f"Seconds to compile the decode step on {rows[0]['device']} "
            f"({document['conditions']['hardware']}, torch {versions['torch']}, transformers "
            f"{versions['transformers']}): *cold* with nothing on disk, *warm* in a new process "
            "that finds what another left there.",
            "",
            markdown(header, lines),
        ]
    )


def draw_peaks(device: str) -> None:
    """Draws peak memory against the length of the prompt."""
    path = RESULTS / f"prompt-{device}.json"
    if not path.exists():
        return
    from matplotlib.figure import Figure

    rows = json.loads(path.read_text())["rows"]
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for cache in dict.fromkeys(row["cache"] for row in rows):
        own = [row for row in rows if row["cache"] == cache]
        peaks = [row["peak_mib"] for row in own]
        axes.plot([row["tokens"] for row in own], peaks, marker="o", label=cache)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("peak MiB beyond one chunk")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=120)


def _measured(document: dict[str, Any]) -> str:
    conditions, rows = document["conditions"], document["rows"]
    versions = conditions["versions"]
    decode = [row for row in rows if row["kind"] == "decode"]
    return "\n".join(
        [
            f"{conditions['hardware']}, {conditions['threads']} threads, {conditions['dtype']}, "
            f"torch {versions['torch']}, transformers {versions['transformers']}; prompt of "
            f"{rows[0]['prompt']} tokens, budget {rows[0]['budget']}. Medians and extremes "
            f"of {rows[0]['rounds']} rounds, each right after as many tokens of DynamicCache.",
            "",
            markdown(HEADER, map(_cells, decode)),
            *(["", *_long(rows)] if len(rows) > len(decode) else []),
        ]
    )


def _cells(row: Row) -> tuple[str, ...]:
    # The ratio is of times, so its extremes change places.
    speed = f"{1 / row['ratio']:.2f} [{1 / row['ratio_high']:.2f}, {1 / row['ratio_low']:.2f}]"
    return (
        row["device"],
        str(row["batch"]),
        row["contender"],
        "compiled" if row["compiled"] else "eager",
        f"{row['ms_per_token']:.2f}",
        speed,
    )


def _long(rows: list[Row]) -> list[str]:
    return [
        f"- `{row['contender']}`, compiled: a token after {row['late']:,} tokens takes "
        f"{row['ratio']:.2f} times as long as after {row['early']:,} "
        f"[{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]."
        for row in rows
        if row["kind"] == "long"
    ]
