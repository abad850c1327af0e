"""The tables of ``docs/conformance.md``."""

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from bench import markers
from bench.conformance.agreement import Agreement
from bench.conformance.pairs import UNCOMPARED
from compressed_cache.wording import markdown

PAGE = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"
Row = dict[str, Any]


def filled(text: str, document: dict[str, Any]) -> str:
    """The page with its tables made anew."""
    return markers.filled(text, "conformance", tables(document))


def tables(document: dict[str, Any]) -> str:
    """A table of prompts, one of decoding, and what is in neither.

    Args:
        document: what the command has written.
    """
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    prefill = [row for row in document["rows"] if row["interval"] is None]
    decoding = [row for row in document["rows"] if row["interval"] is not None]
    return "\n".join(
        [
            f"{versions}.",
            "",
            "### Prompts",
            "",
            _table(prefill),
            "",
            "### Decoding",
            "",
            _table(decoding),
            "",
            "### Not compared",
            "",
            *(f"- `{press}`: {why}." for press, why in UNCOMPARED.items()),
        ]
    )


def _table(rows: Sequence[Row]) -> str:
    """A line for each pair, with a column for each interval; below, those that never ran."""
    intervals = list(dict.fromkeys(row["interval"] for row in rows))
    pairs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        pairs.setdefault((row["press"], row["here"]), []).append(row)
    lines, refused = [], []
    for (press, here), found in pairs.items():
        causes = "; ".join(dict.fromkeys(cause for row in found for cause in row["causes"]))
        if all(row["as_is"] is None for row in found):
            refused.append(f"- `{press}`, here `{here}`: {causes}.")
            continue
        cells = [_cell([row for row in found if row["interval"] == n]) for n in intervals]
        lines.append([f"`{press}`", f"`{here}`", *cells, causes or "-"])
    columns = ["equal heads" if n is None else f"cut every {n}" for n in intervals]
    return "\n".join([markdown(["press", "here", *columns, "causes"], lines), "", *refused])


def _cell(rows: Sequence[Row]) -> str:
    """What agrees as it is, and where that is another number, once causes are undone."""
    ran = [row for row in rows if row["as_is"] is not None]
    if not ran:
        return "refused"
    as_is, undone = (
        reduce(Agreement.plus, [Agreement(**row[name]) for row in ran])
        for name in ("as_is", "undone")
    )
    return _counted(as_is) if undone == as_is else f"{_counted(as_is)} → {_counted(undone)}"


def _counted(agreement: Agreement) -> str:
    counts = f"{agreement.equal_heads:,} of {agreement.heads:,}"
    if agreement.is_complete:
        return f"**{counts}**"
    # Rounded down: what is not all is never 100%.
    share = 100 * agreement.equal_positions // agreement.positions
    return f"{counts} ({share}% of positions)"
