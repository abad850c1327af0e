"""Mathematical expressions, compared by the library math-verify."""

import re
import threading
from typing import Any

from compressed_cache.tasks.scoring.numbers import parse_number
from compressed_cache.tasks.scoring.plain import plain, unbracketed
from compressed_cache.wording import missing

_SECONDS = 5
_BASE = re.compile(r"_\{?(\d+)\}?$")


def same_expression(answer: str, gold: str) -> bool:
    """Whether two LaTeX expressions mean the same.

    Equal texts are, spaces aside and words in any case, and so are equal numbers, whose unit the
    answer may add. All else is decided by math-verify
    (https://github.com/huggingface/Math-Verify), which parses both into SymPy; an interval may be
    written as an inequality. What it cannot read, or not in time, is wrong. Stricter than
    math-verify in two points: a tuple is no set, and digits in another base are another number.

    Raises:
        ImportError: math-verify is not installed.
    """
    stated_text, gold_text = _squeezed(answer), _squeezed(gold)
    if stated_text == gold_text or _same_words(stated_text, gold_text):
        return True
    number = parse_number(gold, bare=True)
    stated = parse_number(answer)
    if number is not None and stated is not None:
        return number == stated
    if _differ_in_kind(stated_text, gold_text):
        return False
    return _verified(plain(answer), plain(gold))


def _same_words(text: str, gold: str) -> bool:
    text, gold = unbracketed(text), unbracketed(gold)
    # "East" is east, but X need not be x.
    if len(gold) > 2:
        text, gold = text.lower(), gold.lower()
    return gold.isalpha() and text == gold


def _squeezed(text: str) -> str:
    # A space between digits separates numbers.
    text = re.sub(r"(?<!\d) | (?!\d)", "", plain(text))
    text = text.replace("\\varnothing", "\\emptyset")
    return text.replace("dfrac", "frac").replace("tfrac", "frac")


def _differ_in_kind(text: str, other: str) -> bool:
    opened = {text[:1], other[:1]}
    bases = [found.group(1) for found in map(_BASE.search, (text, other)) if found]
    # What opens with a backslash may be any command.
    is_set = [expression.startswith("\\{") for expression in (text, other)]
    return (any(is_set) and not opened.isdisjoint("([")) or len(set(bases)) > 1


def _verified(answer: str, gold: str) -> bool:
    try:
        import math_verify
    except ModuleNotFoundError as error:
        raise ImportError(missing(error.name, "eval")) from error
    # Its timeouts are signals, which only the main thread gets.
    main = threading.current_thread() is threading.main_thread()
    seconds: Any = _SECONDS if main else None
    try:
        gold_, answer_ = (
            math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=seconds)
            for text in (gold, answer)
        )
        same = math_verify.verify(
            gold_, answer_, allow_set_relation_comp=True, timeout_seconds=seconds
        )
        return bool(gold_ and answer_ and same)
    except Exception:
        # SymPy raises many things on what a model may write.
        return False
