"""What the docstring of a policy and those of its fields say."""

import ast
import inspect
import re
import textwrap
from typing import NamedTuple


class Text(NamedTuple):
    """The parts of a docstring, in Markdown on one line each."""

    summary: str
    papers: tuple[str, ...]
    """Addresses, in the order they are named."""
    deviations: str
    """From the word "Differs" to the end."""


def text_of(kind: type) -> Text:
    """The docstring of a class by its parts."""
    first, *rest = (inspect.getdoc(kind) or "").split("\n\n")
    body = " ".join(rest)
    papers = [url.rstrip(".;:") for url in re.findall(r"https://[^\s),]+", body)]
    differs = re.search(r"\bDiffers .*", body, re.DOTALL)
    return Text(_plain(first), tuple(dict.fromkeys(papers)), _plain(differs[0]) if differs else "")


def fields_of(kind: type) -> dict[str, tuple[str, str]]:
    """Annotation and docstring of each field, those of its bases first."""
    found: dict[str, tuple[str, str]] = {}
    for owner in reversed(kind.__mro__[:-1]):
        body = _definition(owner).body
        for line, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                found[line.target.id] = ast.unparse(line.annotation), _string(after)
    return found


def _definition(kind: type) -> ast.ClassDef:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    return definition


def _string(line: ast.stmt | None) -> str:
    if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
        return _plain(str(line.value.value))
    return ""


def _plain(text: str) -> str:
    """Without roles, in single backticks, on one line."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    return " ".join(text.replace("``", "`").split())
