"""Numbers in text, as exact fractions: regular expressions, never `eval`, bounded digits.

A text is first written plainly (`plain`). Then its last number is read together with what stands
around it: 5 in "5 apples", "x = 5" or "$5." is the number 5; in "5x", "n - 5", "2^5", "12:5",
"x <= 5" or "4 or 5" it is a part of something else, and nothing is read.
"""

import re
import unicodedata
from fractions import Fraction

LONGEST = 200  # characters of a text that is a number
CONTEXT = 60  # characters in front of a number that are looked at

_PLAIN = [  # (pattern, what it becomes), in this order
    (r"[\u2010-\u2013\u2212\ufe63\uff0d]", "-"),  # hyphens, en dash, minus signs
    (r"\\,(?=[0-9]{3})|\{,\}|(?<=[0-9])[\u2019'](?=[0-9]{3})", ","),  # 10\,000 10{,}000 10'000
    (r"[\u2014\u00a0\u2007\u2009\u202f~]|\\[ ,;:!]|\\q?quad", " "),
    (r"(?<=[0-9]) ?(?=[\u00bc-\u00be\u2150-\u215e])", " "),  # 2 and a vulgar fraction
    (r"[\u00bc-\u00be\u2150-\u215e]", lambda sign: unicodedata.normalize("NFKC", sign[0])),
    (r"\u2044", "/"),
    (r"\\[dt]?frac ?([0-9]) ?([0-9])", r"\\frac{\1}{\2}"),
    (r"(?<=[0-9]) ?\\[dt]?frac ?\{ ?([0-9]+) ?\} ?\{ ?([0-9]+) ?\}", r" \1/\2"),
    (r"\\[dt]?frac ?\{ ?(-?) ?([0-9]+) ?\} ?\{ ?([0-9]+) ?\}", r"\1\2/\3"),
    (r"\^ ?\{? ?\\circ ?\}?|\u00b0", " degrees "),
    (r"\\(?:text|mathrm|textbf|mathbf|mbox|textrm) ?\{([^{}]*)\}", r" \1 "),
    (r"\\([$%])", r"\1"),
    (r"\\f?box(?:ed)?(?![a-z]) ?\{?|</?[A-Za-z][\w-]*>", " "),
    (r"\\[()\[\]]|\\(?:left|right)(?![a-z])|\$(?! ?[-+]?[0-9.])", " "),
    (r"(?<![0-9])\*\*|\*\*(?![0-9])", ""),  # bold, not a power
    (r"(?<![0-9)] )(?<![\w)*])\*(-?[$0-9][^*\s]*)\*(?![\w*])", r"\1"),  # italics
    (r"[ \t]+", " "),
]
_MARKS = re.compile(r"[^\x21-\x7e\n ]|[\\$*~<{']|  ")  # a text without them is plain
_BULLET = re.compile(r"^[ \t]*[-*\u2022] ", re.M)

_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,13}|[0-9]{1,3}(?: [0-9]{3}){1,13}|[0-9]{1,40})"
_NUMBER = re.compile(
    r"([0-9]{1,40}) +([0-9]{1,3})/([0-9]{1,3})"  # 2 1/2
    rf"|({_WHOLE}) ?/ ?([0-9]{{1,40}})|({_WHOLE}(?:\.[0-9]{{1,40}})?|\.[0-9]{{1,40}})"
)
_SCALES = dict(hundred=10**2, thousand=10**3, million=10**6, billion=10**9, trillion=10**12)
_SCALE = re.compile(rf"\s*({'|'.join(_SCALES)})(?![A-Za-z])", re.I)
_CURRENCY = r"(?:(?:US)?\$|[\u20ac\u00a3]) ?"
_SIGN = re.compile(rf"(?:([-+])( ?)(?:{_CURRENCY})?|{_CURRENCY}([-+]?) ?)?\Z")

# Units: known abbreviations, and words, but for those that make another number of it.
_SHORT_UNIT = (
    r"(?:[cdkm]?m|k?g|mg|m?l|L|s|ms|h|hrs?|mins?|secs?|ft|in|yd|mi|mph|lbs?|oz|k?Wh?|N|J|V|C|F)"
    r"(?![A-Za-z])"
)
_WORD_UNIT = (
    "(?!(?:and|than|less|more|most|least|about|times|plus|minus|over|mod|modulo|for|choose|half|or|"
    "squared|cubed|factorial|sqrt|log|sin|cos|tan|unless|when|where|but|not|neither|either|root|"
    "infinity|hundred|thousand|million|billion|trillion)(?![A-Za-z]))[A-Za-z]{3,20}"
)
_UNIT = rf"(?:{_SHORT_UNIT}|{_WORD_UNIT})"
_UNITS = re.compile(  # "5 kg", "5 dollars per hour", "5 %"
    rf"(?:\s*(?:%|(?:per | ?/ ?)?{_UNIT}(?:(?: ?/ ?| per | an? |[ -]){_UNIT}){{0,4}}))?[\s.]*"
)
_GLUED = re.compile(rf"(?=g|[A-Za-z]{{2}}){_SHORT_UNIT}|(?=\w{{4}}){_WORD_UNIT}(?![(\w])")  # 5kg
_SQUARES = re.compile(
    rf"(?<=[0-9 /])({_UNIT})(?: ?(?:\^ ?\{{?[23]\}}?|[\u00b2\u00b3])| squared| cubed)"
)
_NAME = re.compile(
    r"(?:(?:\\?[A-Za-z]{3,20}|[A-Z]{2}|[A-Za-z])(?:_\{?\w{1,20}\}?|'|\([a-z]\))?\s*=\s*)?"
)

# What makes a number the part of something else, directly in front of it or behind it.
_OPERATOR = r"(?:[\^_<>\u2264\u2265\u2260\u221a\u00d7\u00b7*/\u00f7+\u00b1]|\\[A-Za-z]+)"
_PART_BEFORE = re.compile(
    rf"(?:[\w.|{{-]|{_OPERATOR}\s*|(?<![A-Za-z])(?:log|ln|sin|cos|tan|sqrt|mod) ?|[A-Za-z]\("
    r"|[0-9] ?[:,]|[0-9], +|[0-9] ?x +|[0-9] ?(?:%|[A-Za-z]+)? (?:or(?: [a-z]+)?|to|and) "  # 4 or 5
    r"|\b(\w{1,10}) ?= ?[-+0-9./]{1,20}(?:,? or \w{1,10}|(?:,| and) \1) ?= ?"  # x = 4, x = 5
    r"|\b(?:not|never) |n't )\Z"
)
_VARIABLE = r"[a-fijnp-rt-z](?![A-Za-z]|\.[a-z]|-[a-z]{2})"  # but for p.m., i.e., t-shirts
_PART_BEHIND = re.compile(
    rf"[\w(]|[.,:][0-9]|\s*{_OPERATOR}(?<![*/])|\s*\*\s*[\w(\\]|\s*/\s*(?:[0-9(\\]|{_VARIABLE})"
    rf"|\s*-\s*(?:{_VARIABLE}|[0-9(\\\u221a])|\s+{_VARIABLE}(?! [A-Za-z])"
    r"|\s+(?:squared|cubed|factorial)| and a (?:half|third|quarter)| or not"
)


def parse_number(text):
    """The number that a text consists of, as a Fraction, or None: with a sign, thousands, decimals,
    a currency or a unit, behind `x =`; 3/4, 2 1/2, \\frac{3}{4}; $1.2 million."""
    value, before, behind = _last(text.strip().strip("$*")) if len(text) <= LONGEST else _NONE
    return value if _NAME.fullmatch(before) and _UNITS.fullmatch(behind) else None


def last_number(text):
    """The last number in a text, as a Fraction; None if there is none, or if the last figures are
    something else: part of an expression, a range, a time, one of two answers."""
    return _last(text)[0]


_NONE = None, "", ""


def _last(text):
    """(last number, text before its sign, text behind its scale)."""
    text = plain(text).strip()
    if len(_BULLET.findall(text)) > 1:  # dashes that open several lines are no signs
        text = _BULLET.sub("", text)
    text = _SQUARES.sub(r"\1", text)
    numbers = list(_NUMBER.finditer(text))
    sign, before = _sign(text[: numbers[-1].start()]) if numbers else (0, "")
    if not sign or _PART_BEFORE.search(before[-CONTEXT:]):
        return _NONE
    behind = text[numbers[-1].end() :].rstrip("$\u20ac\u00a3 ")
    if scale := _SCALE.match(behind):
        behind = behind[scale.end() :]
    if unit := _GLUED.match(behind):
        behind = behind[unit.end() :]
    factorial = behind.startswith("!") and not re.search("[A-Za-z]{2}", text)
    value = _value(*numbers[-1].groups())
    if _PART_BEHIND.match(behind) or factorial or value is None:
        return _NONE
    return value * sign * (_SCALES[scale[1].lower()] if scale else 1), before, behind


def plain(text):
    """One kind of minus, space and fraction; LaTeX's marks for spacing and text taken off."""
    if _MARKS.search(text):
        for pattern, what in _PLAIN:
            text = re.sub(pattern, what, text)
    return text


def _sign(before):
    """(1 or -1, the text before the sign and the currency); 0 where it is no sign, but a
    difference, a sum or a range."""
    found = _SIGN.search(before)
    front, sign = before[: found.start()], found[1] or found[3]
    lead = front[-CONTEXT:].rstrip()
    if not sign:
        return 1, front
    opens = not lead or re.search(r"[=(:,]\Z|\b(?:is|are|equals|be|get|gives)\Z", lead)
    operand = re.search(r"[\d)\]}%!]\Z|(?<![A-Za-z])[A-Za-z\u03c0]\Z", lead)
    if operand or re.search(r"\w\Z", front) or (sign == "+" and not opens):
        return 0, front
    dash = found[2] and re.search(r"[A-Za-z]\Z", lead)  # "Answer - 5", but "it is - 5"
    return -1 if sign == "-" and (opens or not dash) else 1, front


def _value(whole, part, parts, top, bottom, decimal):
    """The fraction that _NUMBER's groups stand for; None for 3 5/2 and for a division by zero."""
    if whole:
        return int(whole) + Fraction(int(part), int(parts)) if int(part) < int(parts) else None
    bottom = int(bottom or 1)
    return Fraction(re.sub("[, ]", "", top or decimal)) / bottom if bottom else None
