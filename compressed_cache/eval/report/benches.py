"""What the benchmarks of this project measured."""

from dataclasses import dataclass
from typing import Any

_RATES = {"model", "contender", "step", "budget", "prompt", "ms_per_token"} | {
    f"ratio{end}" for end in ("", "_low", "_high")
}
_PEAKS = {"cache", "budget", "tokens", "peak_mib", "seconds"}
_ROOM = {"model", "cache", "budget", "row_tokens", "row_bytes", "memory_bytes", "largest_batch"}
_FIELDS = {
    "tokens seen": _RATES,
    "budget": _RATES,
    "decode": _RATES | {"batch"},
    "policies": _RATES | {"batch"},
    "capacity": _ROOM,
    "chunks": _PEAKS,
    "prefill": _PEAKS,
}
"""What a row of each table that is shown must have."""


@dataclass(frozen=True)
class Bench:
    """All tables of one machine."""

    source: str
    hardware: str
    device: str
    tables: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, document: dict[str, Any], source: str) -> "Bench":
        """The tables of a file.

        Raises:
            KeyError: a row lacks what is shown of it.
        """
        bench = cls(source, *(document[key] for key in ("hardware", "device", "tables")))
        for table, fields in _FIELDS.items():
            for row in bench.rows(table):
                if missing := sorted(fields - row.keys()):
                    raise KeyError(f"{missing} in a row of {table!r}")
        return bench

    def rows(self, table: str) -> list[dict[str, Any]]:
        """The rows of a table."""
        return list(self.tables[table]["rows"].values()) if table in self.tables else []
