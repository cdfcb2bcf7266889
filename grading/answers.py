"""Is an answer right? Two verdicts on a text that a model wrote.

    strict   the answer stands where it was asked for (after ####, in \\boxed{}, or alone)
    lenient  it may also end a sentence: the last number (or expression) of the text counts

An answer written by a model is hostile input. Nothing here is evaluated as code: numbers are
matched by regular expressions and compared as integers or fractions, Countdown is a walk over a
syntax tree that knows four operators, and LaTeX is compared in a process that is killed when its
time is up.
"""

import re
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

from grading.countdown import evaluate_expression, last_expression, plain_signs
from grading.latex import has_math_verify, latex_equal
from grading.numbers import last_number, parse_number, plain

LONGEST_TEXT = 20_000  # characters of an answer that are looked at, from its end


class Grade(NamedTuple):
    strict: bool
    lenient: bool


def grade(problem, text):
    """Strict and lenient verdict on an answer; bounded in time whatever the text is."""
    return CHECKS[problem.kind](problem, text[-LONGEST_TEXT:].strip())


def _grade_integer(problem, text):
    """Of the built-in tasks: the integer stated explicitly, or the last one of the text."""
    explicit = explicit_answer(text)
    alone = explicit and _INTEGER.fullmatch(explicit.strip("$*. "))
    stated = alone or _LAST_INTEGER.search(text.replace("**", ""))
    right = bool(stated) and int(stated[1].replace(",", "")) == int(problem.answer)
    return Grade(bool(alone) and right, right)


def _grade_number(problem, text):
    explicit, target = explicit_answer(text), parse_number(problem.answer)
    stated = parse_number(explicit) if explicit is not None else None
    strict = stated is not None and stated == target
    if stated is None:  # an answer that is marked and unreadable is looked through first
        marked = explicit is not None and re.search("[0-9]", explicit)
        stated = last_number(explicit if marked else text)
    return Grade(strict, stated is not None and stated == target)


def _grade_latex(problem, text):
    stated = explicit_answer(text)
    strict = stated is not None and (is_marked(text) or not _PROSE.search(stated))
    if not strict:  # the last formula of the text, or its last line
        formulas = _FORMULA.findall(text)
        stated = "".join(formulas[-1]) if formulas else text.split("\n")[-1]
    stated = (stated or "").strip("$ ")
    right = bool(stated) and (stated == problem.answer or latex_equal(stated, problem.answer))
    return Grade(strict and right, right)


def _grade_countdown(problem, text):
    target = Fraction(problem.answer)

    def right(expression):
        value, used = evaluate_expression(expression.strip()) or (None, ())
        return value == target and Counter(used) == Counter(problem.numbers)

    text = plain_signs(text)
    explicit = explicit_answer(text)
    if explicit is not None:
        expression, equals, value = explicit.partition("=")
        if right(expression) and (not equals or parse_number(value) == target):
            return Grade(True, True)
    stated = last_expression(text)
    return Grade(False, stated is not None and right(stated))


def _grade_text(problem, text):
    gold = _words(problem.answer)
    explicit = explicit_answer(text)
    if explicit is not None and _words(explicit) == gold:
        return Grade(True, True)
    lines = [explicit] if is_marked(text) and explicit else text.strip().split("\n")
    last, first = _words(lines[-1]), re.split(r"[.,:;!]", lines[0])[0]
    ends = last[-len(gold) :] == gold and last[-len(gold) - 1 : -len(gold)] not in _NEGATIONS
    return Grade(False, ends or _words(first) == gold)  # "so it is true"; "Yes, since 3 > 2"


CHECKS = {
    "integer": _grade_integer,
    "number": _grade_number,
    "latex": _grade_latex,
    "countdown": _grade_countdown,
    "text": _grade_text,
}
_DIGITS = r"(-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,40}))"
_INTEGER = re.compile(_DIGITS)
# not a part of a decimal, an expression, a time or a range, and no other figure behind it
_LAST_INTEGER = re.compile(
    r"(?<![\w.,:/*+^-])(?<![-+*/^] )(?<![0-9] (?:or|to) )(?<![0-9] and )"
    rf"{_DIGITS}(?![\w/*+^(]|[.,:][0-9]| ?[-+*/^=] ?[0-9])[^0-9]*\Z"
)
_NEGATIONS = (["not"], ["isn't"], ["never"], ["no"])
_LETTERS = r"[^\W\d_]"
_IS_TEXT = re.compile(
    rf"(?:Yes|No|[A-Z]|(?=.*{_LETTERS}{{3}}){_LETTERS}+(?:[ '.-]+{_LETTERS}+){{0,11}})\.?", re.I
)


def kind_of(answer):
    """How a gold answer is checked, by CHECKS' names; None where that cannot be."""
    if parse_number(answer) is not None:
        return "number"
    if _IS_TEXT.fullmatch(plain(answer).strip()):
        return "text"
    return "latex" if has_math_verify() else None


def _words(text):
    """Words without LaTeX's marks, brackets, punctuation and case: "(B)." is "\\text{B}"."""
    return re.findall(r"[^\W_]+(?:'[a-z]+)?", plain(text).casefold())


_PROSE = re.compile(
    r"(?<![\\A-Za-z{])(?:[A-Za-z]{3,}|[A-Za-z]{2} [A-Za-z]{2})"
)  # a word that is no command of a formula
_FORMULA = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)


def is_marked(text):
    return "####" in text or "\\boxed" in text


def explicit_answer(text):
    """What stands behind the last ####, in the last \\boxed{}, or a text of one line; or None."""
    boxed = max(text.rfind("\\boxed{"), text.rfind("\\boxed "))
    place, mark = max((text.rfind("####"), "####"), (boxed, "boxed"))
    if place < 0:
        return text if text and "\n" not in text else None
    if mark == "####":
        return text[place + 4 :].strip().split("\n")[0].strip()
    return _braced(text, place + len("\\boxed"))


def _braced(text, start):
    """The content of the braces that open at `start`, nested or not; None if they never close."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 1 : i].strip() if i > start else None
    return None
