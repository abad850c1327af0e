"""Pieces of a page."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compressed_cache.eval.report import figures
from compressed_cache.eval.report.figures import Curve
from compressed_cache.eval.report.svg import Picture
from compressed_cache.eval.report.tables import Table


@dataclass(frozen=True)
class Part:
    """Pictures and tables that belong together."""

    title: str
    text: str = ""
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def drawn(lines: Mapping[str, Curve], words: str, **axes: Any) -> list[Picture]:
    """Pictures of as many lines as can be told apart in each."""
    return [
        Picture(
            figures.curves(part, **axes),
            f"{words}. "
            + "; ".join(f"{name}: {c.y[0]:.3g} to {c.y[-1]:.3g}" for name, c in part.items()),
        )
        for part in figures.panels(lines)
    ]


def told(values: dict[str, Any]) -> str:
    """Settings in one line, without those that are empty."""
    said = {key.replace("_", " "): _plain(value) for key, value in values.items() if value != {}}
    return ", ".join(f"{key} {value}" for key, value in said.items())


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return f"({told(value)})"
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
