"""What was measured on one machine, kept in one file."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]


@dataclass
class Results:
    """All tables of one machine and device."""

    hardware: str
    device: str
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: ``conditions``, and ``rows`` by the test that measured each."""

    @classmethod
    def of(cls, hardware: str, device: str, folder: Path = FOLDER) -> "Results":
        """What is known of a machine so far."""
        path = folder / _name(hardware, device)
        return cls(**json.loads(path.read_text())) if path.exists() else cls(hardware, device)

    @classmethod
    def all(cls) -> list["Results"]:
        """Every machine, CPUs first."""
        found = [cls(**json.loads(path.read_text())) for path in sorted(FOLDER.glob("on-*.json"))]
        return sorted(found, key=lambda results: results.device)

    def add(self, table: str, rows: dict[str, Row], conditions: dict[str, Any]) -> None:
        """Puts rows in place of those of the same tests, or of all where conditions changed."""
        kept = self.tables.get(table)
        if kept is None or kept["conditions"] != conditions:
            kept = self.tables[table] = {"conditions": conditions, "rows": {}}
        kept["rows"].update(rows)

    def rows(self, table: str) -> list[Row]:
        """The rows of a table."""
        return list(self.tables[table]["rows"].values()) if table in self.tables else []

    def save(self, folder: Path = FOLDER) -> None:
        """Writes the file."""
        text = json.dumps(vars(self), indent=1)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _name(self.hardware, self.device)).write_text(text + "\n")

    def picture(self, name: str) -> Path:
        """Where a picture of this machine goes."""
        return (FOLDER / _name(self.hardware, self.device)).with_suffix(f".{name}.png")


def _name(hardware: str, device: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    return f"on-{device}-{slug}.json"
