"""The sloppy teacher of the tiny model, by hand; and what the shipped model does with it."""

import random

from conftest import TINY

import evaluate
from common.models import load_model
from problems.grading import grade
from scripts.pretrain_tiny import bare, numbers_of, worked
from tasks import BUILT_IN, Problem, load_problems


def test_worked_by_hand():
    rng = random.Random(0)
    assert worked(247, 138, rng, 0) == "7+8=15,4+3+1=8,2+1=3 #### 385"
    assert worked(999, 111, rng, 0) == "9+1=10,9+1+1=11,9+1+1=11 #### 1110"
    assert worked(20, 30, rng, 0) == "0+0=0,2+3=5 #### 50"


def test_a_slip_goes_on_from_what_was_written():
    for seed in range(50):
        text = worked(247, 138, random.Random(seed), 1)
        first, second, third = text.split(" ####")[0].split(",")
        assert first in ("7+8=14", "7+8=16")  # one off, and its carry is kept
        assert second.startswith("4+3+1=") and second != "4+3+1=8" and third[:4] == "2+1="
        digits = third[4:] + second[-1] + first[-1]
        assert text.endswith(f"#### {digits}")


def test_bare_by_hand():
    rng = random.Random(0)
    assert bare(247, 138, rng, 1, 0) == "385"
    assert bare(247, 138, rng, 0, 1) == "375"  # 7+8 leaves 5 and its carry is forgotten
    assert bare(700, 600, rng, 0, 1) == "300"
    near = {int(bare(247, 138, rng, 0, 0)) - 385 for _ in range(100)}
    assert near == {1, -1, 10, -10, 100, -100}


def test_problems_of_every_level():
    for level in BUILT_IN["addition"].levels:
        train, held_out = load_problems("addition", difficulty=level)
        assert not {p.question for p in train} & {p.question for p in held_out}
        for p in train[:50]:
            a, b = numbers_of(p)
            assert len(a) == len(b) == level and int(a) + int(b) == int(p.answer)
            assert grade(p, worked(int(a), int(b), random.Random(0), 0)) == (True, True)
            assert grade(p, p.answer) == (True, True)
            assert grade(p, str(int(p.answer) + 1)) == (False, False)


def test_an_answer_without_its_mark_is_not_strict():
    problem = Problem("What is 247 + 138?", "385")
    assert grade(problem, "7+8=15,4+3+1=8 so it is 385") == (False, True)


def test_the_shipped_model_blurts():
    """Seldom right, and most of its answers bare: what the default run starts from."""
    model, tokenizer = load_model(str(TINY))
    problems = load_problems("addition")[1][:128]
    draw = evaluate.decoder_of(model, tokenizer)
    for temperature, low, high in ((1.0, 0.2, 0.4), (0.0, 0.1, 0.25)):
        rows = evaluate.sample_responses(draw, tokenizer, problems, 1, 40, temperature)
        assert low < evaluate.summarise(rows).strict < high, temperature
        assert sum("####" in row[0].text for row in rows) / len(rows) < 0.4
