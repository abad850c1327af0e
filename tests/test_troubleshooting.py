"""The page of messages has those of the code, and the messages of some files all have a row."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
ROWS = re.findall(r"^\| `(.+?)` \|", PAGE, re.MULTILINE)
VALUE = "…"
# What someone meets who makes a cache and gives it to ``generate``.
COMPLETE = (
    "hf/checks.py",
    "hf/attention_hook.py",
    "policies/eviction_config.py",
    "drafting.py",
    "snapshot.py",
)


def _text(node: ast.AST) -> str:
    """A text of the source, with ``…`` for each value in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    return VALUE


def _texts(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr | ast.Constant):
            yield _text(node)


def _raised(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        call = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(call, ast.Call) and call.args and _text(call.args[0]) != VALUE:
            yield _text(call.args[0])


def _pattern(row: str) -> re.Pattern[str]:
    """A row's own ``…`` may be more than one value."""
    return re.compile(".*".join(map(re.escape, row.split(VALUE))), re.DOTALL)


FILES = [
    *(ROOT / "compressed_cache").rglob("*.py"),
    *(ROOT / "integrations").rglob("*.py"),
]
TEXTS = [text for path in FILES for text in _texts(path)]


@pytest.mark.parametrize("row", ROWS)
def test_a_message_of_the_page_is_one_of_the_code(row: str) -> None:
    assert any(_pattern(row).search(text) for text in TEXTS)


@pytest.mark.parametrize("name", COMPLETE)
def test_every_message_has_a_row(name: str) -> None:
    raised = list(_raised(ROOT / "compressed_cache" / name))
    assert raised
    for message in raised:
        assert any(_pattern(row).search(message) for row in ROWS), message
