"""Accuracy of every policy, and of modifiers behind one, on the problems of the demo.

    python -m compressed_cache.bench.catalogue

Writes ``bench/results/catalogue.json``, of which the README makes a table.
"""

import argparse
import os
from pathlib import Path

from compressed_cache.bench.every_policy import EVERY
from compressed_cache.cache import CompressedCache
from compressed_cache.demo import report
from compressed_cache.demo.measure import BUDGETS, Exam, Setting, rows, settings

RESULTS = Path(__file__).resolve().parent / "results" / "catalogue.json"


def main(arguments: list[str] | None = None) -> None:
    """Takes all rows and writes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=40, help="held-out problems per row")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    exam = Exam(problems=options.problems, seed=0)
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    found = []
    planned = [s for s in settings(list(EVERY), list(BUDGETS)) if not _is_refused(s)]
    for row in rows(exam, planned, workers=options.workers, threads=threads):
        found.append(row)
        print(f"{len(found)}/{len(planned)} {row.policy} {row.budget} {row.accuracy:.0%}")
    document = report.document(exam, found, workers=options.workers, threads=threads)
    report.write_json(document, options.out)


def _is_refused(setting: Setting) -> bool:
    """Whether the cache refuses a setting at once, or the last layers of ``pyramidkv`` or the
    streaming heads of ``duo_attention`` have too few slots for a prompt."""
    try:
        cache = CompressedCache(
            setting.policy, setting.budget or 1, protect_prompt=setting.protect_prompt
        )
    except ValueError:
        return True
    return setting.protect_prompt and cache.policy.shares_budget


if __name__ == "__main__":
    main()
