"""Numbers as people write them, compared exactly."""

import re
from fractions import Fraction

from compressed_cache.tasks.scoring.plain import plain

_DIGITS = r"(?:\d{1,3}(?:[, ]\d{3})+|\d+)"
_NUMBER = re.compile(
    rf"""
    (?P<sign>[+-]?)\s*(?:[$€£¥]|USD\s|Rs\.?\s)?\s*(?P<inner>[+-]?)\s*
    (?:
        (?:(?P<whole>\d+)\s*)?
            (?:\((?P<top>\d+)\)/\((?P<bottom>\d+)\)|(?<!\d)(?P<over>\d+)\s*/\s*(?P<under>\d+))
      | (?P<decimal>{_DIGITS}(?:\.\d*)?|\.\d+)
            (?:[eE](?P<power>[+-]?\d+)|\s*(?:\\times|\\cdot|\u00d7|\*)\s*10\^\{{?(?P<tens>[+-]?\d+)\}}?)?
    )
    (?P<scale>k(?![a-zA-Z])|\s*(?:thousand|million|billion)(?![a-zA-Z]))?
    \s*(?P<unit>%|[€£¥]|(?:[a-zA-Z°²³'\u2019().,/\s]|(?<=[a-zA-Z])-(?=[a-zA-Z])|\^\{{?[23]\}}?)*)
    """,
    re.VERBOSE,
)
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{\s*(-?)(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_SCALES = {"": 1, "k": 10**3, "thousand": 10**3, "million": 10**6, "billion": 10**9}
# Any other single letter stands for a number.
_SHORT_UNITS = {"m", "g", "s", "h", "l", "L"}
# Where one of these opens what follows a number, or "or" occurs at all, another number follows.
_JOINING = re.compile(r"\s*(?:and|to|plus|minus|times|not)\b|.*\bor\b", re.I)
_SEVERAL = re.compile(r"[,;]|\b(?:and|or)\b", re.I)
# No answer is longer; Python refuses to read integers beyond 4300 digits.
_LONGEST = 500


def same_number(answer: str, gold: str | int) -> bool:
    """Whether two texts state the same number; exact, as fractions.

    Understood are separators of thousands, currency signs and units, percent (``50%`` is 50, as
    GSM8K states it, and not 0.5), fractions and mixed numbers, decimals, powers of ten, and a
    leading ``x =``. Two numbers, as in "3 or 4" or "x = 3, y = 4", are no answer.
    """
    value = parse_number(answer)
    return value is not None and value == parse_number(str(gold))


def parse_number(text: str, *, bare: bool = False) -> Fraction | None:
    """The number in a text, None unless it holds exactly one; ``bare`` allows no unit in words."""
    left, _, text = re.sub(r"\\approx|≈", "=", plain(text)).rpartition("=")
    if _SEVERAL.search(left):
        return None
    text = _FRACTION.sub(_spelled, text.strip())
    if len(text) > _LONGEST:
        return None
    found = _NUMBER.fullmatch(text)
    if found is None or (bare and found["unit"] not in ("", "%", "°")):
        return None
    unit = found["unit"].strip()
    if len(unit) == 1 and unit.isalpha() and unit not in _SHORT_UNITS:
        return None
    if _JOINING.match(unit) or (found["sign"] and found["inner"]):
        return None
    sign = -1 if "-" in found["sign"] + found["inner"] else 1
    value = _value(found)
    return None if value is None else sign * value * _SCALES[(found["scale"] or "").strip()]


def _spelled(found: re.Match[str]) -> str:
    sign, top, digit, bottom, other = found.groups()
    return f"{sign or ''}({top or digit})/({bottom or other})"


def _value(found: re.Match[str]) -> Fraction | None:
    if found["decimal"]:
        power = int(found["power"] or found["tens"] or 0)
        # A power beyond all use would take all memory.
        if abs(power) > 400:
            return None
        digits = re.sub("[, ]", "", found["decimal"])
        return Fraction(digits.rstrip(".") or "0") * Fraction(10) ** power
    top, bottom = found["top"] or found["over"], found["bottom"] or found["under"]
    if int(bottom) == 0:
        return None
    return int(found["whole"] or 0) + Fraction(int(top), int(bottom))
