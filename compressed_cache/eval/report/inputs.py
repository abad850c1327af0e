"""Files of results, told apart by what is in them."""

import json
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pyarrow import ArrowInvalid

from compressed_cache import telemetry
from compressed_cache.eval.report import rows, traces
from compressed_cache.eval.report.benches import Bench
from compressed_cache.eval.report.rows import Row
from compressed_cache.eval.report.traces import Losses, TraceFile
from compressed_cache.eval.results import row as results
from compressed_cache.eval.results.row import Agreement, Result
from compressed_cache.telemetry.trace import KEY, LOSSES, TOKENS

FORMAT = 1
EXPECTED = (
    "a sweep's folder or results.jsonl, an eviction trace or its losses, a timing, or a "
    "demo.json, catalogue.json, harness.json or on-*.json of this project"
)
_DEMO = {"versions", "machine", "problems", "rows"}
_HARNESS = {"versions", "machine", "batch_size", "rows"}
_BENCH = {"hardware", "device", "tables"}
_TIMING = {field.name for field in fields(telemetry.Timing) if field.default is MISSING}


@dataclass(frozen=True)
class Source:
    """A file as the summary has it."""

    name: str
    kind: str
    configuration: dict[str, Any]
    versions: dict[str, Any]


@dataclass(frozen=True)
class TimingFile:
    """How long the steps of one generation took."""

    source: str
    document: dict[str, Any]


@dataclass
class Inputs:
    """All that was read."""

    sources: list[Source] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    """Those of the rows that come from sweeps, with the score of each document."""
    agreements: list[Agreement] = field(default_factory=list)
    benches: list[Bench] = field(default_factory=list)
    timings: list[TimingFile] = field(default_factory=list)
    traces: list[TraceFile] = field(default_factory=list)
    losses: list[Losses] = field(default_factory=list)


def read(paths: Iterable[str], *, layers: list[int] | None = None) -> Inputs:
    """All of the files.

    Args:
        paths: files and folders, of which none is read twice.
        layers: of which traces are drawn; None: the first, the middle and the last.

    Raises:
        ValueError: a file that is not there, of something else or of a newer format; the message
            names it and what was expected.
    """
    inputs = Inputs()
    names = _names(list(dict.fromkeys(paths)))
    for path, name in names.items():
        try:
            _read(inputs, Path(path), name, layers)
        except OSError as error:
            raise ValueError(f"{path} must be readable, got: {error.strerror or error}") from None
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} must be complete, got one that lacks or misplaces {error}. Write it anew."
            ) from None
    return inputs


def _read(inputs: Inputs, path: Path, name: str, layers: list[int] | None) -> None:
    if path.is_dir():
        return _read_sweep(inputs, path, name)
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PAR1":
        return _read_parquet(inputs, path, name, layers)
    document = _document(path)
    if document is None or {"policy", "seed"} <= document.keys():
        return _read_sweep(inputs, path, name)
    _check_format(path, document.get("format", FORMAT))
    if document.keys() >= _DEMO:
        problems = document["problems"]
        configuration = problems | document["machine"]
        inputs.sources.append(Source(name, "demo", configuration, document["versions"]))
        inputs.rows += rows.of_demo(document, name)
    elif document.keys() >= _HARNESS:
        told = {key: document[key] for key in ("threads", "batch_size")}
        inputs.sources.append(
            Source(name, "evaluation", told | document["machine"], document["versions"])
        )
        inputs.rows += rows.of_harness(document, name)
    elif document.keys() >= _BENCH:
        bench = Bench.of(document, name)
        conditions = [dict(table["conditions"]) for table in bench.tables.values()]
        versions = [each.pop("versions") for each in conditions]
        told = {"hardware": bench.hardware, "device": bench.device} | _all(conditions)
        inputs.sources.append(Source(name, "benchmarks", told, _all(versions)))
        inputs.benches.append(bench)
    elif document.keys() >= _TIMING:
        inputs.sources.append(Source(name, "timing", {}, document.get("versions", {})))
        inputs.timings.append(TimingFile(name, document))
    else:
        raise _unexpected(path, f"JSON with {', '.join(map(repr, document)) or 'nothing'}")


def _read_sweep(inputs: Inputs, path: Path, name: str) -> None:
    found = results.read(path)
    if not found:
        raise ValueError(f"{path} must hold at least one finished row, got none")
    machine = _all(result.machine for result in found)
    versions = _all(result.versions for result in found)
    inputs.sources.append(Source(name, "sweep", machine, versions))
    accuracies = [row for row in found if isinstance(row, Result)]
    inputs.results += accuracies
    inputs.rows += [rows.of_result(result, name) for result in accuracies]
    inputs.agreements += [row for row in found if isinstance(row, Agreement)]


def _read_parquet(inputs: Inputs, path: Path, name: str, layers: list[int] | None) -> None:
    try:
        schema = pq.read_schema(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path} must be a whole Parquet file, got: {error}") from None
    about = json.loads((schema.metadata or {}).get(KEY, b"{}"))
    columns = set(schema.names)
    if not about or not (columns >= TOKENS.keys() or columns >= LOSSES.keys()):
        raise _unexpected(path, f"Parquet with {', '.join(map(repr, schema.names))}")
    _check_format(path, about.get("format", FORMAT))
    told = {key: value for key, value in about.items() if key not in ("format", "versions")}
    kind = "eviction trace" if columns >= TOKENS.keys() else "losses of attention"
    inputs.sources.append(Source(name, kind, told, about.get("versions", {})))
    if columns >= TOKENS.keys():
        inputs.traces.append(traces.read_trace(str(path), name, about, layers))
    elif losses := traces.read_losses(str(path), name, about):
        inputs.losses.append(losses)


def _document(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file is; None: one such object in each line."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise _unexpected(path, "neither text nor Parquet") from None
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise _unexpected(path, f"no JSON ({error})") from None
    if not isinstance(document, dict):
        raise _unexpected(path, f"JSON of type {type(document).__name__}")
    return document


def _check_format(path: Path, found: Any) -> None:
    if str(found) != str(FORMAT):
        raise ValueError(
            f"{path} must have format {FORMAT}, got {found}. Install a newer version of this "
            "package, which reads it."
        )


def _unexpected(path: Path, found: str) -> ValueError:
    return ValueError(f"{path} must be {EXPECTED}, got {found}")


def _all(dictionaries: Iterable[dict[str, Any]]) -> dict[str, list[Any]]:
    """Every value that each key has in any of them."""
    found: dict[str, list[Any]] = {}
    for key, value in chain.from_iterable(each.items() for each in dictionaries):
        if value not in found.setdefault(key, []):
            found[key].append(value)
    return found


def _names(paths: list[str]) -> dict[str, str]:
    """As much of each path's end as tells all apart."""
    parts = {path: Path(path).absolute().parts for path in paths}
    count = 1
    while len({own[-count:] for own in parts.values()}) < len({*parts.values()}):
        count += 1
    return {path: "/".join(own[-count:]) for path, own in parts.items()}
