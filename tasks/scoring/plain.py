"""An answer without the LaTeX that only dresses it."""

import re
import unicodedata

_DRESS = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mathtt"
    r"|mbox|emph|underline|boldsymbol|bm|operatorname|(?:text)?color\{\w+\})\s*\{([^{}]*)\}"
)
_REPLACED = (
    (r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\displaystyle(?![a-zA-Z])|\u200b", ""),
    (r"\\(?:bf|rm|it|sf|tt)(?![a-zA-Z])|\\phantom\{[^{}]*\}|\\\\$", ""),
    (r"\{,\}(?:\\!)?|,\\!\s*", ","),
    (r"\\!", ""),
    (r"\{?(?<!\\)\\[,;: ]\}?|\\q?quad(?![a-zA-Z])|\\space(?![a-zA-Z])|\\hspace\*?\{[^{}]*\}", " "),
    (r"[~\u00a0\u2009\u202f]", " "),
    (r"(?<!\\)\\([$%#&_])", r"\1"),
    (r"\^\s*\{?\\circ\}?", "°"),
    (r"frac\s*\\pi\s*(\d)", r"frac{\\pi}{\1}"),
    (r"\u2212|\u2013", "-"),
    (r"\s+", " "),
)
_SUPERSCRIPTS = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", "0123456789"
)
_BRACKETED = re.compile(r"\(([^()]*)\)|\[([^\[\]]*)\]|\\\{([^{}]*)\\\}|\{([^{}]*)\}")
_FENCES = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"))


def plain(answer: str) -> str:
    """The words or the formula itself: font commands, math fences, quotes, a final stop removed."""
    answer = _undressed(answer)
    for pattern, replacement in _REPLACED:
        answer = re.sub(pattern, replacement, answer)
    answer = re.sub("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+", _raised, answer)
    # One character of its own, such as a half.
    answer = re.sub("[\u00bc-\u00be\u2150-\u215e]", _fraction, answer).replace("\u2044", "/")
    return answer.strip().rstrip(".").strip()


def unbracketed(text: str) -> str:
    """The inside of a text that stands in one pair of brackets as a whole, else the text."""
    inside = _BRACKETED.fullmatch(text)
    return next(filter(None, inside.groups()), "").strip() if inside else text


def _undressed(answer: str) -> str:
    previous = None
    while previous != answer:
        previous, answer = answer, _DRESS.sub(r"\1", answer)
        answer = _unfenced(answer.strip(" \n\t\"'`*\u201c\u201d\u2018\u2019"))
    return answer


def _unfenced(answer: str) -> str:
    for opening, closing in _FENCES:
        longest = len(opening) + len(closing)
        if answer.startswith(opening) and answer.endswith(closing) and len(answer) > longest:
            inner = answer[len(opening) : -len(closing)]
            # "$5 or $6$" is no formula between fences.
            if opening not in inner.replace("\\$", ""):
                return inner
    return answer


def _raised(found: re.Match[str]) -> str:
    return f"^{{{found.group().translate(_SUPERSCRIPTS)}}}"


def _fraction(found: re.Match[str]) -> str:
    return f" {unicodedata.normalize('NFKC', found.group())}"
