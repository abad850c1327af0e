"""What people are shown: names in an error message, and tables in Markdown."""

import difflib
from collections.abc import Iterable
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


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


def missing(package: str | None, extra: str) -> str:
    """That a package is missing, and the command that brings it with the others of its extra."""
    # By its name pip finds an installed package, whose extras it knows, but not a checkout.
    is_checkout = (_ROOT / "pyproject.toml").exists()
    source = f"-e '{_ROOT}[{extra}]'" if is_checkout else f"'compressed-cache[{extra}]'"
    return f"{package} is missing: pip install {source}"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
