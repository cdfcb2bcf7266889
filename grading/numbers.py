"""Numbers in text, as exact fractions: one regular expression, never `eval`, bounded digits."""

import re
from fractions import Fraction

# ASCII digits only; \d, which also matches other scripts', stands where a digit forbids: a number
# ends where no digit, decimal, fraction or exponent goes on. Groups of three behind commas, or a
# plain run of digits. A minus belongs to the number unless a digit or letter stands before it:
# 10-4 ends in 4, x = -4 in -4.
_NOT_BEFORE = r"(?<![\dA-Za-z.])"
_NUMBER = re.compile(
    _NOT_BEFORE + r"(-?)[$€£]?(-?)"
    r"((?:[0-9]{1,3}(?:,[0-9]{3}){1,13}|[0-9]{1,40})(?:\.[0-9]{1,40})?|\.[0-9]{1,40})"
    r"(?:\s?/\s?([0-9]{1,40})(?![0-9.]))?(?!\d|\.\d|\s?/\s?\d|[eE][+-]?\d)"
)
_WHOLE = re.compile(
    r"[$€£\s]*" + _NUMBER.pattern.removeprefix(_NOT_BEFORE) + r"\s*"
    r"(?:%|\\%|dollars?|cents?|[$€£])?[\s.]*"
)
_FRAC = re.compile(r"(-?)\s*\\d?frac\{(-?[0-9]{1,40})\}\{(-?[0-9]{1,40})\}")


def _fraction(match):
    sign, sign_after_currency, digits, denominator = match.groups()
    value = Fraction(digits.replace(",", ""))
    if denominator is not None:
        if int(denominator) == 0:
            return None
        value /= int(denominator)
    return -value if sign or sign_after_currency else value


def parse_number(text):
    """The number a string consists of, as a Fraction, or None.

    With a sign, commas, decimals, a currency; or as 3/4 or \\frac{3}{4}.
    """
    if len(text) > 200:
        return None
    text = text.strip().strip("$*").replace("\u2212", "-")
    text = text.replace("\\$", "").replace("\\!", "").replace("\\,", "").strip()
    if match := _FRAC.fullmatch(text):
        sign, top, bottom = match.groups()
        return None if int(bottom) == 0 else Fraction(int(top), int(bottom)) * (-1 if sign else 1)
    match = _WHOLE.fullmatch(text)
    return _fraction(match) if match else None


def last_number(text):
    """The last number anywhere in a text, as a Fraction, or None."""
    matches = list(_NUMBER.finditer(text.replace("\u2212", "-")))
    return _fraction(matches[-1]) if matches else None


def only_number(text):
    """The number of a sentence that holds exactly one and no mathematics, as a Fraction; else None.

    "72 apples", "x = 5".
    """
    match = _NUMBER.search(text)
    if match is None:
        return None
    before, after = text[: match.start()], text[match.end() :]
    # 2k, 4_6, 2^10, (3, 4): the number is not the answer, only a part of it
    part = re.search(r"[\d()\[\]{}^_+*/<>|\\]", before + after) or re.match(r"[A-Za-z]", after)
    return None if part else _fraction(match)
