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
from problems.numbers import last_quantity, parse_number, parse_quantity, plain, same_quantity

LONGEST_TEXT = 20_000  # characters of a response that are looked at, from its end
MOST_MARKS = 20  # of #### and \\boxed, from the end
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
    text = outside_thinking(text, prompt)[-LONGEST_TEXT:]
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
    opened = prompt.rfind(THINKING[0]) > prompt.rfind(THINKING[1])
    _, closed, behind = text.rpartition(THINKING[1])
    return "" if THINKING[0] in behind or (opened and not closed) else behind


class Statement(NamedTuple):
    """What a mark, #### or \\boxed, states, and where: text[start:end], the mark included."""

    text: str
    start: int
    end: int
    is_box: bool


_MARK = re.compile(r"#{4,}|\\f?box(?:ed)?(?![A-Za-z])\s*")
_PROSE = re.compile(r"(?<![\\A-Za-z{])(?:[A-Za-z]{3,}|[A-Za-z]{2} [A-Za-z]{2})")  # no command
_BETWEEN_BOXES = re.compile(r"(?:[\s,;.$&]|\\text *\{|\}|\b(?:and|or)\b|\b[A-Za-z]_?\d? *=)*")


def statements(text):
    """Return the last Statements of a text, in its order; empty marks state nothing."""
    found = []
    for mark in list(_MARK.finditer(text))[-MOST_MARKS:]:
        is_box = mark[0][0] != "#"
        stated, length = (_boxed if is_box else _on_line)(text[mark.end() :])
        if stated:
            found.append(Statement(stated, mark.start(), mark.end() + length, is_box))
    return found


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
    return " or ".join(dict.fromkeys(value.text for value in values))


def _before_the_cut(text):
    """Return the last Statement of a response that was cut, if it is whole and nothing follows."""
    found = statements(text)
    if not found or re.search(r"[^\s.,;$*}\])]", text[found[-1].end :]):
        return ""
    last = found[-1]
    whole = text[last.end - 1] == "}" if last.is_box else text[last.end : last.end + 1] == "\n"
    return text[last.start : last.end] if whole else ""


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
    stated, answer = stated.strip(), answer.strip()
    if (letters := set(_letters(answer))) and len(letters) > 1:
        return set(_letters(stated)) == letters
    if (quantity := parse_quantity(answer)) is not None:
        return same_quantity(parse_quantity(stated), quantity)
    brackets, elements = _elements(answer)
    if not brackets:
        same = _same_mathematics if is_mathematics(answer) else _same_words
        return same(stated, answer)
    own, given = _elements(stated)
    if own.replace("or", ",") != brackets.replace("or", ",") or len(given) != len(elements):
        return False
    if brackets not in ("or", "\u2983\u2984") or len(elements) > LONGEST_LIST:
        return all(map(same_answer, given, elements))
    for element in elements:  # in any order
        match = next((g for g in given if same_answer(g, element)), None)
        if match is None:
            return False
        given.remove(match)
    return True


def _letters(text):
    """The options that a text consists of, each once: "ABD" and "A, B, D"; "" if it is no such."""
    found = _OPTIONS.fullmatch(plain(text).strip(" .$"))
    letters = re.sub("[, ]", "", found[0]) if found else ""
    return letters if len(set(letters)) == len(letters) else ""


def _elements(text):
    """Return (brackets, elements) of a list, ("(]", ["0", "1"]) of "(0, 1]"; ("", [text]) of a text
    that is no list. The brackets of a bare list are ",", or "or" where words separate it."""
    text = re.sub(r"\\(?:left|right)(?![a-z])|\\[,;!:()\[\]]|(?<!\\)\$", "", text).strip(" .\n")
    for sign in "{}":  # a set's braces as one character each, unlike those around an argument
        text = text.replace(f"\\{sign}", _SET_BRACES[sign])
    depths = list(itertools.accumulate((c in "([{\u2983") - (c in ")]}\u2984") for c in text))
    if text and text[0] in "([\u2983" and 0 in depths and depths.index(0) == len(text) - 1:
        brackets, parts = text[0] + text[-1], _split(text[1:-1])
        listed = len(parts) > 1 or text[0] == _SET_BRACES["{"]
    else:
        brackets, parts = ",", _split(text)
        if len(parts) == 1:
            brackets, parts = "or", re.split(r"\s+(?:or|and)\s+", plain(text))
        listed = len(parts) > 1 and all(_is_value(part) for part in parts)
    parts = parts if listed else [text]
    for sign, brace in _SET_BRACES.items():
        parts = [part.replace(brace, f"\\{sign}").strip() for part in parts]
    return brackets if listed else "", parts


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
    """math-verify's verdict, for texts that do not differ in what it does not see: the base of a
    number, words, and a digit behind a letter (x2 is no product)."""
    stated, answer = (re.sub(r"\*\*|\\[()\[\]]", "", x).strip("$ .:,\n") for x in (stated, answer))
    if stated == answer:
        return True
    if not stated or (re.search(_DOUBT, stated) and not re.search(_DOUBT, answer)):
        return False
    bases = [re.findall(r"[0-9]_\{?([0-9]+)", x) for x in (stated, answer)]
    words = [set(re.findall(_WORD, x)) for x in (stated, answer)]
    other = bases[0] != bases[1] or (all(words) and words[0] != words[1])
    return not other and not _DIGIT_BEHIND.search(stated) and latex_equal(stated, answer)


_WORD = r"\\(?:text|mathrm|mbox) ?\{ ?([A-Za-z]+)|(?<![\\A-Za-z])[A-Za-z]{2,}(?![A-Za-z{])"
_DIGIT_BEHIND = re.compile(r"(?<![\\A-Za-z])[A-Za-z][0-9]")


def _words(text):
    """Return a text without LaTeX's marks, case, and the punctuation and article around it: "(B)."
    is "\\text{B}". Signs stay: "-yes", "yes!" and "1/yes" are not "yes"."""
    text = re.sub(r"[\\{}$]", "", plain(text)).casefold()
    text = re.sub(r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})", " ", " ".join(text.split()))
    return re.sub(r"^(?:an?|the) (?=\w)", "", text.strip(" .,;:()[]*\"'`_"))


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
    # what is marked and is no number is looked through
    return Grade(
        False, same_quantity(last_quantity(text if explicit is None else explicit), answer)
    )


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
_BEHIND_LEAD = re.compile(rf"{_LEAD}:?|(?<=[a-z]{{3}}):|[\u662f\u4e3a]", re.I)  # 是, 为
_DOUBT = (
    r"(?i:\b(?:not|never|neither|nor|or|if|whether|unless|maybe|perhaps|possibly|probably|might|"
    r"may|cannot|doubt|false that|wrong|non)\b|n['\u2019]t\b|[不没非]|아니|않|ではな|じゃな)"
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
    named = rf"(?:\A|{edge}|{_LEAD})\s*({family})(?=\s*(?:{edge}|\Z))"
    doubted = rf"{_DOUBT}[^.,:;?]*\b(?:not|{family})(?=\s*(?:{edge}|\Z))"
    for line in map(_words, reversed(text.split("\n"))):
        if found := set(re.findall(named, line)):
            return found.pop() if len(found) == 1 and not re.search(doubted, line) else None
    return None
