"""Multiple choice."""

import re
from collections.abc import Sequence

from compressed_cache.tasks.scoring.plain import plain

_LEAD = re.compile(
    r"^(?:the\s+)?(?:(?:correct|final|right)\s+)?(?:answer|option|choice)\s*(?:is)?[:\s]+", re.I
)
_LABEL = re.compile(r"\(?([A-Za-z]|\d{1,2})\)?[.):]?")
_LABEL_AND_TEXT = re.compile(
    r"(?:\(([A-Za-z]|\d{1,2})\)|([A-Za-z]|\d{1,2})(?:[.):]|\s+-|(?=\s)))\s*(.+)", re.S
)


def same_choice(answer: str, gold: int, labels: Sequence[str], texts: Sequence[str]) -> bool:
    """Whether an answer names one choice, and the right one.

    Args:
        answer: a label in any dress ("B", "(b)", "Option B."), a label with its own text
            ("B. bank"), or the text of one choice. Where labels are letters, a number counts from
            1, and where they are numbers, a letter counts from A, unless it is a choice's text.
        gold: index of the right choice.
        labels: of the choices, "A", "B", ... or "1", "2", ...
        texts: of the choices.
    """
    return _picked(plain(answer), labels, texts) == gold


def _picked(answer: str, labels: Sequence[str], texts: Sequence[str]) -> int | None:
    # Not if the lead is the choice's own text, as in "answer questions".
    if all(_normal(text) != _normal(answer) for text in texts):
        answer = _LEAD.sub("", answer)
    label = _LABEL.fullmatch(answer)
    if label and label.group(1).upper() in labels:
        return labels.index(label.group(1).upper())
    same_text = [i for i, text in enumerate(texts) if _normal(text) == _normal(answer)]
    if same_text:
        return same_text[0] if len(same_text) == 1 else None
    if label:
        return _counted(label.group(1), labels)
    both = _LABEL_AND_TEXT.fullmatch(answer)
    if both is None:
        return None
    index = _picked(both.group(1) or both.group(2), labels, texts)
    own = index is not None and _normal(both.group(3)) == _normal(texts[index])
    return index if own else None


def _counted(name: str, labels: Sequence[str]) -> int | None:
    if name.isdigit() == labels[0].isdigit():
        return None
    index = int(name) - 1 if name.isdigit() else ord(name.upper()) - ord("A")
    return index if 0 <= index < len(labels) else None


def _normal(text: str) -> str:
    return " ".join(plain(text).lower().rstrip(".!?,;").split())
