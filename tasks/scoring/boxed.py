"""The answer in a reply."""

import re

_END_OF_THOUGHT = "</think>"
# An escaped brace is no brace.
_MARK = re.compile(r"\\+(?:boxed|fbox)(?![a-zA-Z])\s*(?P<box>\{?)|\\.|[{}]", re.S)
# No words: "in \boxed as asked" holds no answer.
_BARE = re.compile(r"[+-]?(?:[\d.][\d.,/]*)?\d|[A-Z](?!\w)")


def final_answer(reply: str) -> str | None:
    """What the last complete ``\\boxed{}`` holds, None if there is none or it is empty.

    Only what follows the end of the thought counts; a thought that was never closed is searched
    whole. A box that the end of the text cuts off does not count, an earlier one then does. Without
    a box there is no answer, whatever the words say: the prompts ask for one.
    """
    text = reply.rpartition(_END_OF_THOUGHT)[2]
    last, answer = -1, None
    # Where the boxes that are open begin, None for other braces. One pass: a reply that loops may
    # open thousands.
    opened: list[int | None] = []
    for mark in _MARK.finditer(text):
        start, content = None, ""
        if mark.group() == "}":
            start = opened.pop() if opened else None
            content = text[start : mark.start()] if start is not None else ""
        elif mark.group() == "{":
            opened.append(None)
        elif mark["box"]:
            opened.append(mark.end())
        elif mark["box"] is not None and (bare := _BARE.match(text, mark.end())):
            start, content = bare.start(), bare.group()
        if start is not None and start > last:
            last, answer = start, content.strip()
    return answer or None
