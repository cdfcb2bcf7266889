"""Prompts and verifiable rewards: a question goes in, a text comes out, and a check says 0 or 1.

    countdown    built in: reach a target with the given numbers, each used once; several solutions are right
    arithmetic   built in: sums in plain English, in four levels of difficulty
    a file       JSONL with `question` or `prompt` and `answer`, or parquet with `prompt` and `reward_model`

The same `grade` serves as reward and as evaluation. It returns two verdicts:
    strict   the answer stands where the instructions ask for it (after ####, in \\boxed{}, or alone)
    lenient  it may also stand at the end of a sentence: the last number (or expression) of the text counts
Parsers alone can move a score by tens of points, so both are always reported.

An answer written by a model is hostile input. Nothing here is evaluated as code: numbers are matched by one regular
expression and compared as fractions, Countdown is a walk over a syntax tree of at most 200 characters that knows
four operators, and a LaTeX comparison runs in a process that is killed when its time is up.
"""

import ast
import json
import operator
import pathlib
import random
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from scale.latex import has_math_verify, latex_equal
from scale.numbers import last_number, only_number, parse_number

LONGEST_TEXT = 20_000  # characters of an answer that are looked at, from its end
LONGEST_EXPRESSION = 200


class BadInput(ValueError):
    """Something the user can mend: one line that names it and says what to do. The programs exit with 2."""


class Grade(NamedTuple):
    strict: bool
    lenient: bool


@dataclass(frozen=True)
class Problem:
    """One question. `kind` says how an answer is checked: "number", "latex" or "countdown"."""

    question: str
    answer: str  # the number, the LaTeX answer, or Countdown's target
    kind: str = "number"
    numbers: tuple = ()  # Countdown: the numbers that must be used


# ------------------------------------------------------------------------------------------------------- grading


def grade(problem, text):
    """Strict and lenient verdict on an answer; bounded in time whatever the text is."""
    text = text[-LONGEST_TEXT:].strip()
    if problem.kind == "countdown":
        return _grade_countdown(problem, text)
    explicit = _explicit_answer(text)
    if problem.kind == "latex":
        right = explicit is not None and latex_equal(explicit, problem.answer)
        return Grade(right, right)
    target = parse_number(problem.answer)
    stated = parse_number(explicit) if explicit is not None else None
    strict = stated is not None and stated == target
    if stated is None:
        stated = last_number(text)
    return Grade(strict, stated is not None and stated == target)


def _explicit_answer(text):
    """What stands behind the last ####, in the last \\boxed{...}, or the whole text if it is one line; else None."""
    marked = [(text.rfind("####"), "####"), (max(text.rfind("\\boxed{"), text.rfind("\\boxed ")), "boxed")]
    place, mark = max(marked)
    if place < 0:
        return text if text and "\n" not in text else None
    if mark == "####":
        return text[place + 4 :].strip().split("\n")[0].strip()
    return _braced(text, place + len("\\boxed"))


def _braced(text, start):
    """The content of the braces that open at `start`, nested braces and all; None if they never close."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 1 : i].strip() if i > start else None
    return None


# ------------------------------------------------------------------------------------------------------ countdown

_EXPRESSION = re.compile(r"[0-9+\-*/() ]+")
_OPERATORS = {ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b, ast.Div: lambda a, b: a / b if b else None}


def evaluate_expression(text):
    """(value, numbers used) of an expression over + - * / and brackets, or None; exact, bounded, never `eval`."""
    if len(text) > LONGEST_EXPRESSION or not _EXPRESSION.fullmatch(text) or text.count("(") > 20:
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    numbers = []

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 10**6:
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            left, right = value(node.left), value(node.right)
            return None if left is None or right is None else _OPERATORS[type(node.op)](left, right)
        return None  # **, //, unary signs, names, calls: not part of the game

    result = value(tree)
    return None if result is None else (result, numbers)


def _grade_countdown(problem, text):
    def right(expression):
        found = evaluate_expression(expression.split("=")[0].strip())
        return found is not None and found[0] == Fraction(problem.answer) and Counter(found[1]) == Counter(problem.numbers)

    explicit = _explicit_answer(text)
    strict = explicit is not None and right(explicit)
    if strict:
        return Grade(True, True)
    candidates = [c.strip() for c in _EXPRESSION.findall(text) if any(o in c for o in "+-*/")]
    return Grade(False, bool(candidates) and right(candidates[-1]))


def _countdown_problem(rng, difficulty):
    """`difficulty` numbers from 1 to 12 and a target that some expression over all of them reaches."""
    numbers = tuple(rng.randint(1, 12) for _ in range(difficulty))
    while True:
        _, target = random_expression(numbers, rng)  # division is allowed in answers, never needed
        if 1 <= target <= 50:
            break
    listed = ", ".join(map(str, numbers))
    return Problem(f"Use {listed} once each with + - * / to make {target}. Reply with the expression only.", str(target), "countdown", numbers)


_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def random_expression(numbers, rng):
    """(text, value) of a random expression with + - * over all the numbers, each used once, with brackets where they are needed."""
    terms = [(str(n), "", n) for n in rng.sample(numbers, len(numbers))]
    while len(terms) > 1:
        left, right = terms.pop(rng.randrange(len(terms))), terms.pop(rng.randrange(len(terms)))
        sign = rng.choice("+-*")
        a = f"({left[0]})" if left[1] in ("+", "-") and sign == "*" else left[0]
        b = f"({right[0]})" if right[1] and (sign == "*" or (sign == "-" and right[1] in "+-")) else right[0]
        terms.append((f"{a}{sign}{b}", sign, _APPLY[sign](left[2], right[2])))
    return terms[0][0], terms[0][2]


# ----------------------------------------------------------------------------------------------------- arithmetic

ARITHMETIC = {
    1: "sums of two one-digit numbers",
    2: "sums and differences of numbers below 20",
    3: "sums and differences of two-digit numbers",
    4: "products of a one-digit and a two-digit number",
}


def _arithmetic_problem(rng, difficulty):
    limit = {1: 9, 2: 19, 3: 99, 4: 99}[difficulty]
    a, b = (rng.randint(10, limit), rng.randint(2, 9)) if difficulty == 4 else (rng.randint(0, limit), rng.randint(0, limit))
    if difficulty == 4:
        question, answer = f"What is {a} times {b}?", a * b
    elif difficulty > 1 and rng.random() < 0.5:
        a, b = max(a, b), min(a, b)
        question, answer = f"What is {a} minus {b}?", a - b
    else:
        question, answer = f"What is {a} plus {b}?", a + b
    return Problem(question, str(answer))


# ---------------------------------------------------------------------------------------------------------- tasks

QUESTIONS = 20_000  # drawn for a built-in task; many are equal
BUILT_IN = {"countdown": (_countdown_problem, (3, 4, 5)), "arithmetic": (_arithmetic_problem, (1, 2, 3, 4))}


def load_problems(task="countdown", data=None, difficulty=None, held_out=512):
    """(training problems, held-out problems), disjoint; both lists, the same in every run, so that runs can be compared.

    Built-in tasks draw QUESTIONS questions and hold out a fifth of the different ones (word order apart). A file's rows are shuffled,
    and the last `held_out` of them (at most a fifth) are kept apart. Raises BadInput with one line that says what to do.
    """
    rng = random.Random(f"{task} 0")
    if data is not None:
        problems = list({p.question: p for p in read_problems(data)}.values())  # a question stands on one side only
        rng.shuffle(problems)
        if len(problems) < 2:
            raise BadInput(f"--data {data}: one usable row; training and held-out evaluation need at least 2")
        keep = max(1, min(held_out, len(problems) // 5))
        return problems[:-keep], problems[-keep:]
    make, levels = BUILT_IN[task]
    difficulty = levels[0] if difficulty is None else difficulty
    if difficulty not in levels:
        raise BadInput(f"--difficulty {difficulty}: {task} has the levels {', '.join(map(str, levels))}")
    # held out are bags of words, not questions: "3 plus 4" held out must not be trained on as "4 plus 3"
    bag = lambda p: (tuple(sorted(re.findall(r"\w+", p.question))), p.answer)
    drawn = list(dict.fromkeys(make(rng, difficulty) for _ in range(QUESTIONS)))
    bag_of = {p: bag(p) for p in drawn}
    bags = list(dict.fromkeys(bag_of.values()))
    rng.shuffle(bags)
    apart = set(bags[: max(1, len(bags) // 5)])
    held_out = {bag_of[p]: p for p in drawn if bag_of[p] in apart}
    return [p for p in drawn if bag_of[p] not in apart], list(held_out.values())


def default_cap(task, data):
    """Tokens an answer may have where nobody says: enough for the task's instructions, no more."""
    return 512 if data else {"countdown": 16, "arithmetic": 32}[task]


def read_problems(path, flag="--data"):
    """All usable rows of a JSONL or parquet file. Rows whose answer cannot be checked are counted and reported."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise BadInput(f"{flag} {path}: no such file")
    rows = _parquet_rows(path, flag) if path.suffix == ".parquet" else _jsonl_rows(path, flag)
    problems, unusable, example = [], 0, None
    for place, question, answer in rows:
        problem = _problem_of(question, answer)
        if problem is None:
            unusable, example = unusable + 1, example or (place, answer)
        else:
            problems.append(problem)
    if unusable:
        why = "no number" if has_math_verify() else "no number (LaTeX answers need: pip install math-verify)"
        print(f"{path}: {unusable} of {unusable + len(problems)} rows skipped, their answer holds {why}; the first is {example[0]}: {example[1][:60]!r}")
    if not problems:
        raise BadInput(f"{flag} {path}: no row has an answer that can be checked" if unusable else f"{flag} {path}: the file is empty")
    return problems


def _problem_of(question, answer):
    explicit = _explicit_answer(answer) if "####" in answer or "\\boxed" in answer else answer.strip()
    if explicit is None:
        return None
    if parse_number(explicit) is not None:
        return Problem(question, explicit)
    if (number := only_number(explicit)) is not None:
        return Problem(question, str(number))
    return Problem(question, explicit, "latex") if has_math_verify() and re.search(r"[0-9\\+*/^=(-]", explicit) else None


def _jsonl_rows(path, flag):
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{flag} {path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number without end
                raise BadInput(f"{where}: not JSON ({error}); every line must be one JSON object") from None
            if not isinstance(row, dict):
                raise BadInput(f"{where}: not a JSON object with the keys question (or prompt) and answer")
            question = row.get("question", row.get("prompt"))
            if question is None or "answer" not in row:
                raise BadInput(f"{where}: needs the keys question (or prompt) and answer; it has {', '.join(sorted(map(str, row))) or 'none'}")
            if not isinstance(question, str) or not question.strip():
                raise BadInput(f"{where}: the question is empty; remove the line or fill it in")
            yield f"line {number}", question.strip(), str(row["answer"])


def _parquet_rows(path, flag):
    try:
        import pyarrow.parquet
    except ImportError:
        raise BadInput(f"{flag} {path}: reading parquet needs pyarrow; pip install pyarrow, or convert the file to JSONL") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise BadInput(f"{flag} {path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
    for number, row in enumerate(rows, 1):
        try:
            question, answer = row["prompt"], row["reward_model"]["ground_truth"]
            question = question if isinstance(question, str) else "\n\n".join(m["content"] for m in question if m["role"] != "system")
        except (KeyError, TypeError):
            raise BadInput(f"{flag} {path}, row {number}: needs prompt (messages) and reward_model.ground_truth; it has {', '.join(sorted(row))}") from None
        if not question.strip():
            raise BadInput(f"{flag} {path}, row {number}: the question is empty; remove the row or fill it in")
        yield f"row {number}", question.strip(), str(answer)


# -------------------------------------------------------------------------------------------------------- prompts


def render_prompt(question, tokenizer):
    """(text, token ids) of one question: through the tokenizer's chat template if it has one, else a plain template."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": question}]
        # enable_thinking is Qwen3's switch; templates that do not know it ignore it
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return text, tokenizer(text, add_special_tokens=False).input_ids
    text = f"Question: {question}\nAnswer:"
    return text, tokenizer(text).input_ids
