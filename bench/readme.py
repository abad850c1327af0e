"""Writes the tables of the README from results and docstrings, so that none is typed.

    python -m compressed_cache demo --out bench/results
    python -m compressed_cache.bench.harness
    pytest bench/ --benchmark-only
    python -m compressed_cache.bench.readme

Each part stands between ``<!-- name:begin -->`` and ``<!-- name:end -->``.
"""

import dataclasses
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressed_cache.bench import report as bench_report
from compressed_cache.bench.markdown import markdown
from compressed_cache.demo import report as demo_report
from compressed_cache.policies import POLICIES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
EXAMPLE_BUDGET = 256
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


def demo() -> str:
    """Accuracy of every policy, then every number of the demo."""
    document = json.loads((RESULTS / "demo.json").read_text())
    rows = document["rows"]
    columns = [
        (budget, protect)
        for protect in (False, True)
        for budget in dict.fromkeys(row["budget"] for row in rows if row["budget"] is not None)
    ]
    found = {(row["policy"], row["budget"], row["protect_prompt"]): row for row in rows}
    full = next(row for row in rows if row["budget"] is None)
    accuracy = [["full", *[f"{full['accuracy']:.0%}"] * len(columns)]]
    for policy in dict.fromkeys(row["policy"] for row in rows if row["budget"] is not None):
        accuracy.append([policy, *(f"{found[policy, *c]['accuracy']:.0%}" for c in columns)])
    header = ["accuracy at budget", *(f"{b}{' + prompt' * p}" for b, p in columns)]
    return "\n".join(
        [
            f"{demo_report.caption(document)}. The full cache ends with {_full_length(document)} "
            "tokens; *+ prompt* means `protect_prompt=True`.",
            "",
            markdown(header, accuracy),
            "",
            "![Accuracy against budget](bench/results/demo.png)",
            "",
            "<details><summary>All numbers of the demo</summary>",
            "",
            markdown(demo_report.COLUMNS, [demo_report.cells(row) for row in rows]),
            "",
            "</details>",
        ]
    )


def policies() -> str:
    """Every policy with its source, defaults, options and deviations, from its docstring."""
    rows = []
    for name, policy in POLICIES.items():
        text = inspect.getdoc(policy) or ""
        first, *rest = text.split("\n\n")
        body = " ".join(" ".join(rest).split())
        links = [f"[{url.split('/')[-1]}]({url})" for url in re.findall(r"https://[^\s),]+", body)]
        differs = re.search(r"Differs .*", body)
        defaults = policy().defaults(EXAMPLE_BUDGET)._asdict()
        changed = [f"`{key}={value}`" for key, value in defaults.items() if key != "protect_prompt"]
        options = [f"`{field.name}={field.default!r}`" for field in dataclasses.fields(policy)]
        rows.append(
            [
                f"[`{name}`](compressed_cache/policies/{name}.py)",
                " ".join(first.replace("``", "`").split()),
                ", ".join(links) or "-",
                ", ".join(changed) if policy.evicts else "-",
                ", ".join(options) or "-",
                differs.group().replace("``", "`") if differs else "-",
            ]
        )
    header = ("policy", "in one line", "paper", f"defaults at budget {EXAMPLE_BUDGET}", "options")
    return markdown((*header, "deviations"), rows)


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
            "<details><summary>What it cost</summary>",
            "",
            markdown(COSTS, costs),
            "",
            "</details>",
        ]
    )


def _accuracy(row: dict[str, Any]) -> str:
    low, high = (100 * row[f"accuracy_{end}"] for end in ("low", "high"))
    return f"{row['accuracy']:.0%} [{low:.0f}, {high:.0f}]"


PARTS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "policies": policies,
    "harness": harness,
    "decode": bench_report.decode,
    "seen": bench_report.tokens_seen,
    "budget": bench_report.budget,
    "prefill": bench_report.prefill,
    "chunks": bench_report.chunks,
    "capacity": bench_report.capacity,
    "compile": bench_report.compilation,
}


def filled(text: str) -> str:
    """The README with every part made anew."""
    for name, make in PARTS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n{make()}\n{end}{after}"
    return text


def _full_length(document: dict[str, Any]) -> str:
    full = next(row for row in document["rows"] if row["budget"] is None)
    return f"{document['problems']['mean_prompt_tokens'] + full['mean_tokens']:.0f}"


def main() -> None:
    """Rewrites README.md and draws what it shows."""
    bench_report.draw_peaks()
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
