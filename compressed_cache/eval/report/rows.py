"""What policies reached on tasks, in one shape whatever file it comes from."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, TypeVar

from compressed_cache.eval.results.row import Agreement, Measured, Option, Result

_HARNESS = (
    *("task", "policy", "budget", "documents", "accuracy", "accuracy_low", "accuracy_high"),
    *("tokens", "truncated", "held_tokens", "cache_bytes"),
)
_RESULT = (*_HARNESS, "model", "seed", "evicted_tokens", "tokens_per_s")
SHIPPED = "shipped model"
PROTECT = "protect_prompt"
T = TypeVar("T", "Row", Agreement)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One policy at one budget on one task. None: the file does not say."""

    source: str
    """The name of the file."""
    model: str
    task: str
    policy: str
    budget: int | None
    """None: the full cache."""
    protect_prompt: bool | None = None
    options: dict[str, Option] = field(default_factory=dict)
    """All others of the policy and the rules."""
    given: dict[str, Option] | None = None
    """Those of them that were asked for."""
    seed: int | None = None
    documents: int
    accuracy: float
    accuracy_low: float
    """Lower end of the 95% interval."""
    accuracy_high: float
    tokens: float
    """Mean tokens to the answer."""
    truncated: float | None = None
    """Share of the replies that were cut off."""
    evicted_tokens: float | None = None
    """Mean per reply."""
    held_tokens: float | None = None
    """Mean per reply."""
    cache_bytes: float
    """Mean per reply."""
    tokens_per_s: float | None = None
    """Of all replies together."""
    acceptance_rate: float | None = None
    """Of drafted tokens, where a full cache verified them."""
    tokens_per_verification: float | None = None
    """Of one reply, by a call with the full cache."""

    @property
    def is_full(self) -> bool:
        """Whether the cache kept everything."""
        return self.budget is None

    @property
    def setting(self) -> tuple[int | None, bool | None]:
        """What a row shares with that of `random` which it is compared with."""
        return self.budget, self.protect_prompt


def of_demo(document: dict[str, Any], source: str) -> list[Row]:
    """The rows of a ``demo.json`` or a ``catalogue.json``."""
    problems = document["problems"]
    return [
        Row(
            source=source,
            model=SHIPPED,
            task=f"stories of {problems['steps']} steps",
            policy=row["policy"],
            budget=row["budget"],
            protect_prompt=row["protect_prompt"],
            documents=row["problems"],
            tokens=row["mean_tokens"],
            # The demo has the bytes of its whole batch.
            cache_bytes=row["cache_bytes"] / row["problems"],
            **_taken(row, "accuracy", "accuracy_low", "accuracy_high", "tokens_per_s"),
        )
        for row in document["rows"]
    ]


def of_result(result: Result, source: str) -> Row:
    """A row of a sweep."""
    options, given = dict(result.options), result.given
    drafts = result.drafts or {}
    return Row(
        source=source,
        protect_prompt=bool(options.pop(PROTECT, False)),
        options=options,
        given=given and {name: value for name, value in given.items() if name != PROTECT},
        acceptance_rate=drafts.get("acceptance_rate"),
        tokens_per_verification=drafts.get("tokens_per_verification"),
        **_taken(vars(result), *_RESULT),
    )


def of_harness(document: dict[str, Any], source: str) -> list[Row]:
    """The rows of a ``harness.json``."""
    return [Row(source=source, model=SHIPPED, **_taken(row, *_HARNESS)) for row in document["rows"]]


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that may be compared: of one model, on one task with as many documents."""
    found: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row.model, row.task, row.documents), []).append(row)
    return list(found.values())


def series(rows: Iterable[T]) -> dict[str, list[T]]:
    """Rows of each policy by budget, under its name and what was asked for where that tells them
    apart. Defaults, which may depend on the budget, tell nothing."""
    of_policy: dict[str, list[T]] = {}
    for row in rows:
        of_policy.setdefault(row.policy, []).append(row)
    found: dict[str, list[T]] = {}
    for policy, own in of_policy.items():
        asked = {id(row): _asked(row, own) for row in own}
        differing = list(_differing(asked.values()))
        for row in sorted(own, key=lambda row: row.budget or 0):
            own_options = asked[id(row)]
            told = ", ".join(f"{n}={own_options[n]}" for n in differing if n in own_options)
            found.setdefault(f"{policy} ({told})" if told else policy, []).append(row)
    return found


def with_prompt(lines: Mapping[str, Sequence[Row]], *, kept: bool) -> dict[str, list[Row]]:
    """Lines without the rows whose prompt is protected or is not; the full cache stays."""
    return {
        name: [row for row in rows if row.is_full or bool(row.protect_prompt) is kept]
        for name, rows in lines.items()
    }


def to_random(row: Row, rows: Iterable[Row]) -> float | None:
    """Accuracy of a row less that of `random` at the same setting, the mean of its seeds.

    None where `random` did not take that setting, for `random` itself and for the full cache, which
    has no budget to share.
    """
    random = [r.accuracy for r in rows if r.policy == "random" and r.setting == row.setting]
    if row.is_full or row.policy == "random" or not random:
        return None
    return row.accuracy - fmean(random)


def settled(row: Row | Measured) -> dict[str, Option]:
    """The options of a row, but for the seed of a policy that draws, which is that of the row."""
    return {k: v for k, v in row.options.items() if (k, v) != ("seed", row.seed)}


def _asked(row: Row | Agreement, others: Iterable[Row | Agreement]) -> Mapping[str, Option]:
    """What was asked for. Where a file does not say, the options that differ at one budget."""
    if row.given is not None:
        return row.given
    same = [settled(other) for other in others if other.budget == row.budget]
    own = settled(row)
    return {name: own.get(name) for name in _differing(same)}


def _taken(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names}


def _differing(options: Iterable[Mapping[str, Option]]) -> Iterator[str]:
    options = list(options)
    for name in dict.fromkeys(name for each in options for name in each):
        if len({each.get(name) for each in options}) > 1:
            yield name
