"""The measures of DROP: exact match, and F1 over words."""

import re
import string
from collections.abc import Sequence

from compressed_cache.tasks.scoring.plain import plain

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_BETWEEN_SPANS = re.compile(r",\s+and\s+|[,;]\s+|\s+and\s+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def drop_scores(answer: str, golds: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1, the best over the alternatives.

    As the official evaluation (https://github.com/allenai/allennlp-reading-comprehension,
    allennlp_rc/eval/drop_eval.py): lower case, split at spaces and hyphens, no punctuation except
    in numbers, numbers as floats, no articles; words as sets; an F1 of 0 unless a number of the
    gold answer, if it has any, is in the answer; F1 rounded to two digits.

    Differs in two points. The hub's rows hold the spans of all annotators in one list, where
    answers of several spans cannot be told apart from alternatives: so each span is one, and to
    name all of them, in any order, is right too. And a currency sign before a number or a percent
    sign after it is removed on both sides, because the official code reads "$50.6" as 506.
    """
    spans = [_normal(gold) for gold in golds]
    if {_normal(part) for part in _BETWEEN_SPANS.split(plain(answer))} == set(spans):
        return 1.0, 1.0
    scores = [_scores(_normal(answer), span) for span in spans]
    return max(match for match, _ in scores), max(f1 for _, f1 in scores)


def _scores(answer: str, gold: str) -> tuple[float, float]:
    return float(answer == gold), _f1(set(answer.split()), set(gold.split()))


def _f1(answer: set[str], gold: set[str]) -> float:
    numbers = {word for word in gold if _is_number(word)}
    if numbers and not numbers & answer:
        return 0.0
    common = len(answer & gold)
    precision = common / len(answer) if answer else 1.0
    recall = common / len(gold) if gold else 1.0
    return round(2 * precision * recall / (precision + recall), 2) if precision + recall else 0.0


def _normal(text: str) -> str:
    words = [_word(word) for word in re.split(r" |-", plain(text).lower())]
    return " ".join(" ".join(words).split())


def _word(word: str) -> str:
    number = re.sub(r"^[$€£](?=[\d.])|(?<=\d)%$", "", word)
    if not _is_number(number):
        number = number.translate(_PUNCTUATION)
    if _is_number(number):
        return str(float(number))
    return _ARTICLES.sub(" ", number)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
