"""Every policy of some sweeps beside the full cache and `random`, on the same documents."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from compressed_cache.eval.report.parts import Part, told
from compressed_cache.eval.report.rows import PROTECT, settled
from compressed_cache.eval.report.tables import Column, table
from compressed_cache.eval.results.comparison import Comparison, compare
from compressed_cache.eval.results.row import Measured, Option


@dataclass(frozen=True)
class Beside:
    """A policy with options of its own, and how it compares."""

    setting: str
    options: dict[str, Option]
    against: str
    found: Comparison


def comparison(
    results: Sequence[Measured], title: str = "Policies beside full and random"
) -> list[Part]:
    """All that can be compared, of rows of one measure, and why the rest cannot."""
    found: list[Beside] = []
    refused: list[str] = []
    of_setting: dict[tuple[str, str], list[Measured]] = {}
    for row in results:
        setting = row.name, json.dumps(settled(row), sort_keys=True)
        of_setting.setdefault(setting, []).append(row)
    for (name, _), own in of_setting.items():
        options = settled(own[0])
        for against, others in _others(own[0].policy, options, results).items():
            try:
                compared = compare([*own, *others], name, against)
            except ValueError as error:
                refused.append(str(error))
                continue
            found += [Beside(name, options, against, one) for one in compared]
    text = f"Not compared: {'; '.join(dict.fromkeys(refused))}" if refused else ""
    tables = [table(title, _COLUMNS, found)] if found else []
    return [Part(title, text, tables=tables)] if found or refused else []


def _others(
    policy: str, options: dict[str, Option], results: Sequence[Measured]
) -> dict[str, list[Measured]]:
    """Rows of the full cache, and of `random` with the prompt as protected, if there are any."""
    if policy == "full":
        return {}
    found: dict[str, list[Measured]] = {}
    for row in results:
        is_full = row.policy == "full" and row.scores
        is_random = row.policy == "random" != policy
        if is_full or (is_random and row.options.get(PROTECT) == options.get(PROTECT)):
            found.setdefault(row.name, []).append(row)
    return found


_COLUMNS: list[Column[Beside]] = [
    Column("policy", lambda each: each.setting),
    Column("task", lambda each: each.found.task),
    Column("model", lambda each: each.found.model),
    Column("budget", lambda each: each.found.budget, ",d"),
    Column("against", lambda each: each.against),
    Column("difference, points", lambda each: 100 * each.found.difference, "+.1f"),
    Column("95% low", lambda each: 100 * each.found.difference_low, "+.1f"),
    Column("95% high", lambda each: 100 * each.found.difference_high, "+.1f"),
    Column("p", lambda each: each.found.p, ".2g"),
    Column("only this", lambda each: each.found.better[0], ",d"),
    Column("only the other", lambda each: each.found.better[1], ",d"),
    Column("documents", lambda each: each.found.documents, ",d"),
    Column("seeds", lambda each: each.found.seeds, "d"),
    Column("options", lambda each: told(each.options)),
]
