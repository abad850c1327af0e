"""What people are shown: names in an error message, and tables in Markdown."""

import difflib
from collections.abc import Iterable


def listing(names: Iterable[str]) -> str:
    """The names, quoted and sorted."""
    return ", ".join(repr(name) for name in sorted(names))


def nearest(name: str, names: Iterable[str]) -> str:
    """A further sentence that guesses what was meant, or nothing."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f". Did you mean {near[0]!r}?" if near else ""


def shown(value: object) -> str:
    """A value with its type, as something else was expected."""
    return f"{value!r} ({type(value).__name__})"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
