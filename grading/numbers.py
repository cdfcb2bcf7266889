"""Numbers in text, as exact fractions: regular expressions, never `eval`, bounded digits.

A text is first written plainly (`plain`: one kind of minus, of space, of fraction; LaTeX's marks
taken off). Then its number is read together with what stands around it: 5 in "5 apples", "x = 5"
or "$5." is the number 5; in "5x", "n - 5", "2^5", "12:5", "x <= 5" or "4 or 5" it is a part of
something else, and nothing is read.
"""

import re
from fractions import Fraction

LONGEST = 200  # characters of a text that is a number
LONGEST_CONTEXT = 60  # characters in front of a number that are looked at

_PLAIN = [  # (pattern, what it becomes), in this order
    (r"[\u2010-\u2013\u2212\ufe63\uff0d]", "-"),  # hyphens, en dash, minus signs
    (r"\u2014", " "),  # an em dash is punctuation
    (r"[\u00a0\u2007\u2009\u202f~]|\\[ ;:!]|\\q?quad", " "),
    (r"\u2044", "/"),
    (r"\\,(?=[0-9]{3})|\{,\}|(?<=[0-9])[\u2019'](?=[0-9]{3})", ","),  # 10\,000 10{,}000 10'000
    (r"\\,", " "),
    (r"\\[dt]?frac ?([0-9]) ?([0-9])", r"\\frac{\1}{\2}"),
    (r"(?<=[0-9]) ?\\[dt]?frac ?\{ ?([0-9]+) ?\} ?\{ ?([0-9]+) ?\}", r" \1/\2"),
    (r"\\[dt]?frac ?\{ ?(-?) ?([0-9]+) ?\} ?\{ ?([0-9]+) ?\}", r"\1\2/\3"),
    (r"\^ ?\{? ?\\circ ?\}?|\u00b0", " degrees "),
    (r"\\(?:text|mathrm|textbf|mathbf|mbox|textrm) ?\{([^{}]*)\}", r" \1 "),
    (r"\\([$%])", r"\1"),
    (r"\\boxed ?\{?|</?[A-Za-z][\w-]*>", " "),
    (r"\\[()\[\]]|\\(?:left|right)(?![a-z])|\$(?! ?-?[0-9.])", " "),
    (r"(?<![0-9])\*\*|\*\*(?![0-9])", ""),  # bold, not a power
    (r"(?<![0-9)] )(?<![\w)*])\*(-?[$0-9][^*\s]*)\*(?![\w*])", r"\1"),  # italics
    (r"[ \t]+", " "),
]
_MARKS = re.compile(r"[^\x21-\x7e\n ]|[\\$*~<{']|  ")  # a text without them is plain
_VULGAR = {
    "\u00bd": "1/2", "\u2153": "1/3", "\u2154": "2/3", "\u00bc": "1/4", "\u00be": "3/4",
    "\u2155": "1/5", "\u2156": "2/5", "\u2157": "3/5", "\u2158": "4/5", "\u2159": "1/6",
    "\u215a": "5/6", "\u215b": "1/8", "\u215c": "3/8", "\u215d": "5/8", "\u215e": "7/8",
}  # fmt: skip

_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,13}|[0-9]{1,3}(?: [0-9]{3}){1,13}|[0-9]{1,40})"
_NUMBER = re.compile(
    r"(?P<whole>[0-9]{1,40}) +(?P<part>[0-9]{1,3})/(?P<parts>[0-9]{1,3})"  # 2 1/2
    rf"|(?P<top>{_WHOLE}) ?/ ?(?P<bottom>[0-9]{{1,40}})"
    rf"|(?P<decimal>{_WHOLE}(?:\.[0-9]{{1,40}})?|\.[0-9]{{1,40}})"
)
_SCALES = dict(hundred=10**2, thousand=10**3, million=10**6, billion=10**9, trillion=10**12)
_SCALE = re.compile(rf"\s*({'|'.join(_SCALES)})(?![A-Za-z])", re.I)

# Units: known abbreviations, and words, but for those that make another number of it.
_SHORT_UNIT = (
    r"(?:[cdkm]?m|k?g|mg|m?l|L|s|ms|h|hrs?|mins?|secs?|ft|in|yd|mi|mph|lbs?|oz|k?Wh?|N|J|V|C|F)"
    r"(?![A-Za-z])"
)
_NO_UNIT = (
    "and than less more most least about times plus minus over mod modulo for choose half squared "
    "cubed factorial sqrt log sin cos tan unless when where but not neither either root infinity "
    "hundred thousand million billion trillion"
).replace(" ", "|")
_UNIT = rf"(?:{_SHORT_UNIT}|(?!(?:{_NO_UNIT})(?![A-Za-z]))[A-Za-z]{{3,20}})"
_POWER = r"(?: ?(?:\^ ?\{?[23]\}?|[\u00b2\u00b3])| squared| cubed)"
_UNITS = rf"(?:%|(?: ?per | ?/ ?| )?{_UNIT}{_POWER}?(?:(?: ?/ ?| per | an? |[ -]){_UNIT}){{0,4}})"
_GLUED_UNIT = re.compile(rf"(?=[A-Za-z]{{2}}){_SHORT_UNIT}{_POWER}?")  # 2kg; 2L is a product
_UNIT_POWER = re.compile(rf"(?<![A-Za-z])({_SHORT_UNIT}|inch(?:es)?|feet|units?){_POWER}")
_BEHIND_WHOLE = re.compile(rf"\s*(?:{_UNITS}{_POWER}?)?[\s.]*")
_NAME = re.compile(
    r"(?:\\?[A-Za-z]{3,20}|[A-Z]{2}|[A-Za-z])(?:_\{?\w{1,20}\}?|'|\([a-z]\))?\s*=\s*"
)

# What makes a number the part of something else, directly in front of it or behind it.
_OPERATOR = (
    r"(?:[\^_<>\u2264\u2265\u2260\u221a\u00d7\u00b7*/\u00f7+\u00b1]|\\(?:times|cdot|div|pm|mp|leq?|"
    r"geq?|neq?|lt|gt|sqrt|log|ln|sin|cos|tan|pi|bmod|pmod)(?![a-z]))"
)
_PART_BEFORE = re.compile(
    rf"(?:[\w.|{{-]|{_OPERATOR}\s*|[A-Za-z]\(|[0-9] ?[:,]|[0-9], +|[0-9] ?x +"
    r"|[0-9] ?(?:%|[A-Za-z]+)? (?:or(?: [a-z]+)?|to|and) )\Z"  # 4 or 5
)
_VARIABLE = r"[a-fijnp-rt-z](?![A-Za-z])"
_PART_BEHIND = re.compile(
    rf"[\w(]|[.,:][0-9]|\s*{_OPERATOR}(?<![*/])|\s*\*\s*[\w(\\]|\s*/\s*(?:[0-9(\\]|{_VARIABLE})"
    rf"|\s*-\s*(?:{_VARIABLE}|[0-9(\\\u221a])|\s+{_VARIABLE}(?! [A-Za-z])"
    r"| and a (?:half|third|quarter)"
)


def parse_number(text):
    """The number that a text consists of, as a Fraction, or None: with a sign, thousands, decimals,
    a currency or a unit, behind `x =`; 3/4, 2 1/2, \\frac{3}{4}; $1.2 million."""
    if len(text) > LONGEST:
        return None
    text = plain(text.strip().strip("$*")).strip()
    if name := _NAME.match(text):
        text = text[name.end() :]
    sign = re.match(r"[$\u20ac\u00a3]?\s*(-?)\s*[$\u20ac\u00a3]?\s*", text)
    number = _NUMBER.match(text, sign.end())
    if number is None:
        return None
    scale, behind = _scale(text[number.end() :].rstrip("$\u20ac\u00a3 "))
    if unit := _GLUED_UNIT.match(behind):
        behind = behind[unit.end() :]
    glued = re.match(r"\w", behind)
    if glued or not _BEHIND_WHOLE.fullmatch(behind):
        return None
    return _value(number, bool(sign.group(1)), scale)


def last_number(text):
    """The last number in a text, as a Fraction; None if there is none, or if the last figures are
    something else: part of an expression, a range, a time, one of two answers."""
    text = _UNIT_POWER.sub(r"\1", _without_bullets(plain(text)))
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    number, behind = numbers[-1], text[numbers[-1].end() :]
    negative, before = _sign(re.sub(r"[$\u20ac\u00a3]\s?\Z", "", text[: number.start()]))
    if negative is None or _PART_BEFORE.search(before[-LONGEST_CONTEXT:]):
        return None
    scale, behind = _scale(behind)
    if unit := _GLUED_UNIT.match(behind):
        behind = behind[unit.end() :]
    factorial = behind.startswith("!") and not re.search("[A-Za-z]{2}", text)
    if _PART_BEHIND.match(behind) or factorial:
        return None
    return _value(number, negative, scale)


def plain(text):
    """One kind of minus, space and fraction; LaTeX's marks for spacing and text taken off."""
    if not _MARKS.search(text):
        return text
    for vulgar, fraction in _VULGAR.items():
        text = re.sub(rf"(?<=[0-9]) ?{vulgar}", f" {fraction}", text).replace(vulgar, fraction)
    for pattern, what in _PLAIN:
        text = re.sub(pattern, what, text)
    return text


def _without_bullets(text):
    """Dashes that open several lines are bullets, not signs."""
    bullet = re.compile(r"^[ \t]*[-*\u2022] ", re.M)
    return bullet.sub("", text) if len(bullet.findall(text)) > 1 else text


def _sign(before):
    """(is the number negative, the text before its sign); (None, ...) in a difference or range."""
    match = re.search(r"-( ?)[$\u20ac\u00a3]?\Z", before)
    if match is None:
        return False, before
    front = before[: match.start()]
    lead = front[-LONGEST_CONTEXT:].rstrip()
    if re.search(r"[\d)\]}%!]\Z|(?<![A-Za-z])[A-Za-z\u03c0]\Z", lead) or re.search(r"\w\Z", front):
        return None, front
    dash = match.group(1) and re.search(r"[A-Za-z]\Z", lead)  # "Answer - 5", but "it is - 5"
    return not dash or bool(re.search(r"\b(?:is|are|equals|be|get|gives)\Z", lead)), front


def _scale(behind):
    """(1000 for "5 thousand", the text behind it); 1 where there is no such word."""
    match = _SCALE.match(behind)
    return (_SCALES[match.group(1).lower()], behind[match.end() :]) if match else (1, behind)


def _value(number, negative, scale):
    part = number.groupdict()
    if part["whole"]:
        top, bottom = int(part["part"]), int(part["parts"])
        value = int(part["whole"]) + Fraction(top, bottom) if top < bottom else None
    elif part["top"]:
        bottom = int(part["bottom"])
        value = Fraction(re.sub("[, ]", "", part["top"])) / bottom if bottom else None
    else:
        value = Fraction(re.sub("[, ]", "", part["decimal"]))
    return None if value is None else value * (-scale if negative else scale)
