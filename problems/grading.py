"""Is a response right? Two verdicts on a text that a model wrote (docs/grading.md has the rules).

    strict   the answer stands where it was asked for (after ####, in \\boxed{}, or alone)
    lenient  it may also end a sentence: the last number (or expression) of the text counts

The rules extract at most one answer from a response and never use the reference answer to find it.
So no response is correct for two contradictory reference answers.

A response is hostile input: nothing here is evaluated as code, and every verdict
takes bounded time.
"""

import itertools
import re
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

from problems.countdown import evaluate_expression, last_expression, plain_signs
from problems.latex import has_math_verify, latex_equal
from problems.numbers import (
    BOTH,
    DENIED,
    SIGNS,
    last_quantity,
    parse_number,
    parse_quantity,
    plain,
    same_quantity,
    states_several,
)

LONGEST_TEXT = 20_000  # characters of a response that are looked at, from its end
MOST_MARKS = 20  # of #### and \\boxed, from the end
LONGEST_ANSWER = 1_000  # characters of what is compared
LONGEST_LIST = 12  # elements that are compared in any order
THINKING = ("<think>", "</think>")


class Grade(NamedTuple):
    strict: bool
    lenient: bool


def grade(problem, text, finished=True, prompt=""):
    """Return the strict and the lenient verdict on a response; bounded in time whatever it is.

    finished: False where the length cap has cut the response; then only an explicit answer counts
    that is whole and ends the text. prompt: its end tells whether the response begins in a thinking
    part that the prompt has opened.
    """
    text = outside_thinking(text, prompt)[-LONGEST_TEXT:].replace("$$", "$")
    return CHECKS[problem.kind](problem, text.strip() if finished else _before_the_cut(text))


# ------------------------------------------------------------------------ what a response states


def response_texts(responses, tokenizer):
    """Return the texts of responses, lists of ids: each up to its first special token.

    <think> and </think> end no text where they are special tokens. Where they are tokens at all,
    only these tokens bound the thinking: the same letters in other tokens get a space.
    """
    added = tokenizer.added_tokens_decoder
    marks = {i: token.content for i, token in added.items() if token.content in THINKING}
    special = {i for i, token in added.items() if token.special}
    texts = []
    for response in responses:
        said = list(itertools.takewhile(lambda i: i in marks or i not in special, response))
        parts = [[]]
        for i in said:
            if i in marks:
                parts += [marks[i], []]
            else:
                parts[-1].append(i)
        decoded = tokenizer.batch_decode(parts[::2])
        if marks:
            decoded = [text.replace("think>", "think >") for text in decoded]
        texts.append(
            "".join(itertools.chain(*itertools.zip_longest(decoded, parts[1::2], fillvalue="")))
        )
    return texts


def outside_thinking(text, prompt=""):
    """Return what follows the last </think>; "" where thinking has begun and does not end."""
    tags = [*_TAG.finditer(prompt + text)]
    own = [tag for tag in tags if tag.start() >= len(prompt)]
    if tags and not tags[-1][1]:
        return ""
    return text[own[-1].end() - len(prompt) :] if own else text


_TAG = re.compile(r"(?i)<(/?)(?:think|thinking|thought|reasoning)>")


class Statement(NamedTuple):
    """What a mark, #### or \\boxed, states, and where: text[start:end], the mark included."""

    text: str
    start: int
    end: int
    is_box: bool


_MARK = re.compile(r"#{4,}|\\f?box(?:ed)?(?![A-Za-z])\s*")
_PROSE = re.compile(r"(?<![\\A-Za-z{])(?:[A-Za-z]{3,}|[A-Za-z]{2} [A-Za-z]{2})")  # no command
_BETWEEN_BOXES = re.compile(
    r"(?:[\s,;.$&*/|\u3001]|\\[()\[\]]|\\(?:q?quad|lor|,|;)|\\text *\{|\}|\n *(?:-|[0-9]\.)"
    rf"|\([a-z0-9]\)|\b(?:maybe|{BOTH})\b|[\u6216\u548c\u4e0e]"
    r"|\\?[A-Za-z]+(?:_\{?\w\}?)?(?:\(\w\))? *=)*"
)
# what makes a box a part of something else: an operation, a denial, another answer
_TOUCHED = re.compile(
    r"(?:[A-Za-z0-9^_{\u2212-]|(?<!\*)\*|[\w)}] ?[-+*/] ?"
    r"|(?:\b(?:not|never|or|nor|minus|negative)|n't) [$\\(\[ *]*)\Z"
)
_TOUCHING = re.compile(
    r"[$*]*(?:(?!\^ ?\{? ?\\circ)[\^_!]|\\(?!text|mbox|mathrm|q?quad|[ %,;)\]])[a-z]|[0-9A-Za-z])"
    r"|[\s$*]*(?:\?|[+*/=-] ?[\w\\]|(?:\\text ?\{ ?)?(?:or|nor|vs|million|thousand|billion)\b)"
    r"|[\s$*]*(?:isn't|is (?:not|wrong|incorrect|false))\b"
)


def statements(text):
    """Return the last Statements of a text, in its order; empty marks state nothing."""
    found = []
    for mark in list(_MARK.finditer(text))[-MOST_MARKS:]:
        is_box = mark[0][0] != "#"
        stated, length = (_boxed if is_box else _on_line)(text[mark.end() :])
        if stated:
            found.append(Statement(stated, mark.start(), mark.end() + length, is_box))
    return found


def _is_part(before, behind):
    """Return whether a box is a part of something else, as in "-\\boxed{5}" or "not \\boxed{5}"."""
    front = before[-40:].replace("**", "")
    bullet = re.search(r"(?:\A|\n) *[-*] +\Z", front)
    return bool(not bullet and _TOUCHED.search(front)) or bool(_TOUCHING.match(behind[:40]))


def explicit_answer(text):
    """Return what the last mark states; without a mark, a text of one line; or None.

    Boxes with nothing but "and", "or", a comma or `x =` between them state one answer of several
    values: "3 or 5".
    """
    found = statements(text)
    if not found:
        return None if _MARK.search(text) or "\n" in text else text or None
    values = [found.pop()]
    while found and found[-1].is_box and values[0].is_box and found[-1].end <= values[0].start:
        if not _BETWEEN_BOXES.fullmatch(text[found[-1].end : values[0].start]):
            break
        values.insert(0, found.pop())
    if values[0].is_box and _is_part(text[: values[0].start], text[values[-1].end :]):
        return ""
    return " or ".join(dict.fromkeys(value.text for value in values))


def _before_the_cut(text):
    """Return the last Statement of a response that was cut, if it is whole and nothing follows."""
    found = statements(text)
    if not found or re.search(r"[^\s.$*\])]", text[found[-1].end :]):
        return ""
    last = found[-1]
    whole = text[last.end - 1] == "}" if last.is_box else text[last.end : last.end + 1] == "\n"
    return text[: last.end] if whole else ""


def _on_line(text):
    """(the first line, its length), unless it is a heading: words that more text follows."""
    line, _, more = text.partition("\n")
    words = _PROSE.search(line) and parse_number(line) is None and not _YES.fullmatch(line)
    return "" if more.strip() and words else line.strip(), len(line)


def _boxed(text):
    """(the content of the braces that a text begins with, or its first word; its length); nothing
    if the braces never close."""
    if not text.startswith("{"):
        word = re.match(r"[^\s{}$]*", text)[0].rstrip(".,;")
        return word, len(word)
    opened, pairs = [], {}
    for brace in re.finditer(r"(?<!\\)[{}]", text):
        if brace[0] == "{":
            opened.append(brace.start())
        else:
            pairs[opened.pop()] = brace.start()
        if not opened:
            break
    depth = 0
    while depth + 1 in pairs and pairs[depth + 1] == pairs.get(0, 0) - depth - 1:  # {{5}}
        depth += 1
    return (text[depth + 1 : pairs[0] - depth].strip(), pairs[0] + 1) if 0 in pairs else ("", 0)


# -------------------------------------------------------------------------------- is it the same?

_OPTIONS = re.compile(r"[A-H](?:(?:, ?)?[A-H])+")  # ABD; A, B, D
_MATHEMATICS = re.compile(r"(?s)\s*(?:\$.+\$|\\\(.+\\\)|\\\[.+\\\])[\s.]*")
_VARIABLE = r"(?<![A-Za-z])[0-9]*[a-z](?![A-Za-z]|\.[a-z])"  # x, 2k: no word, no capital, no a.m.
_SIGN = r" ?[-+*/=<>\u2264\u2265\u2260\u00b1] ?"
_ALGEBRA = re.compile(
    rf"\\[A-Za-z{{]|\^|[\w)\]] ?[+*=<>\u2264\u2265\u2260\u00b1] ?[-(]?\w"
    rf"|{_VARIABLE}{_SIGN}\(?(?:{_VARIABLE}|[0-9])|[0-9)]{_SIGN}\(?{_VARIABLE}"
)


def kind_of(answer):
    """Return how a reference answer is checked, by CHECKS' names; None where that cannot be."""
    if parse_number(answer) is not None:
        return "number"
    if is_mathematics(answer) or any(map(is_mathematics, _elements(answer)[1])):
        return "latex" if has_math_verify() else None
    return "text"


def is_mathematics(answer):
    """Return whether an answer is mathematics by its own marks.

    The marks are $...$, \\(...\\) or \\[...\\] around it; a LaTeX command but for \\text and the
    like; a power; + * = < > between two terms; - or / next to a variable, which is one lower-case
    letter.
    """
    words = plain(answer)
    in_dollars = _MATHEMATICS.fullmatch(answer) and not _PROSE.search(words)
    return parse_number(answer) is None and bool(in_dollars or _ALGEBRA.search(words))


def same_answer(stated, answer):
    """Return whether two texts state the same: as options, quantities, lists, mathematics or words,
    whichever the reference answer is."""
    if len(stated) > LONGEST_ANSWER:
        return False
    stated, answer = (
        _PREFIX.sub("", _WRAPPED.sub(r"\1", x.strip())).strip() for x in (stated, answer)
    )
    if (letters := set(_letters(answer))) and len(letters) > 1:
        return set(_letters(stated)) == letters
    if (quantity := parse_quantity(answer)) is not None:
        return same_quantity(parse_quantity(stated), quantity)
    brackets, elements = _elements(answer)
    own, given = _elements(stated)
    if not brackets:
        same = _same_mathematics if is_mathematics(answer) else _same_words
        return (own in ("", ",", "or", "and") or is_mathematics(answer)) and same(stated, answer)
    words = {"or", "and", ","}
    loose = {own, brackets} <= words and not re.search(_RELATION, answer)
    if parse_number(stated) is not None or (own != brackets and not loose):
        return False
    if len(given) != len(elements):
        return False
    if brackets not in ("or", "and", "".join(_SET_BRACES.values())) or len(elements) > LONGEST_LIST:
        return all(map(same_answer, given, elements))
    for element in elements:  # in any order
        match = next((g for g in given if same_answer(g, element)), None)
        if match is None:
            return False
        given.remove(match)
    return True


_WRAPPED = re.compile(r"(?s)\A\\text ?\{([^{}]*)\}\Z")
_PREFIX = re.compile(r"(?:\$ ?)?(?:\\?[A-Za-z]+ *\\in\b|\([A-Za-z\\, ]+\) *=) *")
_RELATION = r"[<>\u2264\u2265\u2260\u2248\u2261]|\\(?:[lg]eq?|[lg]t|neq?|approx|equiv|not)(?![a-z])"


def _letters(text):
    """The options that a text consists of, each once: "ABD" and "A, B, D"; "" if it is no such."""
    found = _OPTIONS.fullmatch(plain(text).strip(" .$"))
    letters = re.sub("[, ]", "", found[0]) if found else ""
    return letters if len(set(letters)) == len(letters) else ""


def _elements(text):
    """Return (brackets, elements) of a list, ("(]", ["0", "1"]) of "(0, 1]"; ("", [text]) of a text
    that is no list. The brackets of a bare list are ",", or "or" where words separate it."""
    text = re.sub(
        r"\\(?:left|right|big)(?![a-z])|\\[,;!:()\[\]]|(?<!\\)\$", "", text.translate(SIGNS)
    )
    text = text.strip(" .*\n")
    if text[:1] + text[-1:] == "{}":  # a set without LaTeX
        text = f"\\{text[:-1]}\\}}"
    for sign in "{}":  # a set's braces as one character each, unlike those around an argument
        text = text.replace(f"\\{sign}", _SET_BRACES[sign])
    depths = list(itertools.accumulate((c in "([{\u2983") - (c in ")]}\u2984") for c in text))
    if text and text[0] in "([\u2983" and 0 in depths and depths.index(0) == len(text) - 1:
        brackets, parts = text[0] + text[-1], _split(text[1:-1])
        listed = len(parts) > 1 or text[0] == _SET_BRACES["{"]
    else:
        brackets, parts = ",", _split(text)
        if len(parts) == 1:
            brackets = "and" if re.search(r"\band\b", text) else "or"
            parts = re.split(r"\s+(?:or|and)\s+", plain(text))
        parts[-1] = re.sub(r"^\s*and\s", "", parts[-1])  # 1, 2, and 3
        listed = len(parts) > 1 and all(_is_value(_unbraced(part)) for part in parts)
    parts = parts if listed else [text]
    return brackets if listed else "", [_unbraced(part).strip() for part in parts]


def _unbraced(text):
    """Return a text with LaTeX's own braces of a set."""
    for sign, brace in _SET_BRACES.items():
        text = text.replace(brace, f"\\{sign}")
    return text


_SET_BRACES = {"{": "\u2983", "}": "\u2984"}


def _is_value(text):
    return parse_number(text) is not None or is_mathematics(text)


def _split(text):
    """Return the parts of a text between the commas that stand in no brackets."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([{\u2983") - (sign in ")]}\u2984")
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def _same_mathematics(stated, answer):
    """Return math-verify's verdict, unless the texts differ in something that it does not see."""
    mended = (re.sub(r"\*\*|\\[()\[\]]|\[\d+pt\]", "", x) for x in (stated, answer))
    stated, answer = (" ".join(x.split()).strip("$ .:,") for x in mended)
    if stated == answer:
        return True
    if not stated or (re.search(_DOUBT, stated) and not re.search(_DOUBT, answer)):
        return False
    if re.search(_UNSEEN, stated) or re.search(_UNSEEN, answer):
        return _closed_up(stated) == _closed_up(answer)
    chained = "=" in stated and "=" not in answer and not _NAMED.match(stated)
    parted = ";" in stated and ";" not in answer
    if chained or parted or _DIGIT_BEHIND.search(stated) or _differs(stated, answer):
        return False
    return latex_equal(stated, answer)


# what math-verify takes for something else, or for nothing: compared as it is written
_UNSEEN = (
    r"'|\\(?:pmod|bmod|mod|overline|bar|dot|ddot|hat|vec|prime|circ|not|top)(?![a-z])|\^\{?T\b"
    r"|\\[dt]?frac ?\{ ?(?:d|\\partial)"
)
_NAMED = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([A-Za-z, ]+\))? *=[^=]*\Z")
_DIGIT_BEHIND = re.compile(r"(?<![\\A-Za-z])[A-Za-z][0-9]")  # x2 is no product
_UNIT = r"\\(?:text|mathrm|mbox) ?\{ ?([^{}]*?) ?\}( ?\^ ?\{? ?[0-9])?"
_WORD = r"(?<![\\A-Za-z])[A-Za-z]{2,}(?![A-Za-z{])"


def _differs(stated, answer):
    """Return whether two formulas differ in relations, bases of numbers, units, words or case."""
    bases, relations, units, words, names = (
        [re.findall(pattern, x) for x in (stated, answer)]
        for pattern in (r"[0-9]_\{?([0-9]+)", _RELATION, _UNIT, _WORD, r"\\[A-Za-z]+|[A-Za-z]")
    )
    lower = [{name.lower() for name in found} for found in names]
    return (
        bases[0] != bases[1]
        or relations[0] != relations[1]
        or (all(units) and units[0] != units[1])
        or (all(words) and set(words[0]) != set(words[1]))
        or (lower[0] == lower[1] and set(names[0]) != set(names[1]))
    )


def _closed_up(text):
    """Return a formula without spaces, and with one kind of fraction and brackets."""
    text = re.sub(r"\\(?:left|right)(?![a-z])|\\[,;!: ]|[ ${}]", "", text)
    return re.sub(r"\\[dt]frac", r"\\frac", text)


def _words(text):
    """Return a text without LaTeX's marks, case, and the punctuation and article around it: "(B)."
    is "\\text{B}". Signs stay: "-yes", "yes!" and "1/yes" are not "yes"."""
    text = re.sub(r"[\\{}$]", "", plain(text))
    text = " ".join(word if _is_symbol(word) else word.casefold() for word in text.split())
    text = re.sub(r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})", " ", " ".join(text.split()))
    return re.sub(r"^(?:an?|the) (?=\w)", "", text.strip(' .,;:()[]"\u201c\u201d`_'))


def _is_symbol(word):
    """Return whether case counts in a word: it does in "Co" and "CO", "US" and "mW"."""
    letters = re.findall(r"[^\W\d_]", word)
    return (
        len(letters) == 2
        and word[1:] != word[1:].lower()
        or word[:1].islower()
        and word != word.lower()
    )


def _same_words(stated, answer):
    """Return whether two texts are the same words; "n - 1" is "n-1", and "3 x 4" is "3x4"."""
    space = r" ?([-+*/=<>:,]) ?|(?<=[0-9]) (?=[a-z])|(?<=[a-z]) (?=[0-9])"
    first, second = (re.sub(space, r"\1", _words(text)) for text in (stated, answer))
    return first == second != ""


# --------------------------------------------------------------------------------------- verdicts


def _grade_integer(problem, text):
    """Of the built-in tasks: the integer stated explicitly, or the last one of the text."""
    explicit = explicit_answer(text)
    alone = explicit and _INTEGER.fullmatch(explicit.strip("$*. "))
    stated = alone or _LAST_INTEGER.search(text.replace("**", ""))
    right = bool(stated) and int(stated[1].replace(",", "")) == int(problem.answer)
    return Grade(bool(alone) and right, right)


_DIGITS = r"(-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,40}))"
_INTEGER = re.compile(rf"\+?{_DIGITS}")
# not a part of a decimal, an expression, a time or a range, and no other figure behind it
_LAST_INTEGER = re.compile(
    r"(?<![\w.,:/*+^-])(?<![-+*/^] )(?<![0-9] (?:or|to) )(?<![0-9] and )(?<!\bnot )"
    rf"{_DIGITS}(?![\w/*+^(]|[.,:][0-9]| ?[-+*/^=] ?[0-9])[^0-9]*\Z"
)


def _grade_number(problem, text):
    explicit, answer = explicit_answer(text), parse_quantity(problem.answer)
    stated = None if explicit is None else parse_quantity(explicit)
    if stated is not None:
        right = same_quantity(stated, answer)
        return Grade(right, right)
    if explicit is None:
        return Grade(False, same_quantity(last_quantity(text), answer))
    # what is marked and is no number is looked through, unless it states several values
    several = explicit != text and states_several(explicit)
    stated = None if several else last_quantity(explicit)
    return Grade(False, same_quantity(stated, answer))


def _grade_latex(problem, text):
    stated = explicit_answer(text)
    prose = stated == text != problem.answer and _PROSE.search(stated)
    strict = stated is not None and not prose
    right = same_answer(stated if strict else _formula(text), problem.answer)
    return Grade(strict and right, right)


_FORMULA = re.compile(  # the first group and the last: one of two, or denied
    r"(?s)(\b(?:not|never|or|and)\s+|n't\s+|(?<=[$)\]]),?\s*)?"
    r"(?:\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\])(?=([\s,]*or\b)?)"
)


def _formula(text):
    """The last formula of a text in dollars or brackets; else what its last sentence says, if no
    prose. "" if it is one of two, or denied."""
    formulas = list(_FORMULA.finditer(text))
    if formulas:
        one_of_two, *formula, other = formulas[-1].groups()
        return "" if one_of_two or other else "".join(filter(None, formula)).strip()
    stated = _conclusion(text)
    return "" if _PROSE.search(stated) else stated


def _grade_countdown(problem, text):
    target = Fraction(problem.answer)

    def right(expression):
        value, used = evaluate_expression(expression.strip()) or (None, ())
        return value == target and Counter(used) == Counter(problem.numbers)

    text = plain_signs(text)
    expression, equals, value = (explicit_answer(text) or "").partition("=")
    if right(expression) and (not equals or parse_number(value) == target):
        return Grade(True, True)
    stated = last_expression(text)
    return Grade(False, stated is not None and right(stated))


def _grade_text(problem, text):
    answer, explicit = problem.answer, explicit_answer(text)
    strict = explicit is not None and same_answer(explicit, answer)
    stated = text if explicit is None else explicit
    family = next((f for f in _FAMILIES if re.fullmatch(f, plain(answer).strip(" .()*$"))), None)
    if strict or not family:
        return Grade(strict, strict or same_answer(_conclusion(stated), answer))
    return Grade(False, _choice(stated, family) == _words(answer))


CHECKS = {
    "integer": _grade_integer,
    "number": _grade_number,
    "latex": _grade_latex,
    "countdown": _grade_countdown,
    "text": _grade_text,
    "unchecked": lambda problem, text: Grade(False, False),  # a reward function of one's own
}

_FAMILIES = ("(?i:yes|no)", "(?i:true|false)", "[A-Z]")  # of each, one can be right
_YES = re.compile(r"\W*(?:yes|no|true|false|[A-Z])\W*", re.I)
_LEAD = r"\b(?:is|are|was|were|be|answer|result|option|choice|choose|say|so|thus|hence)\b"
_BEHIND_LEAD = re.compile(
    rf"{_LEAD}:?|(?<=[^\W\d_]{{2}}):|[\u662f\u4e3a\u9009]", re.I
)  # 是, 为, 选
_DOUBT = (
    r"(?i:\b(?:not|never|neither|nor|or|if|whether|unless|maybe|perhaps|possibly|probably|might|"
    r"may|could|cannot|doubt|false that|wrong|incorrect|fails?|impossible|suppose|none|non)\b"
    rf"|n['\u2019]t\b|{DENIED})"
)


def _conclusion(text):
    """What stands behind the last "is" (answer:, ...) of the last sentence; "" if it is doubted."""
    sentence = re.split(r"\.\s|\n", text.rstrip(". \n"))[-1]
    leads = list(_BEHIND_LEAD.finditer(sentence))
    start = leads[-1].end() if leads else 0
    return "" if re.search(_DOUBT, sentence[:start].split(",")[-1]) else sentence[start:]


def _choice(text, family):
    """What the last line that names a member of the family names: alone between punctuation, or
    behind "is"; None where it names two, or doubts one."""
    edge = r"[.,:;?()\u2014]| - "
    family = family.lower().replace("(?i:", "(?:")
    named = rf"(?:\A|{edge}|{_LEAD}|[\u662f\u4e3a\u9009])\s*({family})(?=\s*(?:{edge}|\Z))"
    doubted = (
        rf"{_DOUBT}[^.,:;?]*\b(?:not|{family})(?=\s*(?:{edge}|\Z))"
        rf"|(?:{family})\W* (?:is|are|was) (?:not|wrong|incorrect|false)\b|(?:{family})\s*\?"
    )
    for line in map(_words, reversed(text.split("\n"))):
        if found := set(re.findall(named, line)):
            return found.pop() if len(found) == 1 and not re.search(doubted, line) else None
    return None
