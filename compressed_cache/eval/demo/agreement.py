"""The demo with a model of the user's: how often policies say what its full cache says."""

import argparse
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from compressed_cache.eval.results.row import Agreement, read
from compressed_cache.eval.sweep.command import run as sweep
from compressed_cache.eval.sweep.plan import SHIPPED
from compressed_cache.reasoner import MODEL_PATH

PROMPTS = Path(__file__).with_name("prompts.txt")
_COLUMNS = ("policy", "budget", "late positions", "agreement", "KL, nats", "first difference")


def run(
    console: Console, options: argparse.Namespace, policies: list[str], budgets: list[int]
) -> int:
    """Runs ``agree`` on a few prompts of this package, and prints its rows as a table."""
    path = MODEL_PATH if options.model == SHIPPED else options.model
    folder = Path(options.out) / Path(options.model).name
    try:
        chats = bool(AutoTokenizer.from_pretrained(path).chat_template)
    except (OSError, ValueError):
        # The sweep says what is wrong.
        chats = False
    status = sweep(
        argparse.Namespace(
            model=options.model,
            text=str(PROMPTS),
            tasks=["text-demo"],
            measure=Agreement.measure,
            policies=policies,
            budgets=budgets,
            out=str(folder),
            apply_chat_template=chats,
            max_new_tokens=options.max_new_tokens,
            gen_kwargs=f"max_gen_toks={options.max_new_tokens}",
            batch_size=8,
            limit=None,
            seeds=1,
            policy_args=[],
            model_args="",
            dtype=None,
            metadata="{}",
            retry_failed=True,
            dry_run=False,
            processes=None,
            ray=None,
            gpus_per_cell=None,
        )
    )
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
        f"{row.first_difference:.0f}",
    )
