"""Is an answer right? Two verdicts on a text that a model wrote (docs/grading.md has the rules).

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
from problems.numbers import last_number, parse_number, plain

LONGEST_TEXT = 20_000  # characters of an answer that are looked at, from its end
MOST_MARKS = 20  # of #### and \\boxed, from the end


class Grade(NamedTuple):
    strict: bool
    lenient: bool


def response_texts(answers, tokenizer):
    """What answers, lists of ids, say: the text before the first special token, not behind it."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    said = [list(itertools.takewhile(lambda i: i not in special, ids)) for ids in answers]
    return tokenizer.batch_decode(said)


def grade(problem, text):
    """Strict and lenient verdict on an answer; bounded in time whatever the text is."""
    text = _behind_thinking(text) if "think>" in text else text
    return CHECKS[problem.kind](problem, text[-LONGEST_TEXT:].strip())


def _behind_thinking(text):
    """What follows the last </think>; nothing, where thinking begins and does not end."""
    text = text.rpartition("</think>")[2]
    return "" if "<think>" in text else text


_MARK = re.compile(r"#{4,}|\\f?box(?:ed)?(?![A-Za-z])\s*")
_PROSE = re.compile(r"(?<![\\A-Za-z{])(?:[A-Za-z]{3,}|[A-Za-z]{2} [A-Za-z]{2})")  # no command


def explicit_answer(text):
    """The last answer behind #### or in \\boxed{}; without a mark, a text of one line; or None."""
    marks = list(_MARK.finditer(text))
    for mark in reversed(marks[-MOST_MARKS:]):
        read = _on_line if mark[0][0] == "#" else _boxed
        if stated := read(text[mark.end() :]):
            return stated
    if marks or "\n" in text:
        return None
    return text or None


def _on_line(text):
    """The first line, unless it is a heading: words that more text follows ("Step 2: multiply")."""
    line, _, more = text.partition("\n")
    return "" if more.strip() and _is_heading(line) else line.strip()


def _is_heading(line):
    """Words, but for a number of things, and Yes."""
    return bool(_PROSE.search(line)) and parse_number(line) is None and not _YES.fullmatch(line)


def _boxed(text):
    """The content of the braces that a text begins with, or its first word; None if they never
    close."""
    if not text.startswith("{"):
        return re.match(r"[^\s{}$]*", text)[0].rstrip(".,;")
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
    return text[depth + 1 : pairs[0] - depth].strip() if 0 in pairs else None


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
    explicit, target = explicit_answer(text), parse_number(problem.answer)
    strict = explicit is not None and parse_number(explicit) == target
    # what is marked and is no number is looked through
    return Grade(strict, strict or last_number(text if explicit is None else explicit) == target)


def _grade_latex(problem, text):
    stated = explicit_answer(text)
    prose = stated == text != problem.answer and _PROSE.search(stated)
    strict = stated is not None and not prose
    stated = (stated if strict else _formula(text)).replace("**", "").strip("$ .:,\n")
    hedged = re.search(_DOUBT, stated) and not re.search(_DOUBT, problem.answer)
    equal = stated == problem.answer or (stated and latex_equal(stated, problem.answer))
    right = bool(equal and not hedged)
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
    gold, explicit = _words(problem.answer), explicit_answer(text)
    strict = explicit is not None and _words(explicit) == gold
    stated = text if explicit is None else explicit
    family = next((f for f in _FAMILIES if re.fullmatch(f, gold)), None)
    said = _choice(stated, family) if family else _words(_conclusion(stated))
    return Grade(strict, strict or said == gold)


CHECKS = {
    "integer": _grade_integer,
    "number": _grade_number,
    "latex": _grade_latex,
    "countdown": _grade_countdown,
    "text": _grade_text,
    "unchecked": lambda problem, text: Grade(False, False),  # a reward function of one's own
}

_FAMILIES = ("yes|no", "true|false", "[a-z]")  # of each, one can be right
_YES = re.compile(r"\W*(?:yes|no|true|false|[A-Z])\W*", re.I)
_LEAD = r"\b(?:is|are|was|were|be|answer|result|option|choice|choose|say|so|thus|hence)\b"
_BEHIND_LEAD = re.compile(rf"{_LEAD}:?|(?<=[a-z]{{3}}):", re.I)
_DOUBT = (
    r"(?i:\b(?:not|never|neither|nor|or|if|whether|unless|maybe|perhaps|possibly|probably|might|"
    r"may|cannot|doubt|false that|wrong|non)\b|n['\u2019]t\b)"
)


def _words(text):
    """A text without LaTeX's marks, case, and the punctuation and article around it: "(B)." is
    "\\text{B}". Signs stay: "-yes", "yes!" and "1/yes" are not "yes"."""
    text = " ".join(re.sub(r"(?<=\w)-(?=\w)", " ", plain(text)).casefold().split())
    return re.sub(r"^(?:an?|the) (?=\w)", "", text.strip(" .,;:()[]{}*$\"'`_"))


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
    named = rf"(?:\A|{edge}|{_LEAD})\s*({family})(?=\s*(?:{edge}|\Z))"
    doubted = rf"{_DOUBT}[^.,:;?]*\b(?:not|{family})(?=\s*(?:{edge}|\Z))"
    for line in map(_words, reversed(text.split("\n"))):
        if found := set(re.findall(named, line)):
            return found.pop() if len(found) == 1 and not re.search(doubted, line) else None
    return None


_LETTERS = r"[^\W\d_]"
_IS_TEXT = re.compile(
    rf"(?i:yes|no)|[A-Z]|(?=.*{_LETTERS}{{3}})(?!.*\b(?:sin|cos|tan|log|exp|sqrt|mod)\b)"
    rf"(?:(?:{_LETTERS}{{2,}}|[A-Z]|a(?= ))(?:[ '.-]+|\Z)){{1,12}}"
)


def kind_of(answer):
    """How a gold answer is checked, by CHECKS' names; None where that cannot be."""
    if parse_number(answer) is not None:
        return "number"
    if _IS_TEXT.fullmatch(plain(answer).strip(" .")):
        return "text"
    return "latex" if has_math_verify() else None
