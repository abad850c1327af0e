"""Numbers as people write them, compared exactly."""

import re
from fractions import Fraction

from compressed_cache.tasks.scoring.plain import plain, unbracketed

# Thousands by commas, spaces or apostrophes; lakhs; thousands by points, if there are two of them.
_DIGITS = (
    r"(?:\d{1,3}(?:[, '\u2019]\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d{1,3}(?:\.\d{3}){2,}(?![\d.])|\d+)"
)
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_CURRENCY = r"(?:US)?[$€£¥₹]|USD\s|Rs\.?\s"
_NUMBER = re.compile(
    rf"""
    (?P<sign>[+-]?)\s*(?:{_CURRENCY})?\s*(?P<inner>[+-]?)\s*
    (?:
        (?:(?P<whole>\d+)\s+)?(?P<over>{_DECIMAL})\s*/\s*(?P<under>{_DECIMAL})
      | (?P<decimal>{_DECIMAL})
            (?:[eE](?P<power>[+-]?\d+)
              |\s*(?:\\times|\\cdot|\u00d7|\*|x)\s*10\^\{{?(?P<tens>[+-]?\d+)\}}?)?
      | 10\^\{{?(?P<alone>[+-]?\d+)\}}?
    )
    (?P<scale>[kKM](?![a-zA-Z^])|\s*(?:hundred|thousand|million|billion|trillion)(?![a-zA-Z]))?
    (?P<oclock>:00(?=$|\s*[aApP]\.?[mM]))?
    \s*(?P<unit>%|[€£¥¢₹]
        |(?:[a-zA-Z°'\u2019"().,/\s]|(?<=[a-zA-Z])(?:-(?=[a-zA-Z])|\^\{{?[23]\}}?))*)
    """,
    re.VERBOSE,
)
_FRACTION = re.compile(
    r"\\(?:[dtc]?frac|nicefrac|sfrac)\s*(?:\{\s*(-?)\s*([\d.,]+)\s*\}|(\d))"
    r"\s*(?:\{\s*(-?)\s*([\d.,]+)\s*\}|(\d))"
)
_UNIT_FRACTION = re.compile(r"\\[dt]?frac\s*\{([a-zA-Z ]{2,})\}\s*\{([a-zA-Z ]+)\}")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{?(\d+)\}?")
_SCALES = {
    "": 1,
    "k": 10**3,
    "K": 10**3,
    "M": 10**6,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
# Any other letter or pair of letters may stand for numbers.
_SHORT_UNITS = {
    *("m", "g", "s", "h", "l", "L", "mm", "cm", "km", "mg", "kg", "ml", "mL", "ft", "in", "yd"),
    *("mi", "lb", "oz", "hr", "sq", "am", "pm", "AM", "PM", "of"),
}
# What may precede the number, as in "x =", "Total:" or "The answer is".
_EQUALS = re.compile(r"\\approx|≈|\\sim(?![a-zA-Z])|\bis\b|\bare\b|(?<=[a-zA-Z])\s*:(?!\d)")
_HEDGE = re.compile(r"^(?:about|approximately|approx\.|roughly|around|exactly|only)\s+", re.I)
_MINUS = re.compile(r"^(?:minus|negative)\s+(?=[\d$.])", re.I)
# Where one of these opens what follows a number, or "or" occurs at all, another number follows.
_JOINING = re.compile(r"\s*(?:and|to|plus|minus|times|not)\b|.*\bor\b", re.I)
_SEVERAL = re.compile(r"(?=.*[\d=]).*(?:[,;]|\b(?:and|or)\b)", re.I | re.S)
# No answer is longer; Python refuses to read integers beyond 4300 digits.
_LONGEST = 500


def same_number(answer: str, gold: str | int) -> bool:
    """Whether two texts state the same number; exact, as fractions.

    Understood are separators of thousands, currency signs and units, percent (``50%`` is 50, as
    GSM8K states it, and not 0.5), fractions and mixed numbers, decimals, repeating ones too, powers
    of ten, and a leading ``x =``, ``Total:`` or ``The answer is``. A lone comma separates thousands
    and no decimals: "18,5" is no number. Two numbers, as in "3 or 4" or "x = 3, y = 4", are no
    answer.
    """
    value = parse_number(answer)
    return value is not None and value == parse_number(str(gold))


def parse_number(text: str, *, bare: bool = False) -> Fraction | None:
    """The number in a text, None unless it holds exactly one; ``bare`` allows no unit in words."""
    text = plain(text)
    if len(text) > _LONGEST:
        return None
    left, _, text = _EQUALS.sub("=", text).rpartition("=")
    if _SEVERAL.match(left):
        return None
    found = _NUMBER.fullmatch(_spelled_out(text))
    if found is None or (bare and found["unit"].strip() not in ("", "%", "°")):
        return None
    if _is_factor(found["unit"]) or (found["sign"] and found["inner"]):
        return None
    sign = -1 if "-" in found["sign"] + found["inner"] else 1
    value = _value(found)
    return None if value is None else sign * value * _SCALES[(found["scale"] or "").strip()]


def _spelled_out(text: str) -> str:
    """In characters that :data:`_NUMBER` knows."""
    text = re.sub(r"\$([^$]+)\$", r"\1", text).strip()
    text = _REPEATING.sub(_repeating, text)
    text = _FRACTION.sub(_fraction, re.sub(r"\s*\\over(?![a-zA-Z])\s*", "/", text))
    text = _UNIT_FRACTION.sub(r"\1/\2", text)
    return _MINUS.sub("-", _HEDGE.sub("", unbracketed(text.strip())))


def _fraction(found: re.Match[str]) -> str:
    sign, top, digit, other_sign, bottom, other_digit = found.groups()
    minus = "-" if (sign or "") != (other_sign or "") else ""
    return f"{minus} {top or digit}/{bottom or other_digit}"


def _repeating(found: re.Match[str]) -> str:
    whole, once, again = found.groups()
    nines = "9" * len(again) + "0" * len(once)
    return f"{int(whole + once + again) - int(whole + once or 0)}/{nines}"


def _is_factor(unit: str) -> bool:
    words = re.findall("[a-zA-Z]+", re.sub("°[CF]|\\.", "", unit))
    short = all(len(word) <= 2 for word in words)
    return bool(_JOINING.match(unit.strip())) or (short and not _SHORT_UNITS.issuperset(words))


def _value(found: re.Match[str]) -> Fraction | None:
    if found["over"]:
        top, bottom = _decimal(found["over"]), _decimal(found["under"])
        return None if bottom == 0 else int(found["whole"] or 0) + top / bottom
    power = int(found["power"] or found["tens"] or found["alone"] or 0)
    # A power beyond all use would take all memory.
    if abs(power) > 400:
        return None
    return _decimal(found["decimal"] or "1") * Fraction(10) ** power


def _decimal(text: str) -> Fraction:
    digits = re.sub("[, '\u2019]", "", text)
    if digits.count(".") > 1:
        digits = digits.replace(".", "")
    return Fraction(digits.rstrip(".") or "0")
