"""The folder of a sweep: what is done, and nothing half done.

    sweep.json      the plan, which further sweeps extend by tasks, policies, budgets and seeds
    results.jsonl   one row for each finished cell, in the order in which they finished
    cells/NAME/     log.txt, and result.json with samples.jsonl, or error.json; with agreement the
                    full cache's has texts.jsonl

A cell is written under a name that begins with a dot, and renamed when it is complete.
"""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from compressed_cache.eval.results import row as rows
from compressed_cache.eval.results.row import Measured, Row
from compressed_cache.eval.sweep.plan import FORMAT, Cell, Plan, extended

LOG, SAMPLES, RESULT, ERROR = "log.txt", "samples.jsonl", "result.json", "error.json"


def write_error(folder: Path, error: str) -> None:
    """Says in a cell's folder why it has no result."""
    (folder / ERROR).write_text(json.dumps({"format": FORMAT, "error": error}) + "\n")


class Folder:
    """Reads at any time, writes while open."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.cells = self.path / "cells"

    @contextmanager
    def open(self, plan: Plan) -> Iterator[None]:
        """Keeps other sweeps out, and mends what a sweep that was killed has left.

        Raises:
            OSError: a folder that cannot be written to.
            ValueError: a folder of another plan, or a file in it that is not its own.
            BlockingIOError: another sweep is at work here.
        """
        self.cells.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / ".lock", timeout=0):
                self._mend(self.check(plan))
                yield
        except Timeout:
            raise BlockingIOError(
                f"another sweep is at work in {self.path}. Wait for it, or use another --out"
            ) from None

    def check(self, plan: Plan) -> dict[str, Any]:
        """Refuses a folder that cannot be used, and leaves it as it is.

        Returns:
            What its plan is to be.

        Raises:
            NotADirectoryError: one inside a file.
            PermissionError: one that cannot be written to.
            ValueError: a folder of another plan, or of something else.
        """
        there = next(one for one in (self.path, *self.path.absolute().parents) if one.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(there))
        if not os.access(there, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied", str(there))
        path = self.path / "sweep.json"
        wanted = plan.to_json()
        if not path.exists():
            return wanted
        try:
            found = json.loads(path.read_text())
            version = found["format"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path} is no plan of a sweep. Use another --out") from None
        if version != FORMAT:
            raise ValueError(
                f"{path}: format must be {FORMAT}, got {version!r}. A newer compressed-cache wrote "
                "it: update, or use another --out"
            )
        try:
            return extended(found, wanted)
        except KeyError:
            raise ValueError(f"{path} is no plan of a sweep. Use another --out") from None
        except ValueError as error:
            message = f"{self.path} holds another plan: {error}. Use another --out"
            raise ValueError(message) from None

    def outcome(self, cell: Cell) -> Row | str | None:
        """The cell's row, or its error, or None if it is still to do.

        Raises:
            ValueError: a file that is no row.
        """
        folder = self.cells / cell.name
        return self._outcome(folder) if folder.exists() else None

    def _outcome(self, folder: Path) -> Row | str:
        path = folder / (ERROR if (folder / ERROR).exists() else RESULT)
        try:
            text = path.read_text()
            return json.loads(text)["error"] if path.name == ERROR else rows.from_json(text)
        except (FileNotFoundError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: {error}. Remove {folder} to run this cell again") from None

    def begin(self, cell: Cell) -> Path:
        """A new folder for the cell, which counts once it is published."""
        folder = self.cells / f".{cell.name}.{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        return folder

    def publish(self, cell: Cell, folder: Path) -> None:
        """The cell is done, with a result or an error, and the rows have its result."""
        folder.rename(self.cells / cell.name)
        result = self.outcome(cell)
        if isinstance(result, Measured):
            rows.append(self.path / rows.FILE, result)

    def forget(self, cell: Cell) -> None:
        """The cell is to do again."""
        shutil.rmtree(self.cells / cell.name)

    def _mend(self, plan: dict[str, Any]) -> None:
        for folder in self.cells.glob(".*"):
            shutil.rmtree(folder)
        _write(self.path / "sweep.json", json.dumps(plan, indent=1) + "\n")
        # Those of all sweeps that were at work here.
        outcomes = [_line(self._outcome(folder)) for folder in sorted(self.cells.iterdir())]
        finished = [line for line in outcomes if line]
        path = self.path / rows.FILE
        text = path.read_text() if path.exists() else ""
        whole, half = text[: text.rfind("\n") + 1], text[text.rfind("\n") + 1 :]
        # What a killed sweep leaves of a row that its cell has; anything else is refused below.
        if any(line.startswith(half) for line in finished):
            _write(path, whole)
        known = [row.to_json() for row in rows.read(path)] if text else []
        kept = [line for line in known if line in finished]
        kept += [line for line in finished if line not in known]
        _write(path, "".join(line + "\n" for line in kept))


def _line(outcome: Row | str) -> str | None:
    return outcome.to_json() if isinstance(outcome, Measured) else None


def _write(path: Path, text: str) -> None:
    """Writes a file at once, unless it holds this already."""
    if path.exists() and path.read_text() == text:
        return
    partial = path.with_name(f".{path.name}")
    partial.write_text(text)
    partial.replace(path)
