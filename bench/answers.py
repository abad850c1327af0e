"""The share of right answers of models that others trained, and how policies rank by it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from compressed_cache.eval.results.comparison import compare
from compressed_cache.eval.results.row import Measured, Result, read
from compressed_cache.wording import markdown


def answers(path: Path) -> list[Result]:
    """The rows of accuracy in a file or in the folder of a sweep."""
    return [row for row in read(path) if isinstance(row, Result)]


def accuracy(folder: Path) -> str:
    """A table for each file of rows and each budget: policies by their share of right answers."""
    tables = []
    for path in sorted(folder.glob("*.jsonl")):
        rows = answers(path)
        for budget in sorted({row.budget for row in rows if row.budget is not None}):
            tables.append(_table([row for row in rows if row.budget in (None, budget)], budget))
    return "\n\n".join(tables) or "Not measured."


def _table(rows: Sequence[Result], budget: int) -> str:
    one = rows[0]
    caption = (
        f"**{one.model}** (weights {one.weights}), {one.task}, {one.documents} problems, "
        f"{budget} slots; {conditions(one)}."
    )
    lines = [
        [
            f"`{row.name}`",
            "{:.0f} [{:.0f}, {:.0f}]".format(
                *(100 * x for x in (row.accuracy, row.accuracy_low, row.accuracy_high))
            ),
            f"{row.tokens:.0f}",
            f"{100 * row.truncated:.0f}",
            *(_against(rows, row, other) for other in ("full", "random")),
        ]
        for row in sorted(rows, key=lambda row: -row.accuracy)
    ]
    header = ["policy", "right, %", "tokens", "cut off, %", "to full, points", "to random, points"]
    return caption + "\n\n" + markdown(header, lines)


def conditions(row: Measured) -> str:
    """With what a row was measured."""
    return (
        f"torch {row.versions['torch']}, transformers {row.versions['transformers']}, "
        f"{row.machine['device']}, {row.machine.get('dtype', 'dtype unknown')}"
    )


def _against(rows: Sequence[Result], row: Result, other: str) -> str:
    if row.name == other or all(one.name != other for one in rows):
        return ""
    (found,) = compare(rows, row.name, other)
    return f"{100 * found.difference:+.0f} (p {found.p:.2g})"


Cell = tuple[str, str, int, str]
"""Model, task, budget and policy."""


def ranking(agreements: dict[Cell, float], accuracies: dict[Cell, float]) -> str:
    """Whether policies rank by agreement as they do by accuracy: Spearman's coefficient."""
    both: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in sorted(agreements.keys() & accuracies.keys()):
        both.setdefault(cell[:3], []).append(cell)
    lines = []
    for (model, task, budget), cells in both.items():
        # Two are always in an order.
        if len(cells) < 3:
            continue
        agreed, right = ([found[cell] for cell in cells] for found in (agreements, accuracies))
        result: Any = spearmanr(agreed, right)
        best = (cells[values.index(max(values))][3] for values in (agreed, right))
        lines.append(
            [
                *(model, f"`{task}`", str(budget), str(len(cells)), f"{result.statistic:.2f}"),
                *(f"`{policy}`" for policy in best),
                f"{100 * min(right):.0f} to {100 * max(right):.0f}",
            ]
        )
    header = ["model", "task", "budget", "policies", "rank correlation"]
    return markdown([*header, "best by agreement", "best by accuracy", "accuracies, %"], lines)
