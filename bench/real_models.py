"""Agreement of every policy on a language model that others trained.

    python -m bench.real_models run --model FOLDER --data ROWS --budgets 80,120 --out results05
    python -m bench.real_models page

``run`` is ``compressed-cache agree`` for all policies, with options that need no
statistics of the model, and can be stopped and gone on with. It adds its rows to those in
``bench/results/agreement``, of which ``page`` makes ``docs/results.md``. Rows 0 to 49 of a task are
for choosing defaults (``bench.variants``), those from 50 on for the page.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from bench.every_policy import EVERY, UNTRAINED
from bench.results_page import FOLDER, agreements, write
from compressed_cache.__main__ import main as command
from compressed_cache.calibration.statistics import STATISTICS
from compressed_cache.eval.results.row import FILE, Agreement
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
    run.add_argument("--out", type=Path, required=True, help="the folder of agree")
    commands.add_parser("page", help="writes docs/results.md")
    options = parser.parse_args(arguments)
    if options.command == "page":
        write()
        return 0
    status = command(
        [
            "agree",
            *("--model", options.model, "--dtype", options.dtype, "--chat"),
            *("--task", options.task),
            *("--metadata", json.dumps({"data_dir": options.data, "rows": options.rows})),
            *("--policies", options.policies, "--budgets", options.budgets),
            *(("--policy-args", options.policy_args) if options.policy_args else ()),
            *("--max-new-tokens", options.max_new_tokens, "--batch-size", options.batch_size),
            *("--processes", options.processes, "--out", str(options.out)),
        ]
    )
    if status != 2:
        _keep(options.out, options.rows)
    return status


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


def _keep(folder: Path, rows: str) -> None:
    """Adds the rows to those of this model, with its name in place of its folder."""
    if not (folder / FILE).exists():
        return
    found = agreements(folder)
    if not found:
        return
    named = [dataclasses.replace(row, model=Path(row.model).name) for row in found]
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{named[0].model}-{named[0].task}-{rows.replace(':', '-')}-{folder.name}.jsonl"
    earlier = agreements(path) if path.exists() else []
    path.write_text("".join(row.to_json() + "\n" for row in extended(earlier, named)))


def extended(earlier: Sequence[Agreement], new: Sequence[Agreement]) -> list[Agreement]:
    """The rows of earlier runs, those measured again in place, and what is new.

    Raises:
        ValueError: they are of other texts.
    """
    texts = {(row.weights, row.documents, row.text_tokens) for row in (*earlier, *new)}
    if len(texts) > 1:
        raise ValueError(f"rows must be of the same texts, got {sorted(texts)}. Use another --out")
    return list({_cell(row): row for row in (*earlier, *new)}.values())


def _cell(row: Agreement) -> str:
    return json.dumps([row.policy, row.budget, row.seed, row.given, row.setting])


if __name__ == "__main__":
    raise SystemExit(main())
