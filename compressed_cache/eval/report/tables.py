"""Tables that a page can sort."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any, Generic, TypeVar

MISSING = "–"  # noqa: RUF001
_SHORT, _LONG = 12, 40
"""Characters up to which words stay on a line, and from which they want a wide column."""
T = TypeVar("T")
Value = float | str | None


@dataclass(frozen=True)
class Column(Generic[T]):
    """What stands under one title."""

    title: str
    value: Callable[[T], Value]
    form: str = ""
    """How a number is written; empty: the column is of words."""
    mark: Callable[[T], str | None] = lambda row: None
    """A word added to a cell."""

    @property
    def is_number(self) -> bool:
        """Whether values are numbers."""
        return bool(self.form)


@dataclass(frozen=True)
class Cell:
    """One value as it is written and as it is sorted."""

    text: str
    is_number: bool
    key: str
    """Empty where there is no value, which is sorted last."""
    mark: str | None

    @property
    def kind(self) -> str:
        """What it is to the style sheet."""
        if self.is_number:
            return "number"
        if len(self.text) < _SHORT:
            return "word"
        return "words long" if len(self.text) > _LONG else "words"


@dataclass(frozen=True)
class Table:
    """Cells under titles."""

    caption: str
    titles: list[tuple[str, bool]]
    """Each with whether numbers stand below."""
    rows: list[list[Cell]]


def table(caption: str, columns: Sequence[Column[T]], rows: Iterable[T]) -> Table:
    """A table without the columns in which there is nothing."""
    rows = list(rows)
    cells = [[_cell(column, row) for row in rows] for column in columns]
    shown = [i for i, own in enumerate(cells) if any(cell.key for cell in own)]
    return Table(
        caption=caption,
        titles=[(columns[i].title, columns[i].is_number) for i in shown],
        rows=[list(row) for row in zip(*(cells[i] for i in shown), strict=True)],
    )


def field(
    name: str, title: str | None = None, form: str = "", scale: float | None = None
) -> Column[Any]:
    """A column of an attribute, or of a key of a dictionary; numbers in units of `scale`."""

    def value(row: Any) -> Value:
        found = row.get(name) if isinstance(row, dict) else getattr(row, name)
        return found / scale if scale and found is not None else found

    return Column(name.replace("_", " ") if title is None else title, value, form)


def _cell(column: Column[T], row: T) -> Cell:
    value = column.value(row)
    mark = column.mark(row)
    if value is None or value == "" or (isinstance(value, float) and isnan(value)):
        return Cell(MISSING, column.is_number, "", mark)
    text = format(value, column.form) if column.is_number else str(value)
    return Cell(text, column.is_number, str(value), mark)
