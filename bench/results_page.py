"""``docs/results.md``: what each policy is worth on models that others trained."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import answers, markers
from compressed_cache.eval.results.row import Agreement, Result, read
from compressed_cache.wording import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
FOLDER = RESULTS / Agreement.measure
ACCURACY = RESULTS / Result.measure
LOOKUPS = RESULTS / "lookups.jsonl"
DRAFTS = RESULTS / "drafts.jsonl"
DRAFT_FAMILIES = RESULTS / "draft-families.jsonl"
SHIPPED = RESULTS / "shipped.jsonl"
HARNESS = RESULTS / "harness.json"
VARIANTS = RESULTS / "variants.json"
PAGE = ROOT / "docs" / "results.md"
_SHOWN = ("interval", "sinks", "recent")


def write() -> None:
    """Fills in the tables."""
    PAGE.write_text(filled(PAGE.read_text()))


def filled(text: str) -> str:
    """The page with its tables as they are to be."""
    for name, table in (
        ("agreement", agreement(FOLDER)),
        ("accuracy", answers.accuracy(ACCURACY)),
        (
            "ranking",
            answers.ranking(_agreed([SHIPPED, *FOLDER.glob("*.jsonl")]), _right(HARNESS)),
        ),
        ("lookups", lookups(LOOKUPS)),
        ("drafts", drafts(DRAFTS)),
        ("draft-families", draft_families(DRAFT_FAMILIES)),
        ("variants", variants(VARIANTS)),
    ):
        text = markers.filled(text, name, table)
    return text


def agreement(folder: Path) -> str:
    """A table for each file of rows: policies by what they reach at the smallest budget."""
    tables = []
    for path in sorted(folder.glob("*.jsonl")):
        rows = agreements(path)
        tables.append(_table(rows))
    return "\n\n".join(tables) or "Not measured."


def agreements(path: Path) -> list[Agreement]:
    """The rows of agreement in a file or in the folder of a sweep."""
    return [row for row in read(path) if isinstance(row, Agreement)]


def _table(rows: Sequence[Agreement]) -> str:
    budgets = sorted({row.budget for row in rows if row.budget is not None})
    found = {(row.policy, row.budget): row for row in rows}
    one = rows[0]
    late = {row.budget: row.late_positions for row in rows}
    caption = (
        f"**{one.model}** (weights {one.weights}), {one.task}, {one.documents} texts of "
        f"{one.text_tokens:.0f} tokens after prompts of {one.prompt_tokens:.0f}; "
        f"{answers.conditions(one)}. Late positions: "
        + ", ".join(f"{late[budget]:,} at {budget}" for budget in budgets)
        + ". Read again, the full cache agrees with itself at "
        + " to ".join(sorted({f"{x.early_agreement:.1%}" for x in rows if x.policy == "full"}))
        + "."
    )
    policies = list(dict.fromkeys(row.policy for row in rows if row.budget is not None))
    policies.sort(key=lambda name: -_of(found.get((name, budgets[0]))))
    header = ["policy"]
    for budget in budgets:
        header += [f"{budget}: agreement %", "KL, nats", "to random"]
    header.append("options")
    lines = []
    for name in policies:
        cells = [f"`{name}`"]
        for budget in budgets:
            cells += _cells(found.get((name, budget)), found.get(("random", budget)))
        own = next(row for row in rows if row.policy == name and row.budget is not None)
        cells.append(_told(own.options))
        lines.append(cells)
    return caption + "\n\n" + markdown(header, lines)


def _cells(row: Agreement | None, random: Agreement | None) -> list[str]:
    if row is None:
        return ["not measured", "", ""]
    if row.agreement is None or row.agreement_se is None:
        return ["nothing evicted", "", ""]
    against = ""
    if random is not None and random.agreement is not None and row is not random:
        against = f"{100 * (row.agreement - random.agreement):+.1f}"
    return [_mean(row.agreement, row.agreement_se), f"{row.divergence:.3f}", against]


def _mean(share: float, error: float) -> str:
    """In percent, with its standard error."""
    return f"{100 * share:.1f} ± {100 * error:.1f}"


def _of(row: Agreement | None) -> float:
    return -1.0 if row is None or row.agreement is None else row.agreement


def _told(options: Any) -> str:
    """The arguments of the cache that policies differ in."""
    told = [f"`{name}={options[name]}`" for name in _SHOWN if options.get(name)]
    return ", ".join([*told, *(["prompt kept"] if options.get("protect_prompt") else [])])


def lookups(path: Path) -> str:
    """A table for each model and length: policies by what they find once the text is compressed."""
    tables: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in read_lines(path):
        tables.setdefault((row["model"], row["weights"], row["length"]), []).append(row)
    return "\n\n".join(map(_found, tables.values())) or "Not measured."


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of ``bench.lookups`` or ``bench.drafts`` so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _found(rows: list[dict[str, Any]]) -> str:
    one = rows[0]
    shares = {(row["policy"], row["budget"], row["asked"]): row for row in rows}
    budgets = sorted({row["budget"] for row in rows if row["budget"] is not None})
    ways = [(budget, asked) for budget in budgets for asked in ("after", "with")]
    policies = list(dict.fromkeys(row["policy"] for row in rows))

    def share(policy: str, budget: int, asked: str) -> float:
        row = shares.get((policy, None if policy == "full" else budget, asked))
        return -1.0 if row is None else row["right"] / row["questions"]

    policies.sort(key=lambda name: [-share(name, *way) for way in ways])
    header = ["policy", *(f"{budget} slots, asked {asked}, %" for budget, asked in ways)]
    lines = []
    for name in policies:
        cells = []
        for way in ways:
            found = share(name, *way)
            cells.append("-" if found < 0 else f"{100 * found:.0f}")
        lines.append([f"`{name}`", *cells])
    asked = {row["asked"]: row["questions"] for row in rows}
    caption = (
        f"**{one['model']}** (weights {one['weights']}), texts of {one['tokens']:,.0f} tokens; "
        f"{asked.get('after', 0)} questions after the text and {asked.get('with', 0)} with it; "
        f"torch {one['torch']}."
    )
    return caption + "\n\n" + markdown(header, lines)


def drafts(path: Path) -> str:
    """A row for each policy that drafted, by model and budget."""
    rows = read_lines(path)
    rows.sort(key=lambda row: (row["model"], row["endless"], row["budget"], -row["acceptance"]))
    header = [
        *("model", "policy", "slots", "texts", "batch", "tokens of a text", "accepted %"),
        *("tokens per verification", "texts unchanged"),
    ]
    lines = [
        [
            f"{row['model']}{', endless' if row['endless'] else ''}",
            f"`{row['policy']}`" + (f", `refresh={row['refresh']}`" if row["refresh"] else ""),
            f"{row['budget']:,}",
            str(row["texts"]),
            str(row["batch"]),
            f"{row['tokens'] / row['texts']:,.0f}",
            f"{100 * row['acceptance']:.1f}",
            f"{row['per_verification']:.2f} of {row['drafts'] + 1}",
            f"{row['same']} of {row['texts']}"
            + (f" (gap {row['gap']:.1g})" if row["same"] < row["texts"] else ""),
        ]
        for row in rows
    ]
    return markdown(header, lines) if rows else "Not measured."


def draft_families(path: Path) -> str:
    """How many texts stayed the same, which did not, and who was refused."""
    rows = read_lines(path)
    if not rows:
        return "Not measured."
    served = [row for row in rows if not row["refusal"]]
    texts, same = (sum(row[name] for row in served) for name in ("batch", "same"))
    families = {row["family"] for row in served}
    refused = [row["family"] for row in rows if row["refusal"] and row["batch"] == 1]
    others = [
        f"{row['family']} at batch {row['batch']}: {row['same']} of {row['batch']}"
        for row in served
        if row["same"] < row["batch"]
    ]
    one = rows[0]
    sentences = [
        f"`{one['policy']}` with {one['budget']} slots, {one['tokens']} tokens of each text, torch "
        f"{one['torch']}: {same:,} of {texts:,} texts of {len(families)} families are unchanged",
        f"({'; '.join(others)})." if others else "at batch 1 and 8.",
        *([f"Refused: {', '.join(refused)}."] if refused else []),
    ]
    return " ".join(sentences)


def _agreed(paths: Iterable[Path]) -> dict[answers.Cell, float]:
    return {
        (row.model, row.task, row.budget, row.name): row.agreement
        for path in paths
        for row in agreements(path)
        if row.budget is not None and row.agreement is not None
    }


def _right(harness: Path) -> dict[answers.Cell, float]:
    """Accuracies of the shipped model and of those that others trained."""
    rows = json.loads(harness.read_text())["rows"]
    found = {("shipped", x["task"], x["budget"], x["policy"]): x["accuracy"] for x in rows}
    for path in ACCURACY.glob("*.jsonl"):
        for row in answers.answers(path):
            if row.budget is not None:
                found[row.model, row.task, row.budget, row.name] = row.accuracy
    return found


def variants(path: Path) -> str:
    """A table of the options of one policy."""
    if not path.exists():
        return "Not measured."
    found = json.loads(path.read_text())
    budgets = sorted({row["budget"] for row in found["rows"]})
    by_options: dict[str, dict[int, Any]] = {}
    for row in found["rows"]:
        name = ", ".join(f"`{key}={value}`" for key, value in row["options"].items())
        by_options.setdefault(name or "as it is", {})[row["budget"]] = row
    header = ["options"]
    for budget in budgets:
        header += [f"{budget}: agreement %", "KL, nats"]
    lines = []
    for name, own in by_options.items():
        cells = [name]
        for budget in budgets:
            row = own[budget]
            if "error" in row:
                cells += ["refused", ""]
            else:
                mean = _mean(row["agreement"], row["agreement_se"])
                cells += [mean, f"{row['divergence']:.3f}"]
        lines.append(cells)
    return (
        f"**{found['model']}** (weights {found['weights']}), `{found['policy']}`, "
        f"{found['rows'][0]['documents']} texts.\n\n" + markdown(header, lines)
    )
