"""Multiple choice."""

import re
from collections.abc import Callable, Sequence

from compressed_cache.tasks.scoring.plain import plain, unbracketed

_LEAD = re.compile(
    r"(?:it|that)\s+is\s+|(?:the\s+)?(?:(?:correct|final|right|best)\s+)?"
    r"(?:answer|option|choice|letter|label|number)\s*(?:is)?(?:[:\s]+|(?=\())",
    re.I,
)
_NAME = r"(?:[(\[{<]\s*([A-Za-z]|\d{1,2})\s*[)\]}>]|#?([A-Za-z]|\d{1,2})\)?)"
_LABEL = re.compile(rf"{_NAME}[.):,;!?]?")
_LABEL_AND_TEXT = re.compile(rf"{_NAME}(?:[.:,]|\s*[-\u2014=](?=\s)|(?=[\s(]))\s*(.+)", re.S)
_TEXT_AND_LABEL = re.compile(r"(.+?)(?:,\s*|\s+)\(?([A-Za-z]|\d{1,2})\)?", re.S)


def same_choice(answer: str, gold: int, labels: Sequence[str], texts: Sequence[str]) -> bool:
    """Whether an answer names one choice, and the right one.

    Args:
        answer: a label in any dress ("B", "(b)", "Option B."), a label with its own text
            ("B. bank"), or the text of one choice, with or without its article. Where labels are
            letters, a number counts from 1, and where they are numbers, a letter counts from A,
            unless it is a choice's text.
        gold: index of the right choice.
        labels: of the choices, "A", "B", ... or "1", "2", ...
        texts: of the choices.
    """
    return _picked(plain(answer), labels, texts) == gold


def _picked(answer: str, labels: Sequence[str], texts: Sequence[str]) -> int | None:
    # Up to "The answer is option number"; not if the lead is the choice's own text, as in "answer
    # questions".
    for _ in range(3):
        lead = _LEAD.match(answer)
        if lead is None or _matches(answer, texts, _without_article):
            break
        answer = answer[lead.end() :]
    label = _LABEL.fullmatch(answer)
    name = (label.group(1) or label.group(2)).upper() if label else ""
    if name in labels:
        return labels.index(name)
    same_text = _matches(answer, texts, _normal) or _matches(answer, texts, _without_article)
    if same_text:
        return same_text[0] if len(same_text) == 1 else None
    if label:
        return _counted(name, labels)
    return _labelled(answer, labels, texts)


def _labelled(answer: str, labels: Sequence[str], texts: Sequence[str]) -> int | None:
    """The choice of which an answer names both label and text."""
    parts: list[tuple[str, str]] = []
    if both := _LABEL_AND_TEXT.fullmatch(answer):
        parts.append((both.group(1) or both.group(2), both.group(3)))
    if both := _TEXT_AND_LABEL.fullmatch(answer):
        parts.append((both.group(2), both.group(1)))
    for name, text in parts:
        index = _picked(name, labels, texts)
        if index is not None and _without_article(text) == _without_article(texts[index]):
            return index
    return None


def _matches(answer: str, texts: Sequence[str], normal: Callable[[str], str]) -> list[int]:
    return [i for i, text in enumerate(texts) if normal(text) == normal(answer)]


def _counted(name: str, labels: Sequence[str]) -> int | None:
    if name.isdigit() == labels[0].isdigit():
        return None
    index = int(name) - 1 if name.isdigit() else ord(name) - ord("A")
    return index if 0 <= index < len(labels) else None


def _normal(text: str) -> str:
    text = unbracketed(plain(text).rstrip(".!?,;"))
    return " ".join(text.lower().rstrip(".!?,;").split())


def _without_article(text: str) -> str:
    return re.sub(r"^(?:an?|the) ", "", _normal(text))
