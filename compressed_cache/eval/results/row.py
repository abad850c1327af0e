"""One row of results, and files of them: a JSON object on each line."""

import json
import os
import typing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any

FORMAT = 1
FILE = "results.jsonl"
"""The file of rows in the folder of a sweep."""

Option = int | float | bool | str | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one policy did on one task."""

    model: str
    task: str
    policy: str
    """As for ``CompressedCache``."""
    options: dict[str, Option]
    """Those of the policy, and interval, sinks, recent and protect_prompt; defaults filled in."""
    budget: int | None
    """Slots per head; None for the full cache."""
    seed: int
    documents: int
    accuracy: float
    accuracy_low: float
    """Lower end of the 95% interval."""
    accuracy_high: float
    tokens: float
    """Generated per reply, end of text included."""
    truncated: float
    """Share of the replies cut off at the token limit."""
    evicted_tokens: float
    """Per reply and head."""
    held_tokens: float
    """Per reply and head, when the reply ended."""
    cache_bytes: float
    """Per reply, the policy's state included."""
    tokens_per_s: float
    """Generated tokens of all replies, by the seconds that took, prefill included."""
    seconds: float
    """For all of it."""
    correct: dict[str, float]
    """Score of each document, 0 to 1, by what identifies it."""
    versions: dict[str, str]
    """Of Python and the packages."""
    machine: dict[str, str | int]

    def to_json(self) -> str:
        """One line of JSON, without its end."""
        return json.dumps({"format": FORMAT} | asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "Result":
        """The row in one line.

        Raises:
            ValueError: no row, half a row, or one of a newer format.
        """
        try:
            values = json.loads(line)
        except ValueError:
            raise ValueError("must be a JSON object, got half of one or something else") from None
        if not isinstance(values, dict) or "format" not in values:
            raise ValueError("must be a JSON object with a format, this is a file of another kind")
        found = values.pop("format")
        if found != FORMAT:
            raise ValueError(
                f"format must be {FORMAT}, got {found!r}. A newer compressed-cache wrote it: update"
            )
        names = {field.name for field in fields(cls)}
        if names != set(values):
            raise ValueError(f"must have the fields of a row, differs in {names ^ set(values)}")
        for field in fields(cls):
            if not _fits(values[field.name], field.type):
                raise ValueError(f"{field.name} is of another type, got {values[field.name]!r}")
        return cls(**values)


def read(path: str | os.PathLike[str]) -> list[Result]:
    """The rows of a file, or of the folder of a sweep, in their order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is no row; the message names file and line and what to do.
    """
    path = Path(path)
    if path.is_dir():
        path /= FILE
    if not path.is_file():
        raise FileNotFoundError(f"no results at {path}: name a sweep's folder or its {FILE}")
    rows = []
    # As bytes, because text also has line breaks that JSON allows inside strings.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line:
            continue
        try:
            rows.append(Result.from_json(line.decode()))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: {error}. If a sweep was cut off while it wrote this line, "
                "start it again and it mends the file; else remove the line"
            ) from None
    return rows


def append(path: str | os.PathLike[str], row: Result) -> None:
    """Adds a row to a file, which holds it when this returns."""
    with Path(path).open("a") as file:
        file.write(row.to_json() + "\n")
        file.flush()
        os.fsync(file.fileno())


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON has the type of a field."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, arguments[1]) for v in value.values())
    if kind is float:
        return type(value) in (int, float)
    return type(value) is (type(None) if kind is None else kind)
