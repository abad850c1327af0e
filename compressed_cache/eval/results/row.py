"""One row of results, and files of them: a JSON object on each line."""

import json
import os
import typing
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self

from compressed_cache.wording import listing

FORMAT = 1
FILE = "results.jsonl"
"""The file of rows in the folder of a sweep."""

Option = int | float | bool | str | None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What every row has, whatever was measured."""

    measure: ClassVar[str]
    """What a sweep calls it."""

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
    cache_bytes: float
    """Per reply, the policy's state included."""
    seconds: float
    """For all of it."""
    versions: dict[str, str]
    """Of Python and the packages."""
    machine: dict[str, str | int]
    """The device, its architecture, threads of PyTorch and the model's dtype."""
    setting: str | None = None
    """Policy and options as the sweep called them, such as ``h2o:recent=16``. None: the row is of
    before there were settings."""
    given: dict[str, Option] | None = None
    """Those of the options that were asked for; the others are defaults, some of which depend on
    the budget. None: the row is of before this was kept."""

    @property
    def name(self) -> str:
        """What two rows of a task, a budget and a seed are told apart by."""
        return self.setting or self.policy

    @property
    def scores(self) -> dict[str, float]:
        """What two policies are compared by, 0 to 1, of each document by what identifies it."""
        raise NotImplementedError

    def to_json(self) -> str:
        """One line of JSON, without its end."""
        return json.dumps({"format": FORMAT, "measure": self.measure} | asdict(self))

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """The row with these values of its fields.

        Raises:
            ValueError: fields that are missing, unknown or of another type.
        """
        # Those of before there was such a field have what it is by default.
        later = {one.name: one.default for one in fields(cls) if one.default is not MISSING}
        values = later | values
        names = {field.name for field in fields(cls)}
        if names != set(values):
            raise ValueError(f"must have the fields of a row, differs in {names ^ set(values)}")
        for field in fields(cls):
            if not _fits(values[field.name], field.type):
                raise ValueError(f"{field.name} is of another type, got {values[field.name]!r}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Result(Measured):
    """What one policy reached on one task."""

    measure: ClassVar[str] = "accuracy"

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
    tokens_per_s: float
    """Generated tokens of all replies, by the seconds that took, prefill included."""
    correct: dict[str, float]
    """Score of each document, 0 to 1, by what identifies it."""
    metric: str = "accuracy,none"
    """What the harness calls the score: metric and filter."""
    drafts: dict[str, float | None] | None = None
    """What drafting brought, as ``DraftStatistics.to_json`` has it; None: nothing was drafted."""
    weights: str | None = None
    """Of the model's weights in its dtype: a digest. None: the row is of before this was kept."""

    @property
    def scores(self) -> dict[str, float]:
        """The score of each reply."""
        return self.correct


@dataclass(frozen=True, kw_only=True)
class Agreement(Measured):
    """What one policy would have said at each token of the full cache's texts.

    A position is late if prompt and text up to it are longer than the budget. Means are over
    documents, each of which counts the same, and so are their standard errors (``_se``; None for a
    single document). A mean over no position is None.
    """

    measure: ClassVar[str] = "agreement"

    weights: str
    """Of the model's weights in its dtype: a digest."""
    prompt_tokens: float
    """Per document."""
    text_tokens: float
    """Per document: positions that were compared."""
    late_documents: int
    """Those that have late positions."""
    late_positions: int
    """Of all documents together."""
    agreement: float | None
    """Share of the late positions whose most likely token is that of the full cache."""
    agreement_se: float | None
    divergence: float | None
    """Kullback-Leibler divergence of the full cache's distribution from the policy's, in nats."""
    divergence_se: float | None
    lost: float | None
    """Log-probability that the full cache's most likely token has lost, in nats."""
    lost_se: float | None
    early_agreement: float | None
    """The same over the positions that are not late, where only rounding differs unless a policy
    gives some layers or heads less than the budget."""
    early_divergence: float | None
    early_lost: float | None
    first_difference: float
    """Tokens before the first other most likely token; all of them where there is none."""
    first_difference_se: float | None
    identical: float
    """Share of the documents without any difference."""
    agreements: dict[str, float]
    """``agreement`` of each document that has late positions, by what identifies it."""

    @property
    def scores(self) -> dict[str, float]:
        """The agreement over late positions."""
        return self.agreements


Row = Result | Agreement
_KINDS: dict[str, type[Result] | type[Agreement]] = {
    kind.measure: kind for kind in (Result, Agreement)
}


def from_json(line: str) -> Row:
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
    # Rows of before there were others are of accuracy.
    measure = values.pop("measure", Result.measure)
    if measure not in _KINDS:
        raise ValueError(
            f"measure must be one of {listing(_KINDS)}, got {measure!r}. A newer compressed-cache "
            "wrote it: update"
        )
    return _KINDS[measure].of(values)


def read(path: str | os.PathLike[str]) -> list[Row]:
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
            rows.append(from_json(line.decode()))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: {error}. If a sweep was cut off while it wrote this line, "
                "start it again and it mends the file; else remove the line"
            ) from None
    return rows


def append(path: str | os.PathLike[str], row: Measured) -> None:
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
