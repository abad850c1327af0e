"""How often policies say what the full cache says."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean

from compressed_cache.eval.report import figures
from compressed_cache.eval.report.parts import Part, told
from compressed_cache.eval.report.rows import PROTECT, series
from compressed_cache.eval.report.svg import Picture
from compressed_cache.eval.report.tables import Column, table
from compressed_cache.eval.report.tables import field as column
from compressed_cache.eval.results.row import Agreement

MIB = 2**20


def agreement(rows: Iterable[Agreement]) -> list[Part]:
    """A part for each model and task with as many documents."""
    groups: dict[tuple[str, str, int], list[Agreement]] = {}
    for row in rows:
        groups.setdefault((row.model, row.task, row.documents), []).append(row)
    return [_part(group) for group in groups.values()]


def _part(group: Sequence[Agreement]) -> Part:
    row = group[0]
    name = f"{row.task}, {row.model}, {row.documents} documents"
    columns: list[Column[Agreement]] = [
        Column("policy", lambda row: row.policy),
        column("budget", form=",d"),
        Column("prompt", lambda row: "kept" if row.options.get(PROTECT) else None),
        column("seed", form="d"),
        column("agreement", "agreement %", ".1f", 0.01),
        column("agreement_se", "± %", ".1f", 0.01),
        Column("to random, points", lambda row: _to_random(row, group), "+.1f"),
        column("divergence", "KL, nats", ".3f"),
        column("divergence_se", "± nats", ".3f"),
        column("lost", "lost, nats", ".3f"),
        column("first_difference", form=",.0f"),
        column("identical", "identical %", ".0f", 0.01),
        column("early_agreement", "early %", ".1f", 0.01),
        column("late_positions", form=",d"),
        column("late_documents", "late texts", ",d"),
        column("text_tokens", form=",.0f"),
        column("cache_bytes", "cache MiB", ",.2f", MIB),
        Column("options", lambda row: told(row.options)),
    ]
    return Part(name, "", list(_pictures(group)), [table(f"All rows: {name}", columns, group)])


def _pictures(group: Sequence[Agreement]) -> Iterator[Picture]:
    lines = series(row for row in group if row.agreement is not None)
    best_first = sorted(lines.items(), key=lambda line: -fmean(r.agreement or 0 for r in line[1]))
    for own in figures.panels(dict(best_first)) if lines else ():
        words = "; ".join(
            f"{name} at {row.budget}: {row.agreement:.1%}"
            for name, rows in own.items()
            for row in rows
        )
        yield Picture(figures.agreement(own), f"Agreement against budget. {words}")


def _to_random(row: Agreement, group: Iterable[Agreement]) -> float | None:
    """Points of agreement above `random` at the same budget, with the prompt as protected."""
    random = [
        other.agreement
        for other in group
        if other.policy == "random"
        and other.agreement is not None
        and other.budget == row.budget
        and other.options.get(PROTECT) == row.options.get(PROTECT)
    ]
    if row.policy == "random" or row.agreement is None or not random:
        return None
    return 100 * (row.agreement - fmean(random))
