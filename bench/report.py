"""The decode benchmark's results as Markdown."""

import json
from pathlib import Path
from typing import Any

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


def report() -> str:
    """What was measured on each device, or the command that would."""
    parts = []
    for device in ("cpu", "cuda"):
        path = RESULTS / f"decode-{device}.json"
        if path.exists():
            parts.append(_measured(json.loads(path.read_text())))
        else:
            parts.append(f"On {device}: not measured. `{COMMAND}` fills these rows where it can.")
    return "\n\n".join(parts)


def _measured(document: dict[str, Any]) -> str:
    conditions, rows = document["conditions"], document["rows"]
    versions = conditions["versions"]
    decode = [row for row in rows if row["kind"] == "decode"]
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in decode]
    return "\n".join(
        [
            f"{conditions['hardware']}, {conditions['threads']} threads, {conditions['dtype']}, "
            f"torch {versions['torch']}, transformers {versions['transformers']}; prompt of "
            f"{conditions['prompt']} tokens, budget {conditions['budget']}. Medians and extremes "
            f"of {rows[0]['rounds']} rounds, each right after as many tokens of DynamicCache.",
            "",
            *lines,
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
