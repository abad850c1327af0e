"""The catalogue as text for a terminal and as Markdown for the documentation."""

import textwrap
from collections.abc import Iterable, Sequence

from compressed_cache.eval.catalogue.entry import BUDGET, HEAD_DIM, Entry, Option
from compressed_cache.eval.catalogue.presses import KVPRESS, PressEquivalent
from compressed_cache.wording import markdown

_WIDTH = 100


def short(entry: Entry) -> str:
    """An entry in a few lines."""
    told = [_facts(entry)]
    if entry.papers:
        told.append(" ".join(entry.papers))
    return "\n".join([entry.name, *map(_indented, [_bare(entry.summary), *told])])


def full(entry: Entry) -> str:
    """All of an entry."""
    lines = [short(entry), _indented(entry.file)]
    for option in entry.options:
        lines.append(_indented(f"{_typed(option)}  {_bare(option.meaning)}", hang=4))
    if entry.works_on:
        lines.append(_indented(f"after {', '.join(entry.works_on)}"))
    if entry.deviations:
        lines.append(_indented(_bare(entry.deviations)))
    return "\n".join(lines)


def press(row: PressEquivalent) -> str:
    """A row of the table of presses."""
    here = f"CompressedCache({row.here}, budget=...)" if row.here else "not here"
    lines = [f"{row.name}({row.arguments})  [{row.origin}]", _indented(here)]
    return "\n".join([*lines, *([_indented(_bare(row.note))] if row.note else [])])


def tables(entries: Sequence[Entry]) -> str:
    """All of them: what they do, their options and their deviations."""
    policies = [entry for entry in entries if not entry.is_modifier]
    modifiers = [entry for entry in entries if entry.is_modifier]
    return "\n".join(
        [
            _policies(policies),
            "",
            "*Looks at*: beside keys and positions. *State*: beside key, value and position, in "
            "each slot of a key/value head, and where queries are looked at, in each layer for "
            f"each query head (of {HEAD_DIM} in bfloat16). *Defaults*: what `None` means for the "
            "arguments of `CompressedCache`, where it is not `interval=1`, `sinks=0`, `recent=0`, "
            "`protect_prompt=False`.",
            "",
            "## Modifiers",
            "",
            "Modifiers follow a policy, as in `h2o+caote`. What they look at and hold comes on top "
            "of what the policy does. *All*: every policy that evicts.",
            "",
            _modifiers(modifiers, [entry.name for entry in policies if entry.evicts]),
            "",
            "## Options",
            "",
            _options(entries),
            "",
            "## Where they differ from their papers",
            "",
            *(f"- `{e.name}`: {e.deviations}" for e in entries if e.deviations),
        ]
    )


def alone(entry: Entry) -> str:
    """The same of one policy or modifier."""
    row = _modifiers([entry]) if entry.is_modifier else _policies([entry])
    options = _options([entry]) if entry.options else ""
    return "\n\n".join(filter(None, [row, options, entry.deviations]))


def presses(rows: Sequence[PressEquivalent]) -> str:
    """The table of presses, and how budgets are told."""
    cells = [
        [
            f"`{row.name}`{f' ({row.origin})' * (row.origin != KVPRESS)}",
            f"`{row.arguments}`" if row.arguments else "-",
            f"`{row.here}`" if row.here else "not here",
            row.note or "-",
        ]
        for row in rows
    ]
    return "\n".join(
        [
            "What stands under *here* goes into `CompressedCache(..., budget=...)`, or into the "
            "arguments of `lm_eval` as `kv_press=snapkv,kv_window=64`. `compression_ratio=r` in "
            "place of `budget` is `budget=int(n * (1 - r))` of a prompt of `n` tokens, which also "
            "holds while decoding; `lm_eval` takes `kv_budget` alone. The `cache_budget` of the "
            "fork is `budget`. Policies rank at prefill and while "
            "decoding, so nothing wraps them for either; options are those of the press, with its "
            "defaults, and where its default does nothing (SimLayerKVPress, DuoAttentionPress, "
            "ThinKPress), ours.",
            "",
            _table(["press", "its arguments", "here", "note"], cells),
            "",
            "[ReasonAlloc](https://arxiv.org/abs/2606.11164) is out: it has no public code, and "
            "only its abstract could be read.",
        ]
    )


def _facts(entry: Entry) -> str:
    facts = [
        f"at {entry.phases}" if entry.evicts else entry.phases,
        f"looks at {_needs(entry)}",
        f"state {_state(entry)}",
        f"{_defaults(entry).replace('`', '')} at budget {BUDGET}" if entry.defaults else "",
    ]
    return "; ".join(filter(None, facts))


def _cells(entry: Entry) -> list[str]:
    papers = [f"[{url.split('/')[-1]}]({url})" for url in entry.papers]
    return [
        f"[`{entry.name}`]({entry.file})",
        entry.summary,
        ", ".join(papers) or "-",
        entry.phases,
        _needs(entry),
        _state(entry),
    ]


def _policies(entries: Iterable[Entry]) -> str:
    header = ("in one line", "paper", "evicts at", "looks at", "state", f"defaults at {BUDGET}")
    return _table(["policy", *header], [[*_cells(e), _defaults(e) or "-"] for e in entries])


def _modifiers(entries: Sequence[Entry], policies: Sequence[str] = ()) -> str:
    """Of ``policies``, those that a modifier does not follow are told where these are fewer."""
    header = ("in one line", "paper", "works at", "looks at", "state", "after")
    rows = [[*_cells(each), _behind(each, policies)] for each in entries]
    return _table(["modifier", *header], rows)


def _behind(entry: Entry, policies: Sequence[str]) -> str:
    others = [name for name in policies if name not in entry.works_on]
    if len(others) >= len(entry.works_on) or not policies:
        return _names(entry.works_on)
    return f"all but {_names(others)}" if others else "all"


def _options(entries: Iterable[Entry]) -> str:
    rows = [
        [f"`{entry.name}`", f"`{_typed(option)}`", option.meaning]
        for entry in entries
        for option in entry.options
    ]
    return _table(["of", "option", "meaning"], rows)


def _needs(entry: Entry) -> str:
    return ", ".join(entry.needs) or "nothing"


def _state(entry: Entry) -> str:
    if not entry.evicts:
        return "grows"
    parts = []
    if entry.bytes_per_slot:
        parts.append(f"{entry.bytes_per_slot} B per slot")
    if entry.bytes_per_query_head:
        parts.append(f"{entry.bytes_per_query_head / 1024:.1f} KiB per query head")
    return " + ".join(parts) or "none"


def _defaults(entry: Entry) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in entry.defaults.items())


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _typed(option: Option) -> str:
    return f"{option.name}: {option.type} = {option.default!r}"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    return markdown(header, [[cell.replace("|", r"\|") for cell in row] for row in rows])


def _bare(text: str) -> str:
    return text.replace("`", "")


def _indented(text: str, hang: int = 0) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=" " * 4,
        subsequent_indent=" " * (4 + hang),
        break_long_words=False,
        break_on_hyphens=False,
    )
