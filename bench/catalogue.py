"""Accuracy of every policy, and of modifiers after one, on the problems of the demo.

    python -m bench.catalogue

Writes ``bench/results/catalogue.json``, of which ``docs/shipped-model.md`` has a table.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from bench.every_policy import EVERY, UNTRAINED
from compressed_cache.cache import CompressedCache
from compressed_cache.eval.demo import report
from compressed_cache.eval.demo.measure import BUDGETS, Exam, Refusal, Row, Setting, rows, settings
from compressed_cache.policies.capabilities import SharesBudget, find

RESULTS = Path(__file__).resolve().parent / "results" / "catalogue.json"


def main(arguments: list[str] | None = None) -> None:
    """Takes all rows, or those that a file of the same conditions lacks, and writes them."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.catalogue",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--problems", type=int, default=40, help="held-out problems per row")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--missing", action="store_true", help="keep the rows that --out has")
    options = parser.parse_args(arguments)
    exam = Exam(problems=options.problems, seed=0)
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    document = partial(report.document, exam, workers=options.workers, threads=threads)
    names = [name for name in EVERY if name not in UNTRAINED]
    planned = [s for s in settings(names, list(BUDGETS)) if not _is_refused(s)]
    found = _known(options.out, document([])) if options.missing else {}
    missing = [setting for setting in planned if setting not in found]
    measured = rows(exam, missing, workers=options.workers, threads=threads)
    for number, (setting, row) in enumerate(zip(missing, measured, strict=True), start=1):
        if isinstance(row, Refusal):
            print(f"{number}/{len(missing)} {setting}: {row.why}")
            continue
        found[setting] = row
        print(f"{number}/{len(missing)} {setting}: {row.accuracy:.0%}")
    kept = [found[setting] for setting in planned if setting in found]
    report.write_json(document(kept), options.out)


def _known(path: Path, conditions: dict[str, Any]) -> dict[Setting, Row]:
    """The rows of a file, if they were taken under the same conditions."""
    if not path.exists():
        return {}
    kept = json.loads(path.read_text())
    taken = [Row(**row) for row in kept.pop("rows")]
    if kept != {name: part for name, part in conditions.items() if name != "rows"}:
        return {}
    return {Setting(row.policy, row.budget, row.protect_prompt): row for row in taken}


def _is_refused(setting: Setting) -> bool:
    """Whether the cache refuses a setting at once, or the last layers of ``pyramidkv`` or the
    streaming heads of ``duo_attention`` have too few slots for a prompt."""
    try:
        cache = CompressedCache(
            setting.policy, setting.budget or 1, protect_prompt=setting.protect_prompt
        )
    except ValueError:
        return True
    return setting.protect_prompt and find(cache.policy, SharesBudget) is not None


if __name__ == "__main__":
    main()
