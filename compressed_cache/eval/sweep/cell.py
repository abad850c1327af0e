"""Cells, run in this process."""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from compressed_cache.eval.agreement import text
from compressed_cache.eval.sweep import accuracy, agreement, loaded
from compressed_cache.eval.sweep import folder as files
from compressed_cache.eval.sweep.group import Finished, Group
from compressed_cache.eval.sweep.plan import Plan


def take(plan: Plan, group: Group, folders: Sequence[Path]) -> bool:
    """Runs cells and writes what came of them.

    Args:
        plan: theirs.
        group: what to run.
        folders: one for each cell. It gains ``log.txt``, and ``samples.jsonl`` and ``result.json``
            or ``error.json``.

    Returns:
        Whether all have a result. If not, this process may be no good for other cells.
    """
    measure = agreement.measure if plan.is_agreement else accuracy.measure
    with _output_to(folders[0] / files.LOG):
        try:
            outcomes = measure(plan, group)
        except Exception as error:
            traceback.print_exc()
            loaded.forget()
            outcomes = [error] * len(folders)
    for folder, outcome in zip(folders, outcomes, strict=True):
        if folder != folders[0]:
            shutil.copy(folders[0] / files.LOG, folder)
        _write(folder, outcome)
    return not any(isinstance(outcome, Exception) for outcome in outcomes)


def _write(folder: Path, outcome: Finished | Exception) -> None:
    if isinstance(outcome, Exception):
        files.write_error(folder, f"{type(outcome).__name__}: {outcome}")
        return
    with (folder / files.SAMPLES).open("w") as file:
        file.writelines(json.dumps(sample, default=str) + "\n" for sample in outcome.samples)
    if outcome.texts:
        text.write(folder, outcome.texts)
    (folder / files.RESULT).write_text(outcome.row.to_json() + "\n")


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Sends all output of the process, that of libraries in C too, into a file."""
    kept = {}
    with path.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number in (1, 2):
            kept[number] = os.dup(number)
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
