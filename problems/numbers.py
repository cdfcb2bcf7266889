"""Numbers in text, as exact fractions: regular expressions, never `eval`, bounded digits.

A text is first written plainly (`plain`). Then its last number is read together with what stands
around it: 5 in "5 apples", "x = 5" or "$5." is the number 5; in "5x", "n - 5", "2^5", "12:5",
"x <= 5" or "4 or 5" it is a part of something else, and nothing is read.
"""

import itertools
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

LONGEST = 200  # characters of a text that is a number
CONTEXT = 60  # characters in front of a number that are looked at

SIGNS = str.maketrans(  # hyphens and minus signs, spaces, and the punctuation of other scripts
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-")
    | dict.fromkeys("\u2014\u00a0\u2007\u2009\u202f\u3000~", " ")
    | dict(zip("。．，、：；（）！？％＝＄", "..,,:;()!?%=$"))
)
_PLAIN = [  # (pattern, what it becomes), in this order
    (r"(?![0-9])\d", lambda digit: str(unicodedata.digit(digit[0]))),  # digits of other scripts
    (r"\\,(?=[0-9]{3})|\{,\}|,\\! ?(?=[0-9]{3})|(?<=[0-9])[\u2019'](?=[0-9]{3})", ","),  # 10'000
    (r"\\(?:[ ,;:!]|q?quad|displaystyle|textstyle|bf(?![a-z]))", " "),
    (r"[\u00bc-\u00be\u2150-\u215e]", lambda sign: " " + unicodedata.normalize("NFKC", sign[0])),
    (r"\u2044", "/"),
    (
        r"([0-9] ?)?\\[dtc]?frac ?(?:\{ ?(-?) ?([0-9]+) ?\}|([0-9])) ?(?:\{ ?([0-9]+) ?\}|([0-9]))",
        lambda m: " ".join(filter(None, [(m[1] or "").strip(), (m[2] or "") + _over(m)])),
    ),
    (r"\^ ?\{? ?\\circ ?\}?|\u00b0", " degrees "),
    (r"\\(?:text|mathrm|textbf|mathbf|mbox|textrm|textit|boldsymbol|bm) ?\{([^{}]*)\}", r" \1 "),
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

# A unit is an abbreviation, which stands for a word, or a word itself. Words that would change the
# number ("dozen") are no units. In other scripts, only the counters listed below are units.
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
_WORDS = {"公斤": "kilogram", "千克": "kilogram", "克": "gram"}
_WORDS |= {"米": "meter", "度": "degree"}
_WORDS |= {"%": "percent", "feet": "foot", "inche": "inch", "metre": "meter", "litre": "liter"}
_KNOWN = {word for words in _SHORT.values() for word in words.split("/")} | set(
    "percent degree radian dollar cent euro pound yen yuan rupee peso won inch foot square cubic "
    "day week month year".split()
)
_SHORT_UNIT = rf"(?:{'|'.join(sorted(_SHORT, key=len, reverse=True))})(?![A-Za-z])"
DENIED = (
    "(?:아니|아닙|않|오답|ではな|ではあ|じゃな|でない|とは限|間違|違う|错|[不没非误]"
    "|\\bневерно|\\bfalsch|\\bnicht|\\bfaux|\\bpas\\b|\\bkein|\\bfalso|خطأ|ليس|değil)"
)
# of other scripts: counters and measures, and what may end a sentence behind them
_COUNTERS = (
    "个|個|元|人|名|只|枚|本|冊|册|円|年|月|日|時間|時|天|岁|歳|米|厘米|千米|公里"
    "|克|千克|公斤|度|分|秒|小时|分钟|次|组|种|条|张|平方米|立方米|개|명|원|번|년|월"
    "|일|시간|시|분|초|마리|권|장|도|руб|рублей|метров|км|см|кг"
)
_ENDING = "(?:입니다|이다|예요|이에요|です|だ|である)?"
_WORD_UNIT = (
    "(?:(?!(?:and|than|less|more|most|least|about|times|plus|minus|over|mod|modulo|for|choose|half|"
    "or|squared|cubed|factorial|sqrt|log|sin|cos|tan|unless|when|where|but|not|neither|either|root|"
    "infinity|hundred|thousand|million|billion|trillion|dozen|pairs?|lakh|crore|ist|est|wrong|"
    "incorrect|false|falsch|faux|falso|nicht|nor|vs)(?![A-Za-z]))[A-Za-z]{3,20}"
    rf"|(?:{_COUNTERS}){_ENDING}(?![^\W\d_]))"
)
_UNIT = rf"(?:{_SHORT_UNIT}|{_WORD_UNIT})"
_UNITS = re.compile(  # "5 kg", "5 dollars per hour", "5 %"
    rf"(?:\s*(?:%|(?:per | ?/ ?)?{_UNIT}(?:(?: ?/ ?| per | an? |[ -]){_UNIT}){{0,4}}))?[\s.]*"
)
_GLUED = re.compile(  # 5kg
    rf"(?=g|[A-Za-z]{{2}}){_SHORT_UNIT}"
    rf"|(?=[^\x00-\u03ff]|[A-Za-z]{{4}}){_WORD_UNIT}(?![(A-Za-z0-9])"
)
_POWER = re.compile(
    rf"(?<=[0-9 /])({_UNIT})( ?(?:\^ ?\{{?[23]\}}?|[\u00b2\u00b3])| squared| cubed)"
)
_NAMED = r"(?:\\?[A-Za-z]{3,20}|[A-Z]{2}|[A-Za-z])(?:_\{?\w{1,20}\}?|'|\([a-z]\))?"
_NAME = re.compile(rf"(?:({_NAMED})\s*=\s*)?")

# What makes a number the part of something else, directly in front of it or behind it. Between two
# numbers these words say that the answer is one of two, a range, or two.
BOTH = r"or(?: [a-z]+)?|to|and|oder|und|ou|et|или|и|또는|[ouey]|[或和与到至]"
_OPERATOR = r"(?:[\^_<>\u2264\u2265\u2260\u221a\u00d7\u00b7*/\u00f7+\u00b1]|\\[A-Za-z]+)"
_PART_BEFORE = re.compile(
    rf"(?:[A-Za-z0-9_.|{{-]|{_OPERATOR}\s*|(?<![A-Za-z])(?:log|ln|sin|cos|tan|sqrt|mod) ?"
    r"|[A-Za-z]\(|[-+*/^] ?\(|[0-9] ?[:,]|[0-9][,;] +|[0-9] ?x +"
    rf"|[0-9] ?(?:%|[A-Za-z]+|(?:{_COUNTERS}))? ?"
    rf"(?:(?<= )(?:{BOTH}) |[\u6216\u548c\u4e0e\u5230\u81f3])"  # 4 or 5
    r"|\b(\w{1,10}) ?= ?[-+0-9./]{1,20}(?:,? or \w{1,10}|(?:,| and) \1) ?= ?"  # x = 4, x = 5
    r"|(?:\b(?:not|never|cannot|nor|neither|nicht|kein\w*|pas|jamais|nunca|no es|n[aã]o|non [eè]"
    r"|не)\b"
    rf"|n't\b|{DENIED})(?:(?!\b(?:so|then|but|thus|hence|is|are|has|have)\b)[^.,;:\n])*"
    r"|\b(?:at (?:least|most)|(?:less|more|fewer|greater|larger|smaller|rather) than|minus|negative"
    r"|twice|double|half|root of|remainder|or|menos|минус|mindestens) (?:an? )?"
    r"|(?:至少|至多|大于|小于|负|マイナス|或者|以及|または|第|分之|か)\s?"
    r"|[A-Za-z]\^?\{?[0-9]\}? ?= ?|[-0-9][A-Za-z] ?= ?|\\[a-z]+ [A-Za-z] ?= ?)\Z"
)
_VARIABLE = r"[a-fijnp-rt-z](?![A-Za-z]|\.[a-z]|-[a-z]{2})"  # but for p.m., i.e., t-shirts
_PART_BEHIND = re.compile(
    r"[A-Za-z0-9_(\u0370-\u03ff\u00b2\u00b3\u00b9\u2070-\u209f]|[.,:][0-9]"
    rf"|\s*{_OPERATOR}(?<![*/])|\s*\*\s*[\w(\\]"
    rf"|\s*/\s*(?:[0-9(\\]|{_VARIABLE})|\s*-\s*(?:{_VARIABLE}|[0-9(\\\u221a])"
    rf"|\s+{_VARIABLE}(?! [A-Za-z])|\s+(?:squared|cubed|factorial)| and a (?:half|third|quarter)"
    r"|,? or\b|\) ?[!^]|\s?(?:분의|分之|以上|以下|未満|未满|이상|이하|미만)|\?"
    r"|\s*(?:dozen|pairs?|lakh|crore)\b"
)


class Quantity(NamedTuple):
    """A number and what a text says of it; each is empty where the text does not say it."""

    value: Fraction
    name: str  # "x" in "x = 5"
    units: tuple  # of words: ("meter", "second") in "5 m/s"


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

    Any word may follow a number in a sentence, so only known units and listed counters count as
    its units.
    """
    found = _last(text)
    if found is None:
        return None
    value, before, _, unit = found
    one = rf"(?:(?:square|cubic) )?{_UNIT}"
    unit = re.match(rf"(?:{_CURRENCY})?[0-9]* ?(?:{one})?(?: ?(?:/|per) ?{one})?", unit)[0]
    words = [word for word in _unit_words(unit) if word in _KNOWN or word > "\u03ff"]
    name = re.search(rf"(?<![A-Za-z])({_NAMED})\s*=\s*\Z", before)
    return Quantity(value, name[1] if name else "", tuple(words))


def states_several(text):
    """Return whether a text lists numbers: "1, 2", "x = 1 and y = 2"."""
    text = plain(text)
    pairs = itertools.pairwise(_NUMBER.finditer(text))
    between = (text[a.end() : b.start()] for a, b in pairs)
    return any(re.search(r"[,;]|\\\\|\b(?:and|or)\b", part) for part in between)


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
    if {*a, *b} <= _KNOWN:
        return False
    return set(a) <= set(b) or set(b) <= set(a)


def _unit_words(text):
    """Return the words of a unit: "m/s" and "meters per second" are ("meter", "second")."""
    for sign, word in _CURRENCIES.items():
        text = text.replace(sign, f" {word} ")
    words = []
    for word in re.findall(rf"%|(?:{_COUNTERS})(?={_ENDING}(?![^\W\d_]))|[A-Za-z]+", text):
        if word in _SHORT:
            words += _SHORT[word].split("/")
            continue
        word = word.lower().removesuffix("s")
        words.append(_WORDS.get(word, word))
    return tuple(word for word in words if word not in ("per", "a", "an", "us"))


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
    wrong = re.search(rf"(?i)\b(?:not|isn't|wrong|incorrect|false)\b|{DENIED}", behind)
    if _PART_BEHIND.match(behind) or wrong or factorial or value is None:
        return None
    return value * sign * (_SCALES[scale[1].lower()] if scale else 1), before, behind, unit


def plain(text):
    """Return a text with one kind of minus, space, digit and fraction, without LaTeX's marks for
    spacing and text."""
    if _MARKS.search(text):
        text = text.translate(SIGNS)
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
