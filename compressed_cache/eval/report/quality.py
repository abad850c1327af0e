"""What policies reach on tasks: accuracy and tokens to answer."""

from collections.abc import Callable, Iterator, Sequence
from statistics import fmean

from matplotlib.figure import Figure

from compressed_cache.eval.report import figures
from compressed_cache.eval.report.figures import Series
from compressed_cache.eval.report.parts import Part, told
from compressed_cache.eval.report.rows import Row, series, to_random, with_prompt
from compressed_cache.eval.report.svg import Picture
from compressed_cache.eval.report.tables import Column, table
from compressed_cache.eval.report.tables import field as column

MIB = 2**20


def accuracy(group: Sequence[Row]) -> Part:
    """Accuracy against budget, and all numbers there are."""
    differences = {id(row): to_random(row, group) for row in group}

    def below(row: Row) -> str | None:
        return "below random" if (differences[id(row)] or 0) < 0 else None

    columns: list[Column[Row]] = [
        Column("policy", lambda row: row.policy, mark=below),
        column("budget", form=",d"),
        Column("prompt", lambda row: "kept" if row.protect_prompt else None),
        column("seed", form="d"),
        column("accuracy", "accuracy %", ".1f", 0.01),
        column("accuracy_low", "95% low", ".1f", 0.01),
        column("accuracy_high", "95% high", ".1f", 0.01),
        Column("to random, points", lambda row: _points(differences[id(row)]), "+.1f"),
        column("tokens", form=",.0f"),
        column("truncated", "truncated %", ".1f", 0.01),
        column("evicted_tokens", form=",.0f"),
        column("held_tokens", form=",.0f"),
        column("cache_bytes", "cache MiB", ",.2f", MIB),
        column("tokens_per_s", "tokens/s", ",.0f"),
        column("acceptance_rate", "drafts accepted %", ".1f", 0.01),
        column("tokens_per_verification", "tokens per verification", ".2f"),
        Column("options", lambda row: told(row.options)),
    ]
    if len({row.source for row in group}) > 1:
        columns.append(column("source", "file"))
    return Part(
        _name(group),
        "Cache: mean per reply. To random: at its budget, with its protection of the prompt.",
        list(_against_budget(group, figures.accuracy, lambda row: f"{row.accuracy:.0%}")),
        [table(f"All rows: {_name(group)}", columns, group)],
    )


def _points(difference: float | None) -> float | None:
    return None if difference is None else 100 * difference


def tokens(group: Sequence[Row]) -> Part:
    """Tokens to answer against budget."""
    return Part(
        _name(group),
        pictures=list(_against_budget(group, figures.tokens, lambda row: f"{row.tokens:.0f}")),
    )


def _against_budget(
    group: Sequence[Row], draw: Callable[[Series], Figure], value: Callable[[Row], str]
) -> Iterator[Picture]:
    """Pictures of a group, the best first, those with a protected prompt beside the others."""
    best_first = sorted(series(group).items(), key=lambda line: -fmean(r.accuracy for r in line[1]))
    kinds = sorted({bool(row.protect_prompt) for row in group if not row.is_full}) or [False]
    for lines in figures.panels(dict(best_first)):
        for kept in kinds:
            own = with_prompt(lines, kept=kept)
            title = f"prompt {'' if kept else 'not '}protected" if len(kinds) > 1 else ""
            words = "; ".join(
                f"{name}{'' if row.is_full else f' at {row.budget}'}: {value(row)}"
                for name, rows in own.items()
                for row in rows
            )
            words = f"{draw.__name__} against budget, {title}. {words}".replace(", .", ".")
            yield Picture(draw(own), words.capitalize(), title)


def _name(group: Sequence[Row]) -> str:
    return f"{group[0].task}, {group[0].model}, {group[0].documents} documents"
