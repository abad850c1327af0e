"""True, false, or uncertain."""

from compressed_cache.tasks.scoring.plain import plain

_WORDS = {
    "True": {"true", "yes"},
    "False": {"false", "no"},
    "Uncertain": {
        "uncertain",
        "unknown",
        "undetermined",
        "indeterminate",
        "cannot be determined",
        "not enough information",
    },
}


def same_truth(answer: str, gold: str | bool) -> bool:
    """Whether an answer is one of the words for ``gold``: "True", "False" or "Uncertain".

    Raises:
        KeyError: ``gold`` is none of the three, nor a bool.
    """
    return " ".join(plain(answer).lower().split()) in _WORDS[str(gold)]
