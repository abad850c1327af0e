"""An answer without the LaTeX that only dresses it."""

import re

_DRESS = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mathtt"
    r"|mbox|emph|underline|boldsymbol|bm|operatorname)\s*\{([^{}]*)\}"
)
_REPLACED = (
    (r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\!|\\displaystyle(?![a-zA-Z])", ""),
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~|\u00a0|\u202f", " "),
    (r"(?<!\\)\\([$%#&{}_])", r"\1"),
    (r"\{,\}", ","),
    (r"\^\s*\{?\\circ\}?", "°"),
    (r"\u2212|\u2013", "-"),
    (r"\s+", " "),
)
_FENCES = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"))


def plain(answer: str) -> str:
    """The words or the formula itself: font commands, math fences, quotes, a final stop removed."""
    previous = None
    while previous != answer:
        previous, answer = answer, _DRESS.sub(r"\1", answer)
    previous = None
    while previous != answer:
        previous, answer = answer, _unfenced(answer.strip(" \n\t\"'`*\u201c\u201d\u2018\u2019"))
    for pattern, replacement in _REPLACED:
        answer = re.sub(pattern, replacement, answer)
    return answer.strip().rstrip(".").strip()


def _unfenced(answer: str) -> str:
    for opening, closing in _FENCES:
        longest = len(opening) + len(closing)
        if answer.startswith(opening) and answer.endswith(closing) and len(answer) > longest:
            inner = answer[len(opening) : -len(closing)]
            # "$5 or $6$" is no formula between fences.
            if opening not in inner.replace("\\$", ""):
                return inner
    return answer
