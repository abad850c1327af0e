"""Accuracy of every policy, and of modifiers behind one, on the problems of the demo.

    python -m compressed_cache.bench.catalogue

Writes ``bench/results/catalogue.json``, of which the README makes a table.
"""

import argparse
import os
from pathlib import Path

from compressed_cache.demo import report
from compressed_cache.demo.measure import BUDGETS, Exam, Setting, rows, settings
from compressed_cache.policies import SLOTTED, make_policy

RESULTS = Path(__file__).resolve().parent / "results" / "catalogue.json"
COMBINATIONS = (
    "snapkv+adakv",
    "snapkv+criticalkv",
    "snapkv+chunkkv",
    "h2o+caote",
    "streaming_llm+key_rerotation",
    "h2o+merging",
    "h2o+think",
)


def measured() -> list[str]:
    """Every policy that keeps tokens in slots, then the combinations."""
    return [*SLOTTED, *COMBINATIONS]


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
    planned = [s for s in settings(measured(), list(BUDGETS)) if not _is_refused(s)]
    for row in rows(exam, planned, workers=options.workers, threads=threads):
        found.append(row)
        print(f"{len(found)}/{len(planned)} {row.policy} {row.budget} {row.accuracy:.0%}")
    document = report.document(exam, found, workers=options.workers, threads=threads)
    report.write_json(document, options.out)


def _is_refused(setting: Setting) -> bool:
    """Whether a layer has too few slots for a prompt: the last ones of ``pyramidkv`` do."""
    return setting.protect_prompt and make_policy(setting.policy).shares_budget


if __name__ == "__main__":
    main()
