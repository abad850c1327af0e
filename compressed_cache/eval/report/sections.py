"""What a page says about its inputs: only sections for which there is data."""

from collections.abc import Iterable
from dataclasses import dataclass

from compressed_cache.eval.report import attention, costs, quality
from compressed_cache.eval.report.agreement import agreement
from compressed_cache.eval.report.comparison import comparison
from compressed_cache.eval.report.inputs import Inputs
from compressed_cache.eval.report.parts import Part
from compressed_cache.eval.report.rows import groups, to_random


@dataclass(frozen=True)
class Section:
    """Parts under one heading."""

    name: str
    title: str
    text: str
    parts: list[Part]


def sections(inputs: Inputs) -> list[Section]:
    """All sections, in the order of the page."""
    tasks = groups(inputs.rows)
    every = [
        Section(
            "accuracy",
            "Accuracy against budget",
            "Bars are 95% intervals. Lines join the means of each budget; the full cache is the "
            "dashed line, its interval the shade around it.",
            [quality.accuracy(group) for group in tasks],
        ),
        Section(
            "agreement",
            "Agreement with the full cache",
            "Policies read texts of the full cache: the share of late positions (prompt and text "
            "so far are longer than the budget) at which their most likely token is the full "
            "cache's. KL: divergence from the distribution of the full cache; lost: the "
            "log-probability that its most likely token has lost. Means and standard errors are "
            "over documents.",
            agreement(inputs.agreements),
        ),
        Section(
            "comparison",
            "Paired comparison",
            "The same documents under two policies. The interval is a bootstrap over documents, p "
            "is McNemar's exact test (with agreement a sign test over documents), not corrected "
            "for the number of comparisons.",
            [
                *comparison(inputs.results),
                *comparison(inputs.agreements, "Agreement of policies beside random"),
            ],
        ),
        Section(
            "tokens",
            "Tokens to answer",
            "A policy that loses the thread writes longer, until it is cut off, or gives up early.",
            [quality.tokens(group) for group in tasks],
        ),
        Section(
            "speed",
            "Speed",
            "",
            [
                *(part for bench in inputs.benches for part in costs.speed(bench)),
                *costs.timings(inputs.timings),
            ],
        ),
        Section(
            "memory",
            "Memory",
            "",
            [part for bench in inputs.benches for part in costs.memory(bench)],
        ),
        Section(
            "retention",
            "What is held",
            "Positions run to the right, decode steps downwards. Blue: held; grey: evicted; right "
            "of the dotted line: generated.",
            [attention.retention(trace) for trace in inputs.traces],
        ),
        Section(
            "lost",
            "Attention lost",
            "The share of each step's attention that a full cache would have given to tokens that "
            "are not held.",
            attention.lost(inputs.losses),
        ),
    ]
    return [section for section in every if section.parts]


def summary(inputs: Inputs) -> list[tuple[str, str]]:
    """What was measured, in a few words each."""
    rows = [*inputs.rows, *inputs.agreements]
    about = [each.about for each in (*inputs.traces, *inputs.losses)]
    measured = [
        row for bench in inputs.benches for name in bench.tables for row in bench.rows(name)
    ]
    models = [*(row.model for row in rows), *(a.get("model") for a in about)]
    policies = [*(row.policy for row in rows), *(a.get("policy") for a in about)]
    found = (to_random(row, group) for group in groups(inputs.rows) for row in group)
    differences = [difference for difference in found if difference is not None]
    below = sum(difference < 0 for difference in differences)
    facts = [
        ("models", _listed([*models, *(row.get("model") for row in measured)])),
        ("tasks (documents)", _listed(f"{row.task} ({row.documents})" for row in rows)),
        ("policies", _listed(policies)),
        ("below random", f"{below} of {len(differences)} rows" if differences else ""),
    ]
    return [(name, text) for name, text in facts if text]


def _listed(names: Iterable[str | None]) -> str:
    return ", ".join(dict.fromkeys(name for name in names if name))
