"""docs/exercises.md, 2: the task "larger"."""

import re

import pytest

from problems.grading import grade
from tasks import BUILT_IN, load_problems


@pytest.mark.parametrize("level, digits", [(1, 2), (2, 3)])
def test_questions_and_answers(level, digits):
    train, held_out = load_problems("larger", difficulty=level)
    assert len(held_out) >= 10
    for problem in train[:200]:
        a, b = re.fullmatch(r"Which is larger, (\d+) or (\d+)\?", problem.question).groups()
        assert len(a) == len(b) == digits and a != b
        assert grade(problem, str(max(int(a), int(b)))).strict
        assert not grade(problem, str(min(int(a), int(b)))).lenient


def test_a_step_trains_on_it(tmp_path):
    from one_step import first_step

    step = first_step(tmp_path, "--task", "larger", "--data", "")
    assert all(p.question.startswith("Which is larger") for p in step.batch.problems)
    assert BUILT_IN["larger"].help and BUILT_IN["larger"].cap <= 16
