"""Writes the tables of README.md and docs/ from results, docstrings and tests; none is typed.

It also writes the file that ``compressed-cache policies`` reads. What is measured comes
from these commands:

    compressed-cache demo --out bench/results
    python -m bench.catalogue
    python -m bench.harness
    pytest bench/ --benchmark-only
    python -m tests.features
    python -m bench.pages

Each part stands between ``<!-- name:begin -->`` and ``<!-- name:end -->``.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import markers
from bench import report as bench_report
from compressed_cache.eval.catalogue import entries, entry
from compressed_cache.eval.catalogue import page as catalogue
from compressed_cache.eval.catalogue.presses import PRESSES
from compressed_cache.eval.demo import report as demo_report
from compressed_cache.wording import markdown
from tests import families, features

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
COSTS = (
    "policy",
    "budget",
    "task",
    "accuracy",
    "answered",
    "truncated",
    "evicted",
    "tokens",
    "held",
    "MiB",
)


SUMMARY = {
    "full": "keeps everything",
    "h2o": "the tokens that received most attention",
    "snapkv": "what the last queries attend to",
    "random": "chance",
    "streaming_llm": "the first tokens and the newest",
}
PRESSES_OF_THE_README = (
    "SnapKVPress",
    "StreamingLLMPress",
    "AdaKVPress",
    "DecodingPress",
    "PrefillDecodingPress",
    "PerLayerCompressionPress",
)


def summary() -> str:
    """Five policies of the demo, without a protected prompt."""
    columns, found = _by_column(json.loads((RESULTS / "demo.json").read_text()))
    budgets = [column for column in columns if "prompt" not in column]
    rows = [
        [f"`{name}`", meaning, *(f"{row['accuracy']:.0%}" for row in found[name][: len(budgets)])]
        for name, meaning in SUMMARY.items()
    ]
    return markdown(["policy", "keeps", *(f"{budget} slots" for budget in budgets)], rows)


def kvpress() -> str:
    """Six presses and what to type here."""
    first = {press.name: press for press in reversed(PRESSES)}
    rows = [[f"`{name}`", f"`{first[name].here}`"] for name in PRESSES_OF_THE_README]
    return markdown(["press", "`CompressedCache(..., budget=...)`"], rows)


def demo() -> str:
    """Accuracy of the policies of the demo, then every number of it."""
    document = json.loads((RESULTS / "demo.json").read_text())
    columns, found = _by_column(document)
    rows = [[policy, *(f"{row['accuracy']:.0%}" for row in line)] for policy, line in found.items()]
    return "\n".join(
        [
            f"{demo_report.caption(document)}. The full cache ends with {_full_length(document)} "
            "tokens; *+ prompt* means `protect_prompt=True`.",
            "",
            markdown(["accuracy at budget", *columns], rows),
            "",
            "![Accuracy against budget](bench/results/demo.png)",
            "",
            _folded(
                "All numbers of the demo",
                markdown(demo_report.COLUMNS, [demo_report.cells(row) for row in document["rows"]]),
            ),
        ]
    )


def accuracy(path: Path = RESULTS / "catalogue.json") -> str:
    """Accuracy of every policy, and which of them do worse than chance."""
    if not path.exists():
        return "Not measured: `python -m bench.catalogue` fills this in."
    document = json.loads(path.read_text())
    columns, found = _by_column(document)
    chance = [row["accuracy"] for row in found["random"]]
    rows, worse = [], {}
    for policy, line in found.items():
        below = [bool(r) and r["accuracy"] < least for r, least in zip(line, chance, strict=True)]
        rows.append([f"`{policy}`", *map(_share, line, below)])
        worse[policy] = sum(below)
    del worse["full"], worse["random"]
    everywhere = [policy for policy, times in worse.items() if times == len(columns)]
    nowhere = [policy for policy, times in worse.items() if times == 0]
    return "\n".join(
        [
            f"{demo_report.caption(document)}. *Italic*: worse than `random` at the same budget "
            "with the same protection. -: refused there.",
            "",
            markdown(["accuracy at budget", *columns], rows),
            "",
            f"Worse than `random` in every column: {_names(everywhere)}. In none: "
            f"{_names(nowhere)}.",
        ]
    )


def _share(row: dict[str, Any], low: bool) -> str:
    mark = "*" if low else ""
    return f"{mark}{row['accuracy']:.0%}{mark}" if row else "-"


def _by_column(document: dict[str, Any]) -> tuple[list[str], dict[str, list[dict[str, Any]]]]:
    """Column titles, and the rows of each policy in their order, empty where there is none."""
    rows = document["rows"]
    columns = [
        (budget, protect)
        for protect in (False, True)
        for budget in dict.fromkeys(row["budget"] for row in rows if row["budget"] is not None)
    ]
    found = {(row["policy"], row["budget"], row["protect_prompt"]): row for row in rows}
    full = found["full", None, False]
    lines = {
        policy: [
            full if policy == "full" else found.get((policy, *column), {}) for column in columns
        ]
        for policy in dict.fromkeys(row["policy"] for row in rows)
    }
    return [f"{budget}{' + prompt' * protect}" for budget, protect in columns], lines


def _names(policies: list[str]) -> str:
    return ", ".join(f"`{policy}`" for policy in policies) or "no policy"


def policies() -> str:
    """What ``compressed-cache policies --markdown`` prints."""
    return catalogue.tables(entries.every())


def presses() -> str:
    """What ``compressed-cache presses --markdown`` prints."""
    return catalogue.presses(PRESSES)


def harness() -> str:
    """The shipped model in lm-evaluation-harness."""
    document = json.loads((RESULTS / "harness.json").read_text())
    rows = document["rows"]
    found = {(row["policy"], row["budget"], row["task"]): row for row in rows}
    budgets = [budget for budget in dict.fromkeys(row["budget"] for row in rows) if budget]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    cells = [(task, budget) for task in tasks for budget in budgets]
    lines = []
    for policy in dict.fromkeys(row["policy"] for row in rows):
        chosen = [
            found[policy, None if policy == "full" else budget, task] for task, budget in cells
        ]
        lines.append([policy, *map(_accuracy, chosen)])
    costs = [
        [
            *(row["policy"], str(row["budget"] or "-"), row["task"], _accuracy(row)),
            *(f"{row[name]:.0%}" for name in ("answered", "truncated", "evicted_share")),
            *(f"{row[name]:.0f}" for name in ("tokens", "held_tokens")),
            f"{row['cache_bytes'] / 2**20:.2f}",
        ]
        for row in rows
    ]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return "\n".join(
        [
            f"{rows[0]['documents']} held-out problems per task, greedy, batches of "
            f"{document['batch_size']}; accuracy with its 95% interval; {versions}, cpu.",
            "",
            markdown(["policy", *(f"{task} at {budget}" for task, budget in cells)], lines),
            "",
            _folded("What it cost", markdown(COSTS, costs)),
        ]
    )


def _folded(title: str, text: str) -> str:
    return f'<details markdown="1"><summary>{title}</summary>\n\n{text}\n\n</details>'


def _accuracy(row: dict[str, Any]) -> str:
    low, high = (100 * row[f"accuracy_{end}"] for end in ("low", "high"))
    return f"{row['accuracy']:.0%} [{low:.0f}, {high:.0f}]"


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"summary": summary, "kvpress": kvpress},
    "docs/shipped-model.md": {"demo": demo, "accuracy": accuracy, "harness": harness},
    "docs/policies.md": {"policies": policies},
    "docs/features.md": {"features": features.table},
    "docs/from-kvpress.md": {"presses": presses},
    "docs/models.md": {"families": families.table},
    "docs/speed.md": {
        "decode": bench_report.decode,
        "speeds": bench_report.policies,
        "seen": bench_report.tokens_seen,
        "budget": bench_report.budget,
        "prefill": bench_report.prefill,
        "chunks": bench_report.chunks,
        "capacity": bench_report.capacity,
        "growth": bench_report.growth,
        "lossless": bench_report.lossless,
    },
    "docs/compile.md": {"compile": bench_report.compilation},
    "docs/telemetry.md": {"telemetry": bench_report.telemetry},
}


def filled(page: str, text: str) -> str:
    """The text of a page with every part made anew."""
    for name, make in PAGES[page].items():
        text = markers.filled(text, name, _seen_from(page, make()))
    return text


def _seen_from(page: str, part: str) -> str:
    """Links from the root of the repository as links from the folder of the page."""
    up = "../" * page.count("/")
    return re.sub(r"\]\((?!\w+:|#)", f"]({up}", part)


def _full_length(document: dict[str, Any]) -> str:
    full = next(row for row in document["rows"] if row["budget"] is None)
    return f"{document['problems']['mean_prompt_tokens'] + full['mean_tokens']:.0f}"


def main(arguments: list[str] | None = None) -> None:
    """Rewrites the pages and draws what they show."""
    argparse.ArgumentParser(
        prog="python -m bench.pages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(arguments)
    bench_report.draw_peaks()
    entry.FILE.write_text(entry.text(entries.every()), encoding="utf-8")
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(page, path.read_text()))


if __name__ == "__main__":
    main()
