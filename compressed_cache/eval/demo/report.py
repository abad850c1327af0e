"""The demo's numbers as a JSON document, a table and a picture."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

import compressed_cache
from compressed_cache.eval.demo.measure import STEPS, Exam, Refusal, Row
from compressed_cache.eval.report.figures import draw_accuracy
from compressed_cache.eval.report.rows import of_demo, series, with_prompt
from compressed_cache.eval.report.style import RC

COLUMNS = (
    "policy",
    "budget",
    "prompt",
    "accuracy [95%]",
    "tokens",
    "tok/s",
    "MiB",
    "evicted",
)


def document(
    exam: Exam, found: Sequence[Row | Refusal], *, workers: int, threads: int
) -> dict[str, Any]:
    """Every number of a demo, with what produced it, and what was refused if anything was."""
    refused = [asdict(each) for each in found if isinstance(each, Refusal)]
    return {
        "versions": {
            "compressed_cache": compressed_cache.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "machine": {
            "processor": processor(),
            "workers": workers,
            "threads": threads,
            "device": str(exam.model.device),
        },
        "problems": {
            "first_seed": exam.seed,
            "count": len(exam.problems),
            "steps": STEPS,
            "split": "held_out",
            "mean_prompt_tokens": exam.inputs.attention_mask.sum(dim=1).float().mean().item(),
            "max_new_tokens": exam.max_new_tokens,
        },
        "rows": [asdict(each) for each in found if isinstance(each, Row)],
    } | ({"refused": refused} if refused else {})


def write_json(document: dict[str, Any], path: Path) -> None:
    """Writes the document whole or not at all."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(document, indent=1) + "\n")
    beside.replace(path)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row of the table, as text in the order of :data:`COLUMNS`; "-" where it was refused."""
    setting = (
        row["policy"],
        "-" if row["budget"] is None else str(row["budget"]),
        "kept" if row["protect_prompt"] else "-",
    )
    if "why" in row:
        return setting + ("-",) * (len(COLUMNS) - len(setting))
    interval = f"[{100 * row['accuracy_low']:.0f}, {100 * row['accuracy_high']:.0f}]"
    return (
        *setting,
        f"{row['accuracy']:.0%} {interval}",
        f"{row['mean_tokens']:.0f}",
        f"{row['tokens_per_s']:.0f}",
        f"{row['cache_bytes'] / 2**20:.1f}",
        str(row["evicted_tokens"]),
    )


def caption(document: dict[str, Any]) -> str:
    """The conditions of all rows, in one line."""
    problems, versions, machine = (document[key] for key in ("problems", "versions", "machine"))
    return (
        f"{problems['count']} held-out problems from seed {problems['first_seed']} in one batch, "
        f"{problems['mean_prompt_tokens']:.0f} prompt tokens each, greedy; "
        f"{machine['processor']}, rows at a time: {machine['workers']}, threads of each: "
        f"{machine['threads']}, {machine['device']}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}"
    )


def table(document: dict[str, Any]) -> Table:
    """The table the demo prints."""
    printed = Table(*COLUMNS, caption=caption(document), box=SIMPLE_HEAD, pad_edge=False)
    for column in printed.columns:
        column.no_wrap = True
    for column in printed.columns[3:]:
        column.justify = "right"
    group = None
    every = [*document["rows"], *document.get("refused", [])]
    for row in sorted(every, key=lambda row: (row["budget"] or 0, row["protect_prompt"])):
        here = row["budget"], row["protect_prompt"]
        if group not in (None, here):
            printed.add_section()
        group = here
        printed.add_row(*cells(row))
    return printed


def draw(document: dict[str, Any], path: Path) -> None:
    """Accuracy against budget, without and with a protected prompt."""
    lines = series(of_demo(document, path.name))
    with matplotlib.rc_context(RC | {"figure.facecolor": "white"}):
        figure = Figure(figsize=(9, 3.6))
        panels = figure.subplots(1, 2, sharey=True)
        for axes, kept in zip(panels, (False, True), strict=True):
            draw_accuracy(axes, with_prompt(lines, kept=kept))
            axes.set_title(f"prompt {'' if kept else 'not '}protected")
            axes.label_outer()
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
        figure.savefig(path, dpi=130)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
