"""Runs every press of kvpress beside its counterpart here and writes which positions both keep.

    python -m bench.conformance

Makes the environment of kvpress where it is missing, writes bench/results/conformance.json and the
tables of docs/conformance.md.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import kvpress
from bench.conformance import page, setting, undoing
from bench.conformance.agreement import Agreement, agreement, explain
from bench.conformance.here import Here
from bench.conformance.pairs import PAIRS, Pair
from bench.conformance.there import Refused, There, command

RESULTS = Path(__file__).resolve().parents[1] / "results" / "conformance.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compares all pairs, or some, and writes what it found."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.conformance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        metavar="TEXT",
        default="",
        help="pairs whose press or policy contains this; others keep the rows that --out has",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of all numbers")
    parser.add_argument("--page", type=Path, default=page.PAGE, help="the page of the tables")
    options = parser.parse_args(arguments)
    chosen = [pair for pair in PAIRS if options.only in pair.press + pair.here]
    if not chosen:
        parser.error(f"--only must be part of a pair, got {options.only!r}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        given = setting.make(Path(folder))
        with closing(There(command(kvpress.environment()), given)) as there:
            here = Here(given)
            rows = _known(options.out)
            for pair in chosen:
                rows[pair.press, pair.here] = found = compared(pair, here, there)
                print(f"{pair.press}: {_summary(found)}", flush=True)
            versions = there.versions
    ordered = [row for pair in PAIRS for row in rows.get((pair.press, pair.here), [])]
    document = {"versions": versions, "rows": ordered}
    lines = ",\n".join(json.dumps(row) for row in ordered)
    # A line for each row.
    options.out.write_text(f'{{"versions": {json.dumps(versions)},\n"rows": [\n{lines}\n]}}\n')
    options.page.write_text(page.filled(options.page.read_text(), document))


def compared(pair: Pair, here: Here, there: There) -> list[dict[str, Any]]:
    """A row for each case of a pair."""
    rows = []
    for case in [*setting.PREFILL_CASES, *setting.DECODING_CASES]:
        is_prompt = isinstance(case, setting.PrefillCase)
        row: dict[str, Any] = {
            "press": pair.press,
            "here": pair.here,
            "prompt": case.prompt,
            "ratio": getattr(case, "ratio", None),
            "interval": getattr(case, "interval", None),
            "as_is": None,
            "undone": None,
        }
        run = partial(_run, pair, case, here, there)
        names = undoing.PREFILL if is_prompt else undoing.DECODING
        try:
            found = explain(run, names)
        except Refused as error:
            row["causes"] = [f"refused there ({error})"]
        except (NotImplementedError, TypeError, ValueError) as error:
            row["causes"] = [f"refused here ({str(error).split('. ')[0]})"]
        else:
            row |= {"as_is": found.as_is._asdict(), "undone": found.undone._asdict()}
            row["causes"] = [undoing.CAUSES[name] for name in found.causes]
            if not found.undone.is_complete:
                why = pair.why if is_prompt else pair.why_decoding or pair.why
                row["causes"].append(why or "not explained")
        rows.append(row)
    return rows


def _known(path: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The rows of a file, by press and counterpart."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    if path.exists():
        for row in json.loads(path.read_text())["rows"]:
            rows.setdefault((row["press"], row["here"]), []).append(row)
    return rows


def _run(
    pair: Pair, case: setting.Case, here: Here, there: There, undone: tuple[str, ...]
) -> Agreement:
    theirs = there.kept(pair, case, undone)
    return agreement(here.kept(pair, case, undone), theirs)


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    ran = [row["undone"] for row in rows if row["undone"] is not None]
    equal, heads = (sum(one[name] for one in ran) for name in ("equal_heads", "heads"))
    return f"{equal} of {heads} heads once undone, {len(rows) - len(ran)} refused"


if __name__ == "__main__":
    main()
