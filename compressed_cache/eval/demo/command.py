"""What the demo command does with its options."""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from compressed_cache.eval.demo import report, text
from compressed_cache.eval.demo.measure import (
    BUDGETS,
    CORE,
    Exam,
    Refusal,
    Row,
    Setting,
    rows,
    settings,
)
from compressed_cache.policies import canonical_name, make_policy
from compressed_cache.tensorfile import check_folder

# What the prompts and their answers exceed.
_OF_MODELS: tuple[int, ...] = (96, 160)
_FOLDER = "demo_results"


def run(options: argparse.Namespace) -> int:
    """Runs the demo, on the shipped model or on one of the user's."""
    policies = [canonical_name(one) for one in options.policies or CORE]
    budgets = options.budgets or list(BUDGETS)
    try:
        for policy in policies:
            make_policy(policy)
    except ValueError as error:
        print(f"--policies: {error}", file=sys.stderr)
        return 2
    counts = options.problems, options.max_new_tokens, options.workers, *budgets
    if min(counts) < 1 or options.seed < 0:
        print(
            "--problems, --budgets, --workers and --max-new-tokens must be >= 1, --seed >= 0",
            file=sys.stderr,
        )
        return 2
    if options.prompt and not options.model:
        print("--prompt must come with --model", file=sys.stderr)
        return 2
    if options.prompt and options.out:
        print("--out must come without --prompt, which writes no files", file=sys.stderr)
        return 2
    options.out = options.out or _FOLDER
    console = Console()
    if options.model and not options.prompt:
        from compressed_cache.eval.demo import agreement

        budgets = options.budgets or [*_OF_MODELS]
        return agreement.run(console, options, policies, budgets)
    if options.model:
        return text.generate(console, options.model, options.prompt, policies, budgets, options)

    folder = Path(options.out)
    try:
        check_folder(folder)
    except OSError as error:
        print(f"--out {folder}: {error.strerror}", file=sys.stderr)
        return 1
    return _on_shipped_model(console, options, settings(policies, budgets), folder)


def _on_shipped_model(
    console: Console, options: argparse.Namespace, planned: list[Setting], folder: Path
) -> int:
    exam = Exam(problems=options.problems, seed=options.seed)
    found: list[Row | Refusal] = []
    workers = min(options.workers, len(planned))
    threads = max(1, torch.get_num_threads() // workers)
    document = partial(report.document, exam, found, workers=workers, threads=threads)
    status = 0
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn())
    try:
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            task = progress.add_task("", total=len(planned))
            for row in rows(exam, planned, workers=workers, threads=threads):
                found.append(row)
                report.write_json(document(), folder / "demo.json")
                told = f"{row.accuracy:.0%}" if isinstance(row, Row) else "-"
                progress.update(task, advance=1, description=f"{row.policy} {told}")
    except KeyboardInterrupt:
        print(f"stopped after {len(found)} of {len(planned)} rows", file=sys.stderr)
        status = 130
    if not found:
        return status
    report.draw(document(), folder / "demo.png")
    console.print(report.table(document()))
    for setting, row in zip(planned, found, strict=False):
        if isinstance(row, Refusal):
            console.print(f"- {setting}: {row.why}", markup=False, highlight=False)
    console.print(f"written to {folder}/demo.json and {folder}/demo.png")
    return status
