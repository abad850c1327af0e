"""The demo with a model of the user's: how often policies say what its full cache says."""

import argparse
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from compressed_cache.eval.results.row import Agreement, read
from compressed_cache.eval.sweep.command import Run, carry_out
from compressed_cache.eval.sweep.plan import Plan, named
from compressed_cache.eval.sweep.prompts import of_file

PROMPTS = Path(__file__).with_name("prompts.txt")
_COLUMNS = ("policy", "budget", "late positions", "agreement", "KL, nats", "first difference")


def run(
    console: Console, options: argparse.Namespace, policies: list[str], budgets: list[int]
) -> int:
    """Runs ``agree`` on a few prompts of this package, and prints its rows as a table."""
    folder = Path(options.out) / Path(options.model).name
    plan = Plan(
        model=named(options.model),
        tasks=["text-demo"],
        policies=list(dict.fromkeys(["full", *policies])),
        budgets=list(dict.fromkeys(budgets)),
        seeds=1,
        batch_size=8,
        gen_kwargs={"max_gen_toks": options.max_new_tokens},
        measure=Agreement.measure,
        prompts=of_file(PROMPTS),
    )
    # Where the model cannot be read, the sweep says why.
    with suppress(OSError, ValueError):
        template = AutoTokenizer.from_pretrained(plan.pretrained).chat_template
        plan = replace(plan, chat=bool(template))
    status = carry_out(plan, Run(str(folder), retry_failed=True))
    try:
        rows = read(folder)
    except (FileNotFoundError, ValueError):
        return status
    table = Table(box=SIMPLE_HEAD)
    for name in _COLUMNS:
        table.add_column(name)
    for row in rows:
        if isinstance(row, Agreement) and row.budget is not None:
            table.add_row(*_cells(row))
    console.print(table)
    return status


def _cells(row: Agreement) -> tuple[str, ...]:
    error = "" if row.agreement_se is None else f" ± {100 * row.agreement_se:.1f}"
    return (
        row.policy,
        str(row.budget),
        f"{row.late_positions:,}",
        "nothing was evicted" if row.agreement is None else f"{100 * row.agreement:.1f} %{error}",
        "-" if row.divergence is None else f"{row.divergence:.3f}",
        "none" if row.identical == 1 else f"{row.first_difference:.0f}",
    )
