"""The answer in a reply."""

import re

_END_OF_THOUGHT = "</think>"
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BARE = re.compile(r"[\w.,/+-]*\w")


def final_answer(reply: str) -> str | None:
    """What the last complete ``\\boxed{}`` holds, None if there is none or it is empty.

    Only what follows the end of the thought counts; a thought that was never closed is searched
    whole. A box that the end of the text cuts off does not count, an earlier one then does. Without
    a box there is no answer, whatever the words say: the prompts ask for one.
    """
    text = reply.rpartition(_END_OF_THOUGHT)[2]
    answer = None
    for start in _BOX.finditer(text):
        content = _content(text, start.end())
        if content is not None:
            answer = content.strip()
    return answer or None


def _content(text: str, start: int) -> str | None:
    if not text.startswith("{", start):
        bare = _BARE.match(text, start)
        return bare.group() if bare else None
    depth = 0
    position = start
    while position < len(text):
        character = text[position]
        if character == "\\":
            # An escaped brace is no brace.
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : position]
        position += 1
    return None
