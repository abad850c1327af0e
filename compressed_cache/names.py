"""What an error message says about a name it does not know."""

import difflib
from collections.abc import Iterable


def listing(names: Iterable[str]) -> str:
    """The names, quoted and sorted."""
    return ", ".join(repr(name) for name in sorted(names))


def nearest(name: str, names: Iterable[str]) -> str:
    """A further sentence that guesses what was meant, or nothing."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f". Did you mean {near[0]!r}?" if near else ""
