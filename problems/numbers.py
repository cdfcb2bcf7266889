"""Numbers in text, as exact fractions: regular expressions, never `eval`, bounded digits.

A text is first written plainly (`plain`). Then its last number is read together with what stands
around it: 5 in "5 apples", "x = 5" or "$5." is the number 5; in "5x", "n - 5", "2^5", "12:5",
"x <= 5" or "4 or 5" it is a part of something else, and nothing is read.
"""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

LONGEST = 200  # characters of a text that is a number
CONTEXT = 60  # characters in front of a number that are looked at

_SIGNS = str.maketrans(  # hyphens and minus signs, spaces, and the punctuation of other scripts
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-")
    | dict.fromkeys("\u2014\u00a0\u2007\u2009\u202f\u3000~", " ")
    | dict(zip("。．，、：；（）！？％＝＄", "..,,:;()!?%=$"))
)
_PLAIN = [  # (pattern, what it becomes), in this order
    (r"(?![0-9])\d", lambda digit: str(unicodedata.digit(digit[0]))),  # digits of other scripts
    (r"\\,(?=[0-9]{3})|\{,\}|,\\! ?(?=[0-9]{3})|(?<=[0-9])[\u2019'](?=[0-9]{3})", ","),  # 10'000
    (r"\\[ ,;:!]|\\q?quad", " "),
    (r"[\u00bc-\u00be\u2150-\u215e]", lambda sign: " " + unicodedata.normalize("NFKC", sign[0])),
    (r"\u2044", "/"),
    (
        r"([0-9] ?)?\\[dt]?frac ?(?:\{ ?(-?) ?([0-9]+) ?\}|([0-9])) ?(?:\{ ?([0-9]+) ?\}|([0-9]))",
        lambda m: " ".join(filter(None, [(m[1] or "").strip(), (m[2] or "") + _over(m)])),
    ),
    (r"\^ ?\{? ?\\circ ?\}?|\u00b0", " degrees "),
    (r"\\(?:text|mathrm|textbf|mathbf|mbox|textrm) ?\{([^{}]*)\}", r" \1 "),
    (r"\\([$%])", r"\1"),
    (r"(?<![A-Z\\])\$([^$\n]{1,80})\$(?![0-9])", r" \1 "),  # a formula, no currency
    (r"\\f?box(?:ed)?(?![a-z]) ?\{?|</?[A-Za-z][\w-]*>", " "),
    (r"\\[()\[\]]|\\(?:left|right)(?![a-z])|\$(?! ?[-+]?[0-9.])", " "),
    (r"(?<![0-9])\*\*|\*\*(?![0-9])", ""),  # bold, not a power
    (r"(?<![0-9)] )(?<![\w)*])\*(-?[$0-9][^*\s]*)\*(?![\w*])", r"\1"),  # italics
    (r"[ \t]+", " "),
]
_MARKS = re.compile(r"[^\x21-\x7e\n ]|[\\$*~<{']|  ")  # a text without them is plain


def _over(found):
    return f"{found[3] or found[4]}/{found[5] or found[6]}"


_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{2,3}){0,12},[0-9]{3}|[0-9]{1,3}(?: [0-9]{3}){1,13}|[0-9]{1,40})"
_NUMBER = re.compile(
    r"([0-9]{1,40}) +([0-9]{1,3})/([0-9]{1,3})"  # 2 1/2
    rf"|({_WHOLE}) ?/ ?([0-9]{{1,40}})"
    rf"|({_WHOLE}(?:\.[0-9]{{1,40}})?|\.[0-9]{{1,40}})(?:[eE]([-+]?[0-9]{{1,3}})(?![0-9]))?"
)
_SCALES = dict(hundred=10**2, thousand=10**3, million=10**6, billion=10**9, trillion=10**12)
_SCALES |= {"百": 100, "千": 1000, "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_SCALES |= {"백": 100, "천": 1000, "만": 10**4, "억": 10**8}
_SCALE = re.compile(rf"\s*({'|'.join(_SCALES)})(?![A-Za-z])", re.I)
_CURRENCIES = {"$": "dollar", "\u20ac": "euro", "\u00a3": "pound"}
_CURRENCY = r"(?:(?:US)?\$|[\u20ac\u00a3]) ?"
_SIGN = re.compile(rf"(?:([-+])( ?)(?:{_CURRENCY})?|{_CURRENCY}([-+]?) ?)?\Z")

# Units: abbreviations with the word that each stands for; and words, but for those that make
# another number of it. A run of letters of another script is a word, too.
_SHORT = dict(
    pair.split()
    for pair in (
        "m meter,cm centimeter,dm decimeter,km kilometer,mm millimeter,g gram,kg kilogram,"
        "mg milligram,l liter,L liter,ml milliliter,s second,sec second,secs second,"
        "ms millisecond,h hour,hr hour,hrs hour,min minute,mins minute,ft foot,in inch,yd yard,"
        "mi mile,mph mile/hour,lb pound,lbs pound,oz ounce,W watt,kW kilowatt,Wh watthour,"
        "kWh kilowatthour,N newton,J joule,V volt,C celsius,F fahrenheit"
    ).split(",")
)
_WORDS = {"%": "percent", "feet": "foot", "inche": "inch", "metre": "meter", "litre": "liter"}
_KNOWN = {word for words in _SHORT.values() for word in words.split("/")} | set(
    "percent degree radian dollar cent euro pound yen yuan rupee peso won inch foot square cubic "
    "day week month year".split()
)
_SHORT_UNIT = rf"(?:{'|'.join(sorted(_SHORT, key=len, reverse=True))})(?![A-Za-z])"
_LETTERS = r"[^\x00-\u03ff\U00010000-\U0010ffff\W\d_]"  # of other scripts than Latin and Greek
_DENIED = "(?:아니|않|ではな|じゃな|不|没)"  # behind what is denied
_WORD_UNIT = (
    "(?:(?!(?:and|than|less|more|most|least|about|times|plus|minus|over|mod|modulo|for|choose|half|"
    "or|squared|cubed|factorial|sqrt|log|sin|cos|tan|unless|when|where|but|not|neither|either|root|"
    "infinity|hundred|thousand|million|billion|trillion)(?![A-Za-z]))[A-Za-z]{3,20}"
    rf"|(?!\S{{0,3}} ?{_DENIED}){_LETTERS}{{1,20}})"
)
_UNIT = rf"(?:{_SHORT_UNIT}|{_WORD_UNIT})"
_UNITS = re.compile(  # "5 kg", "5 dollars per hour", "5 %"
    rf"(?:\s*(?:%|(?:per | ?/ ?)?{_UNIT}(?:(?: ?/ ?| per | an? |[ -]){_UNIT}){{0,4}}))?[\s.]*"
)
_GLUED = re.compile(  # 5kg
    rf"(?=g|[A-Za-z]{{2}}){_SHORT_UNIT}|(?={_LETTERS}|[A-Za-z]{{4}}){_WORD_UNIT}(?![(A-Za-z0-9])"
)
_POWER = re.compile(
    rf"(?<=[0-9 /])({_UNIT})( ?(?:\^ ?\{{?[23]\}}?|[\u00b2\u00b3])| squared| cubed)"
)
_NAMED = r"(?:\\?[A-Za-z]{3,20}|[A-Z]{2}|[A-Za-z])(?:_\{?\w{1,20}\}?|'|\([a-z]\))?"
_NAME = re.compile(rf"(?:({_NAMED})\s*=\s*)?")

# What makes a number the part of something else, directly in front of it or behind it. Between two
# numbers these words say that the answer is one of two, a range, or two.
_BOTH = r"or(?: [a-z]+)?|to|and|oder|und|ou|et|или|и|또는|[ouey]|[或和与到至]"
_OPERATOR = r"(?:[\^_<>\u2264\u2265\u2260\u221a\u00d7\u00b7*/\u00f7+\u00b1]|\\[A-Za-z]+)"
_PART_BEFORE = re.compile(
    rf"(?:[A-Za-z0-9_.|{{-]|{_OPERATOR}\s*|(?<![A-Za-z])(?:log|ln|sin|cos|tan|sqrt|mod) ?"
    r"|[A-Za-z]\(|第|分之|[0-9] ?[:,]|[0-9], +|[0-9] ?x +"
    rf"|[0-9] ?(?:%|[A-Za-z]+|{_LETTERS}{{1,3}}?)? ?"
    rf"(?:(?<= )(?:{_BOTH}) |[\u6216\u548c\u4e0e\u5230\u81f3])"  # 4 or 5
    r"|\b(\w{1,10}) ?= ?[-+0-9./]{1,20}(?:,? or \w{1,10}|(?:,| and) \1) ?= ?"  # x = 4, x = 5
    r"|\b(?:not|never|nicht|pas|no es|n[aã]o|не) |n't |(?:不|没|非|未)[是为等于有]{0,2} ?)\Z"
)
_VARIABLE = r"[a-fijnp-rt-z](?![A-Za-z]|\.[a-z]|-[a-z]{2})"  # but for p.m., i.e., t-shirts
_PART_BEHIND = re.compile(
    r"[A-Za-z0-9_(\u0370-\u03ff\u00b2\u00b3\u00b9\u2070-\u209f]|[.,:][0-9]"
    rf"|\s*{_OPERATOR}(?<![*/])|\s*\*\s*[\w(\\]"
    rf"|\s*/\s*(?:[0-9(\\]|{_VARIABLE})|\s*-\s*(?:{_VARIABLE}|[0-9(\\\u221a])"
    rf"|\s+{_VARIABLE}(?! [A-Za-z])|\s+(?:squared|cubed|factorial)| and a (?:half|third|quarter)"
    rf"| or not|분의|分之|\S{{0,3}} ?{_DENIED}"
)


class Quantity(NamedTuple):
    """A number and what a text says of it; each is empty where the text does not say it."""

    value: Fraction
    name: str  # "x" in "x = 5"
    units: frozenset  # of words: {"meter", "second"} in "5 m/s"


def parse_quantity(text):
    """Return the Quantity that a text consists of, or None: a number with a sign, thousands,
    decimals, a currency or a unit, behind `x =`; 3/4, 2 1/2, \\frac{3}{4}; $1.2 million; 1e-5."""
    found = _last(text.strip().strip("*")) if len(text) <= LONGEST else None
    if found is None:
        return None
    value, before, behind, unit = found
    name = _NAME.fullmatch(before)
    if not name or not _UNITS.fullmatch(behind):
        return None
    return Quantity(value, (name[1] or "").replace("{", "").replace("}", ""), _unit_words(unit))


def parse_number(text):
    """Return the number that a text consists of, as a Fraction, or None."""
    found = parse_quantity(text)
    return found and found.value


def last_quantity(text):
    """Return the last Quantity in a text; None if there is none, or if the last figures are
    something else: part of an expression, a range, a time, one of two answers.

    Any word may follow a number in a sentence, so only known units and words of other scripts count
    as its units.
    """
    found = _last(text)
    if found is None:
        return None
    value, before, _, unit = found
    unit = re.match(rf"(?:{_CURRENCY})?[0-9]* ?(?:{_UNIT})?(?: ?(?:/|per) ?{_UNIT})?", unit)[0]
    words = {word for word in _unit_words(unit) if word in _KNOWN or word > "\u03ff"}
    name = re.search(rf"(?<![A-Za-z])({_NAMED})\s*=\s*\Z", before)
    return Quantity(value, name[1] if name else "", frozenset(words))


def last_number(text):
    """Return the last number in a text, as a Fraction, or None."""
    found = last_quantity(text)
    return found and found.value


def same_quantity(stated, answer):
    """Return whether two quantities agree: the values, and names and units where both have them.

    Known units must be the same. Of other words one side may have more: "5 red apples", "5 apples".
    """
    if stated is None or answer is None or stated.value != answer.value:
        return False
    if stated.name and answer.name and stated.name != answer.name:
        return False
    a, b = stated.units, answer.units
    if not a or not b or a == b:
        return True
    if a | b <= _KNOWN:
        return False
    return a <= b or b <= a or any(x.startswith(y) or y.startswith(x) for x in a for y in b)


def _unit_words(text):
    """Return the words of a unit: "m/s" and "meters per second" are {"meter", "second"}."""
    for sign, word in _CURRENCIES.items():
        text = text.replace(sign, f" {word} ")
    words = set()
    for word in re.findall(r"%|[^\W\d_]+", text):
        if word in _SHORT:
            words |= set(_SHORT[word].split("/"))
            continue
        word = word.lower().removesuffix("s")
        words.add(_WORDS.get(word, word))
    return frozenset(words - {"per", "a", "an", "us"})


def _last(text):
    """(last number, text before its sign, text behind its scale and glued unit, its unit)."""
    text = plain(text).strip()
    if len(re.findall(r"(?m)^[ \t]*[-*\u2022] ", text)) > 1:  # dashes that open lines are no signs
        text = re.sub(r"(?m)^[ \t]*[-*\u2022] ", "", text)
    text = _POWER.sub(
        lambda m: ("square " if "2" in m[0] or "²" in m[0] or "sq" in m[0] else "cubic ") + m[1],
        text,
    )
    numbers = list(_NUMBER.finditer(text))
    sign, before = _sign(text[: numbers[-1].start()]) if numbers else (0, "")
    if not sign or _PART_BEFORE.search(before[-CONTEXT:]):
        return None
    currency = text[len(before) : numbers[-1].start()]
    behind = text[numbers[-1].end() :]
    unit = currency + behind
    behind = behind.rstrip("$\u20ac\u00a3 ")
    if scale := _SCALE.match(behind):
        behind = behind[scale.end() :]
        unit = currency + behind
    if glued := _GLUED.match(behind):
        behind = behind[glued.end() :]
    factorial = behind.startswith("!") and not re.search("[A-Za-z]{2}", text)
    value = _value(*numbers[-1].groups())
    if _PART_BEHIND.match(behind) or factorial or value is None:
        return None
    return value * sign * (_SCALES[scale[1].lower()] if scale else 1), before, behind, unit


def plain(text):
    """Return a text with one kind of minus, space, digit and fraction, without LaTeX's marks for
    spacing and text."""
    if _MARKS.search(text):
        text = text.translate(_SIGNS)
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
    if operand or re.search(r"[A-Za-z0-9_]\Z", front) or (sign == "+" and not opens):
        return 0, front
    dash = found[2] and re.search(r"[A-Za-z]\Z", lead)  # "Answer - 5", but "it is - 5"
    return -1 if sign == "-" and (opens or not dash) else 1, front


def _value(whole, part, parts, top, bottom, decimal, exponent):
    """The fraction that _NUMBER's groups stand for; None for 3 5/2 and for a division by zero."""
    if whole:
        return int(whole) + Fraction(int(part), int(parts)) if int(part) < int(parts) else None
    bottom = int(bottom or 1)
    value = Fraction(re.sub("[, ]", "", top or decimal)) * Fraction(10) ** int(exponent or 0)
    return value / bottom if bottom else None
