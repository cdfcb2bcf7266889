"""Prompts and verifiable rewards: a question goes in, a text comes out, and a check says 0 or 1.

Built-in tasks stand in BUILT_IN; what files and data sets may look like, in problems/files.py.

The same `grade` (problems/grading.py) serves as reward and as evaluation. It returns two verdicts,
strict and lenient. Parsers alone can move a score by tens of points, so both are always reported.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from common.errors import UserError
from problems.countdown import random_expression
from problems.files import DEFAULT_SPEC, DatasetSpec, Row, Unusable, row_of, rows_of
from problems.grading import explicit_answer, kind_of
from problems.latex import has_math_verify

FILE_CAP = 512  # tokens an answer to a file's question may have where nobody says
QUESTIONS = 20_000  # drawn for a built-in task; many are equal
HELD_OUT = 512  # rows of a file that are kept apart, at most a fifth of it


@dataclass(frozen=True)
class Problem:
    """One question. `kind` says how an answer is checked: an entry of problems.grading.CHECKS."""

    question: str
    answer: str  # the number, the words, the LaTeX answer, or Countdown's target
    kind: str = "number"
    numbers: tuple[int, ...] = ()  # Countdown: the numbers that must be used
    history: tuple[tuple[str, str], ...] = ()  # (role, text): what stands before the question
    place: str = field(default="", compare=False)  # in its file
    row: dict = field(default_factory=dict, compare=False)  # all of its columns


class Task(NamedTuple):
    """A built-in task: how a problem is drawn, its levels, and how long an answer may be."""

    draw: Callable[[random.Random, int], Problem]  # (random numbers, level) -> Problem
    levels: dict[int, str]  # level: what is asked there; the first is the default
    cap: int  # tokens an answer needs, and no more
    help: str


# ----------------------------------------------------------------------------------- built-in tasks


def addition_problem(rng: random.Random, level: int) -> Problem:
    """The sum of two numbers of `level` digits."""
    low, high = 10 ** (level - 1), 10**level - 1
    a, b = rng.randint(low, high), rng.randint(low, high)
    return Problem(f"What is {a} + {b}?", str(a + b), "integer")


def countdown_problem(rng: random.Random, level: int) -> Problem:
    """`level` numbers from 1 to 12 and a target that some expression over all of them reaches."""
    numbers = tuple(rng.randint(1, 12) for _ in range(level))
    while True:
        _, target = random_expression(numbers, rng)  # division is allowed, never needed
        if 1 <= target <= 50:
            break
    listed = ", ".join(map(str, numbers))
    question = (
        f"Use {listed} once each with + - * / to make {target}. Reply with the expression only."
    )
    return Problem(question, str(target), "countdown", numbers)


def arithmetic_problem(rng: random.Random, level: int) -> Problem:
    """A sum, difference or product in plain English."""
    limit = {1: 9, 2: 19, 3: 99, 4: 99}[level]
    if level == 4:
        a, b = rng.randint(10, limit), rng.randint(2, 9)
        return Problem(f"What is {a} times {b}?", str(a * b), "integer")
    a, b = rng.randint(0, limit), rng.randint(0, limit)
    if level > 1 and rng.random() < 0.5:
        a, b = max(a, b), min(a, b)
        return Problem(f"What is {a} minus {b}?", str(a - b), "integer")
    return Problem(f"What is {a} plus {b}?", str(a + b), "integer")


BUILT_IN = {
    "addition": Task(
        addition_problem,
        {3: "numbers of three digits", 2: "of two digits", 4: "of four digits"},
        cap=40,
        help="sums of two numbers; the shipped model writes them down at once, or step by step",
    ),
    "countdown": Task(
        countdown_problem,
        {3: "three numbers", 4: "four numbers", 5: "five numbers"},
        cap=16,
        help="reach a target with the given numbers, each used once; several solutions are right",
    ),
    "arithmetic": Task(
        arithmetic_problem,
        {
            1: "sums of two one-digit numbers",
            2: "sums and differences of numbers below 20",
            3: "sums and differences of two-digit numbers",
            4: "products of a one-digit and a two-digit number",
        },
        cap=32,
        help="sums in plain English",
    ),
}


def default_cap(task: str, data: str | None) -> int:
    """Tokens an answer may have where nobody says."""
    return FILE_CAP if data else BUILT_IN[task].cap


# ---------------------------------------------------------------------------------------- questions


def load_problems(
    task: str = "addition",
    data: str | None = None,
    difficulty: int | None = None,
    form: DatasetSpec = DEFAULT_SPEC,
    any_answer: bool = False,
) -> tuple[list[Problem], list[Problem]]:
    """(training problems, held-out problems), disjoint by key_of, and the same in every run.

    Built-in tasks draw QUESTIONS questions and hold out a fifth of the different ones. A file's
    rows are shuffled, and the last HELD_OUT of them (at most a fifth) are kept apart. UserError
    says in one line what to do.
    """
    rng = random.Random(f"{task} 0")
    if data is not None:
        rows = read_problems(data, "--data", form, any_answer)
        problems = list({key_of(p): p for p in rows}.values())
        if repeated := len(rows) - len(problems):
            print(f"{data}: {repeated} of {len(rows)} rows ask what another does; left out")
        rng.shuffle(problems)
        if len(problems) < 2:
            raise UserError(
                f"--data {data}: one usable row; training and held-out evaluation need at least 2"
            )
        keep = max(1, min(HELD_OUT, len(problems) // 5))
        return problems[:-keep], problems[-keep:]
    levels = BUILT_IN[task].levels
    difficulty = next(iter(levels)) if difficulty is None else difficulty
    if difficulty not in levels:
        raise UserError(
            f"--difficulty {difficulty}: {task} has the levels {', '.join(map(str, levels))}"
        )
    drawn = list(dict.fromkeys(BUILT_IN[task].draw(rng, difficulty) for _ in range(QUESTIONS)))
    keys = list(dict.fromkeys(map(key_of, drawn)))
    rng.shuffle(keys)
    apart = set(keys[: max(1, len(keys) // 5)])
    held_out = {key_of(p): p for p in drawn if key_of(p) in apart}
    return [p for p in drawn if key_of(p) not in apart], list(held_out.values())


def key_of(problem: Problem) -> tuple:
    """The same for a question however it is spaced and written. In built-in tasks the order of the
    words is no difference: "3 plus 4" held out must not be trained on as "4 plus 3"."""
    if problem.kind in ("integer", "countdown"):
        return *sorted(re.findall(r"\w+", problem.question.casefold())), problem.answer
    return *problem.history, problem.question


def read_problems(
    path: str, flag: str = "--data", form: DatasetSpec = DEFAULT_SPEC, any_answer: bool = False
) -> list[Problem]:
    """All usable rows of a file or data set; `any_answer`: also those whose answer cannot be
    checked. The others are counted and reported, by reason, with the first of each."""
    problems, unusable = [], {}
    for place, columns in rows_of(path, flag, form.split):
        try:
            problems.append(_problem_of(row_of(place, columns, form), any_answer))
        except Unusable as reason:
            unusable.setdefault(str(reason), []).append(place)
    total = len(problems) + sum(map(len, unusable.values()))
    if not problems:
        first = next((f"{places[0]}: {reason}" for reason, places in unusable.items()), "")
        what = f"none of its {total} rows can be used; {first}" if unusable else "it holds no rows"
        raise UserError(f"{flag} {path}: {what}")
    for reason, places in unusable.items():
        print(f"{path}: {len(places)} of {total} rows left out, the first is {places[0]}: {reason}")
    return problems


def _problem_of(row: Row, any_answer: bool) -> Problem:
    """The Problem of a row; Unusable where its answer cannot be checked and has to be."""
    stated = explicit_answer(row.answer.strip())
    kind = kind_of(stated) if stated else None
    if kind is None and not any_answer:
        raise Unusable(UNCHECKED if has_math_verify() else NO_LATEX)
    answer, kind = (stated, kind) if kind else (row.answer, "unchecked")
    return Problem(row.question, answer, kind, (), row.history, row.place, row.columns)


UNCHECKED = "its reference answer is empty, or of several lines without #### or \\boxed"
NO_LATEX = (
    "its reference answer is neither a number nor a word, and LaTeX needs math-verify: pip install "
    "math-verify"
)
