"""True, false, or uncertain."""

import re

from compressed_cache.tasks.scoring.plain import plain, unbracketed

_LEAD = re.compile(
    r"(?:(?:the|this|final|correct)\s+)*"
    r"(?:(?:answer|conclusion|statement|claim|it)\s*(?:is:?|:)\s*)?(?:therefore\s+)?"
)
_WORDS = {
    "True": re.compile("true|yes|t"),
    "False": re.compile("false|no|f"),
    "Uncertain": re.compile(
        "(?:it )?(?:can(?:not|'t|\u2019t| not) be (?:determined|known|inferred|concluded)"
        "|cannot (?:determine|tell|say|conclude))"
        "|(?:not enough|insufficient) (?:information|data|evidence)"
        "|(?:is )?not (?:certain|known|determined)"
        "|uncertain|unknown|undetermined|indeterminate|inconclusive|unsure|u"
    ),
}


def same_truth(answer: str, gold: str | bool) -> bool:
    """Whether an answer is one of the words for ``gold``: "True", "False" or "Uncertain".

    "Not true" is none: it may be false or uncertain.

    Raises:
        KeyError: ``gold`` is none of the three, nor a bool.
    """
    words = " ".join(unbracketed(plain(answer)).lower().rstrip(".!,;").split())
    lead = _LEAD.match(words)
    return bool(_WORDS[str(gold)].fullmatch(words, lead.end() if lead else 0))
