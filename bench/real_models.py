"""Agreement and accuracy of policies on a language model that others trained.

    python -m bench.real_models run --model FOLDER --data ROWS --budgets 80,120 --out results05
    python -m bench.real_models run --measure accuracy --model FOLDER ... --out accuracy05
    python -m bench.real_models page

``run`` is ``compressed-cache agree``, or ``compressed-cache sweep`` for accuracy, of all policies
that need no statistics of the model, and can be stopped and gone on with. It adds its rows to those
in ``bench/results``, of which ``page`` makes ``docs/results.md``. Rows 0 to 49 of a task are for
choosing defaults (``bench.variants``), those from 50 on for the page.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from bench.every_policy import EVERY, UNTRAINED
from bench.results_page import RESULTS, write
from compressed_cache.__main__ import main as command
from compressed_cache.calibration.statistics import STATISTICS
from compressed_cache.eval.results.row import FILE, Agreement, Result, Row, read
from compressed_cache.policies import split_name


def main(arguments: list[str] | None = None) -> int:
    """Runs one of the two commands."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.real_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measures, or goes on where it was")
    run.add_argument(
        "--measure", choices=[Agreement.measure, Result.measure], default=Agreement.measure
    )
    run.add_argument("--model", required=True)
    run.add_argument("--data", required=True, help="a folder of local rows, gsm8k.jsonl and so on")
    run.add_argument("--task", default="reasoning_gsm8k")
    run.add_argument("--rows", default="50:100")
    run.add_argument("--budgets", default="48,80,120,168")
    run.add_argument("--policies", default=",".join(policies()))
    run.add_argument("--max-new-tokens", default="256")
    run.add_argument("--batch-size", default="50")
    run.add_argument("--policy-args", default="", help="as of agree, e.g. protect_prompt=true")
    run.add_argument(
        "--dtype", default="bfloat16", help="float32 where the processor multiplies no bfloat16"
    )
    run.add_argument("--processes", default="1")
    run.add_argument("--out", type=Path, required=True, help="the folder of agree or sweep")
    commands.add_parser("page", help="writes docs/results.md")
    options = parser.parse_args(arguments)
    if options.command == "page":
        write()
        return 0
    status = command(
        [
            *_command(options),
            *("--model", options.model, "--dtype", options.dtype, "--chat"),
            *("--metadata", json.dumps({"data_dir": options.data, "rows": options.rows})),
            *("--budgets", options.budgets, "--batch-size", options.batch_size),
            *(("--policy-args", options.policy_args) if options.policy_args else ()),
            *("--processes", options.processes, "--out", str(options.out)),
        ]
    )
    if status != 2:
        _keep(options.out, options.measure, options.rows)
    return status


def _command(options: argparse.Namespace) -> list[str]:
    """What the two commands call by other names."""
    most, policies = options.max_new_tokens, options.policies
    if options.measure == Agreement.measure:
        given = ["--task", options.task, "--policies", policies, "--max-new-tokens", most]
        return ["agree", *given]
    # Which agree reads in any case.
    named = dict.fromkeys(["full", *policies.split(",")])
    given = ["--tasks", options.task, "--policies", ",".join(named)]
    return ["sweep", *given, "--gen-kwargs", f"max_gen_toks={most}"]


def policies() -> list[str]:
    """Those that need nothing that was collected or trained for a model."""
    return [
        name
        for name in EVERY
        if name not in UNTRAINED
        and not any(
            part in STATISTICS and part != "expected_attention"
            for parts in split_name(name)
            for part in parts
        )
    ]


def _keep(folder: Path, measure: str, rows: str) -> None:
    """Adds the rows to those of this model, with its name in place of its folder."""
    if not (folder / FILE).exists():
        return
    found = [row for row in read(folder) if row.measure == measure]
    if not found:
        return
    named = [dataclasses.replace(row, model=Path(row.model).name) for row in found]
    one = named[0]
    name = f"{one.model}-{one.task}-{rows.replace(':', '-')}-{folder.name}.jsonl"
    path = RESULTS / measure / name
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = read(path) if path.exists() else []
    path.write_text("".join(row.to_json() + "\n" for row in extended(earlier, named)))


def extended(earlier: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """The rows of earlier runs, those measured again in place, and what is new.

    Raises:
        ValueError: they are of other texts.
    """
    texts = {_texts(row) for row in (*earlier, *new)}
    if len(texts) > 1:
        raise ValueError(
            f"rows must be of the same texts, got {sorted(texts, key=str)}. Use another --out"
        )
    return list({_cell(row): row for row in (*earlier, *new)}.values())


def _texts(row: Row) -> tuple[object, ...]:
    if isinstance(row, Agreement):
        return row.weights, row.documents, row.text_tokens
    return row.weights, *sorted(row.scores)


def _cell(row: Row) -> str:
    return json.dumps([row.policy, row.budget, row.seed, row.given, row.setting])


if __name__ == "__main__":
    raise SystemExit(main())
