"""Mathematical expressions, compared by the library math-verify."""

import re
import threading
from typing import Any

from compressed_cache.tasks.scoring.numbers import parse_number
from compressed_cache.tasks.scoring.plain import plain

_SECONDS = 5


def same_expression(answer: str, gold: str) -> bool:
    """Whether two LaTeX expressions mean the same.

    Equal texts are, spaces aside and words in any case, and so are equal numbers, whose unit the
    answer may add. All else is decided by math-verify
    (https://github.com/huggingface/Math-Verify), which parses both into SymPy. What it cannot read,
    or not in time, is wrong.

    Raises:
        ImportError: math-verify is not installed.
    """
    stated_text, gold_text = _squeezed(answer), _squeezed(gold)
    if stated_text == gold_text:
        return True
    # "East" is east, but X need not be x.
    if len(gold_text) > 2 and gold_text.isalpha() and stated_text.lower() == gold_text.lower():
        return True
    number = parse_number(gold, bare=True)
    stated = parse_number(answer)
    if number is not None and stated is not None:
        return number == stated
    return _verified(plain(answer), plain(gold))


def _squeezed(text: str) -> str:
    # A space between digits separates numbers.
    text = re.sub(r"(?<!\d) | (?!\d)", "", plain(text))
    return text.replace("dfrac", "frac").replace("tfrac", "frac")


def _verified(answer: str, gold: str) -> bool:
    try:
        import math_verify
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is missing: pip install 'compressed-cache[eval]'"
        ) from error
    # Its timeouts are signals, which only the main thread gets.
    main = threading.current_thread() is threading.main_thread()
    seconds: Any = _SECONDS if main else None
    try:
        gold_, answer_ = (
            math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=seconds)
            for text in (gold, answer)
        )
        same = math_verify.verify(gold_, answer_, timeout_seconds=seconds)
        return bool(gold_ and answer_ and same)
    except Exception:
        # SymPy raises many things on what a model may write.
        return False
