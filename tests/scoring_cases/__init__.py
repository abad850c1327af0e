"""Hand-made answers, each with what it is worth: one table per kind of answer.

The texts are what models write between the braces of a box.
"""

from typing import Any, NamedTuple


class Answers(NamedTuple):
    """Right and wrong answers to one question."""

    gold: Any
    """What the grader knows of the question."""
    right: list[str]
    wrong: list[str]
