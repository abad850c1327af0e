"""What a reader has to know of a policy, and the file of all of it, which is read without torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("entries.json")
"""Written by ``python -m bench.pages``."""
BUDGET = 256
"""Where defaults are told."""
HEAD_DIM = 128
"""Where the size of the query ring is told, in bfloat16."""


@dataclass(frozen=True)
class Option:
    """A field of a policy."""

    name: str
    type: str
    default: Any
    meaning: str


@dataclass(frozen=True)
class Entry:
    """A policy, or a modifier with what it adds to the policy before it."""

    name: str
    file: str
    summary: str
    papers: tuple[str, ...]
    evicts: bool
    phases: str
    """When it does."""
    needs: tuple[str, ...]
    """What it looks at beside keys and positions."""
    bytes_per_slot: int
    """State of each slot of a key/value head, beside key, value and position."""
    bytes_per_query_head: int
    """State of each query head of a layer that does not grow with the slots."""
    defaults: dict[str, int | bool]
    """What ``None`` means at :data:`BUDGET`, where it is not 0 (1 for ``interval``)."""
    options: tuple[Option, ...]
    deviations: str
    works_on: tuple[str, ...]
    """Of a modifier: the policies it may stand after."""

    @property
    def is_modifier(self) -> bool:
        """Whether it stands after another."""
        return bool(self.works_on)


def read() -> list[Entry]:
    """All policies, then all modifiers."""
    return [_entry(values) for values in json.loads(FILE.read_text(encoding="utf-8"))]


def text(entries: list[Entry]) -> str:
    """What the file holds."""
    return json.dumps([asdict(entry) for entry in entries], indent=1) + "\n"


def _entry(values: dict[str, Any]) -> Entry:
    options = tuple(Option(**option) for option in values.pop("options"))
    lists = {name: tuple(values[name]) for name in ("papers", "needs", "works_on")}
    found: dict[str, Any] = values | lists | {"options": options}
    return Entry(**found)
