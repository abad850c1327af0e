"""What a sweep will cost."""

from collections.abc import Mapping

from compressed_cache.eval.results.row import Measured, Row
from compressed_cache.eval.sweep.plan import Cell, Plan, policy_of
from compressed_cache.eval.sweep.tasks import Size
from compressed_cache.wording import markdown

Outcomes = Mapping[str, Row | str | None]
"""By the name of the cell: its row, its error, or None."""


def seconds(cells: list[Cell], outcomes: Outcomes, sizes: Mapping[str, Size]) -> float | None:
    """How long cells take one after another.

    A cell takes what those of its task took on average; where none is done, the average per token
    that could have been generated. None if no cell is done.
    """
    done = [row for row in outcomes.values() if isinstance(row, Measured)]
    if not done:
        return None
    per_token = sum(row.seconds for row in done) / sum(sizes[row.task].tokens for row in done)
    total = 0.0
    for cell in cells:
        times = [row.seconds for row in done if row.task == cell.task]
        total += sum(times) / len(times) if times else sizes[cell.task].tokens * per_token
    return total


def page(
    plan: Plan,
    todo: list[Cell],
    outcomes: Outcomes,
    sizes: Mapping[str, Size],
    *,
    processes: int | None,
) -> str:
    """The plan, what is done of it, and what the rest costs at most.

    Args:
        plan: the sweep's.
        todo: the cells that would run.
        outcomes: of all cells.
        sizes: of the tasks.
        processes: how many cells run at a time, None if that is not known.
    """
    cells = plan.cells()
    table = []
    for task in plan.tasks:
        for setting in plan.policies:
            is_full = policy_of(setting) == "full"
            budgets = "-" if is_full else ",".join(map(str, plan.budgets))
            own = [outcomes[c.name] for c in cells if (c.task, c.setting) == (task, setting)]
            table.append([task, setting, budgets, str(plan.seeds), *_counts(own)])
    tokens = sum(sizes[cell.task].tokens for cell in todo)
    documents = sum(sizes[cell.task].documents for cell in todo)
    lines = [
        markdown(["task", "policy", "budgets", "seeds", "cells", "done", "failed"], table),
        "",
        f"to do: {len(todo)} of {len(cells)} cells, {documents:,} documents, at most {tokens:,} "
        "generated tokens",
        f"time: {_time(seconds(todo, outcomes, sizes), processes)}",
    ]
    if repeating := plan.repeating():
        lines.append(
            f"note: decoding is greedy, so that seeds after the first repeat the rows of "
            f"{', '.join(repeating)}. --seeds 1 does, or sample by --gen-kwargs do_sample=true"
        )
    return "\n".join(lines)


def _counts(outcomes: list[Row | str | None]) -> list[str]:
    kinds = (object, Measured, str)
    return [str(sum(isinstance(outcome, kind) for outcome in outcomes)) for kind in kinds]


def _time(found: float | None, processes: int | None) -> str:
    if found is None:
        return "not known before a cell is done"
    if processes is None:
        return f"about {_clock(found)} of one process, as the cells that are done took"
    return (
        f"about {_clock(found / processes)} with {processes} process"
        f"{'es' * (processes > 1)}, as the cells that are done took"
    )


def _clock(found: float) -> str:
    minutes, rest = divmod(round(found), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
