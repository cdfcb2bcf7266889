"""Prompts and rewards: what counts as an answer, what does not, and what hostile text costs."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from fractions import Fraction
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY
from tokenizers import processors
from transformers import AutoTokenizer

import tasks
from common.errors import UserError
from common.models import vocabulary
from problems import grading, latex
from problems.countdown import evaluate_expression, random_expression
from problems.grading import Grade, grade, response_texts
from problems.latex import LATEX, latex_equal
from problems.numbers import last_quantity, parse_number
from problems.prompts import render_prompt, render_prompts
from tasks import Problem, load_problems, read_problems

EIGHT = Problem("q", "8")
GAME = Problem("q", "16", "countdown", (3, 5, 2))


@pytest.mark.parametrize(
    "text, value",
    [
        ("72", 72),
        ("-3", -3),
        ("1,234", 1234),
        ("1,234,567.50", Fraction(2469135, 2)),
        ("$5.50", Fraction(11, 2)),
        ("-$5", -5),
        ("$-5", -5),
        ("72.00", 72),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{1}{2}", Fraction(-1, 2)),
        ("50%", 50),
        ("18.", 18),
        ("\u22127", -7),
        ("72 dollars", 72),
        ("**18**", 18),
        ("$18$", 18),
        ("", None),
        ("abc", None),
        ("NaN", None),
        ("inf", None),
        ("1e5", 100_000),
        ("1e-5", Fraction(1, 100_000)),
        ("6.02e23", 602 * 10**21),
        ("1,00,000", 100_000),
        ("1e9999", None),
        ("\u0663", 3),
        ("\uff13", 3),
        ("1/0", None),
        (r"\frac{1}{0}", None),
        ("3 4", None),
        ("0x10", None),
        ("1" * 41, None),
    ],
)
def test_parse_number(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    "text, value",
    [
        ("so 3 - 1 = 2 apples", 2),
        ("10-4", None),
        ("x = -4", -4),
        ("costs $1,234.", 1234),
        ("5,6 and 7", None),
        ("1/2 or 3/4", None),
        ("no number", None),
        ("v2.0 then 12.50 dollars", Fraction(25, 2)),
        ("8e5", 800_000),
        ("8." + "1" * 41, None),
        ("8/" + "1" * 41, None),
        ("\u06638", 38),
        ("8\u0663", 83),
        ("8.1.2", None),
        ("is 8.", 8),
        ("8, then", 8),
        ("8e", None),
    ],
)
def test_last_number(text, value):
    found = last_quantity(text)
    assert (found and found.value) == value


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("8", (True, True)),
        ("#### 8", (True, True)),
        ("5 + 3 = 8\n#### 8", (True, True)),
        ("It is \\boxed{8}.", (True, True)),
        ("\\boxed{8.0}", (True, True)),
        ("####8", (True, True)),
        ("The answer is 8.", (False, True)),
        ("5 + 3 = 8", (False, True)),
        ("First 8,\nthen 9", (False, False)),
        ("#### 7\nor maybe 8", (False, False)),
        ("#### 7\n#### 8", (True, True)),
        ("\\boxed{7} and \\boxed{8}", (False, False)),
        ("#### 8 apples", (True, True)),
        ("#### $8.00\nmore text 9", (True, True)),
        ("", (False, False)),
        ("\\boxed{8", (False, True)),
        ("eight", (False, False)),
    ],
)
def test_strict_and_lenient(text, verdict):
    assert grade(EIGHT, text) == Grade(*verdict)


def test_expression_by_hand():
    assert evaluate_expression("(3+5)*2") == (16, [3, 5, 2])
    assert evaluate_expression("7/2 - 1") == (Fraction(5, 2), [7, 2, 1])


@pytest.mark.parametrize(
    "text",
    [
        "2**3",
        "2//3",
        "-3+5",
        "1/0",
        "1/(2-2)",
        "a+1",
        "f(1)",
        "1.5+1",
        "__import__('os')",
        "(1)(2)",
        "()",
        "1 2",
        "\u0663+1",
        "1+",
        "0x1+1",
        "1_0+1",
        "True+1",
        "lambda:1",
        "9" * 201,
        "(" * 30 + "1" + ")" * 30,
    ],
)
def test_not_an_expression(text):
    assert evaluate_expression(text) is None


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("(3+5)*2", (True, True)),
        ("2*(5+3)", (True, True)),
        ("(3+5)*2 = 16", (True, True)),
        ("\\boxed{(3+5)*2}", (True, True)),
        ("Sure: (3+5)*2", (False, True)),
        ("I add:\n(3+5)*2\n", (False, True)),
        ("16", (False, False)),
        ("8*2", (False, False)),
        ("3+5+2", (False, False)),
        ("(3+5)*2*1", (False, False)),
        ("(3+5)*2\nno, 3*5+2", (False, False)),
        ("(3+5)*2 = 17", (False, True)),
        ("(3+5)*2 = 16 = 4", (False, True)),
        ("(3+5)*2 (yes)", (False, True)),
        ("(3+5)*2 - correct", (False, True)),
        ("- (3+5)*2", (False, True)),
        ("- first I add\n- (3+5)*2", (False, True)),
        ("(as in (3+5)*2)", (False, True)),
        ("((3+5)*2 it is)", (False, True)),
        ("1) (3+5)*2", (False, True)),
        ("16 = (3 + 5) * 2.", (False, True)),
        ("(3+5)\u00d72", (True, True)),
        ("**(3+5)*2**", (True, True)),
        ("$(3+5)\\times 2$", (True, True)),
        ("so 2 \u2212 (\u22123)", (False, False)),
        ("-(3+5)*2", (False, False)),
        ("(3+5)**2", (False, False)),
        ("", (False, False)),
    ],
)
def test_countdown(text, verdict):
    assert grade(GAME, text) == Grade(*verdict)


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9",
        "(" * 10_000,
        "(" * 10_000 + ")" * 10_000,
        "-" * 10_000 + "1",
        "1" * 100_000,
        "1," * 50_000,
        "\\boxed{" * 5_000,
        "#### " * 10_000,
        "NaN",
        "\u0663\u0663",
        "import os; os.system('true')",
        "1/" * 5_000 + "1",
        "$" * 50_000,
        " " * 50_000,
        "((((1)+1)+1)" * 500,
        "1" + ",111" * 1_600,
        "1" + " " * 19_000 + "x",
        "1" + "." * 19_000 + "x",
        "\n" * 19_000 + "1",
        "- " * 9_000 + "1",
        "1)" * 9_000,
        "1 + (" * 4_000,
        "1 " * 9_000 + "x",
        "1\n" * 9_000,
        "*1" * 9_000,
        "<a" * 9_000 + "1",
        "\\text{" * 3_000 + "1",
        "\\frac{1" * 2_000,
        "1 million " * 1_900,
        "5 " + "m" * 19_000,
        "a" * 19_000 + "=5",
    ],
)
def test_hostile_answers_cost_little_and_evaluate_nothing(text):
    started = time.process_time()
    for problem in (EIGHT, GAME):
        assert grade(problem, text).strict is False
    assert time.process_time() - started < 1.0


def test_random_expressions_are_worth_what_they_say():
    rng = random.Random(0)
    for _ in range(300):
        numbers = [rng.randint(1, 12) for _ in range(rng.randint(1, 5))]
        text, value = random_expression(numbers, rng)
        found, used = evaluate_expression(text)
        assert found == value and sorted(used) == sorted(numbers)


@pytest.mark.parametrize("task", ["countdown", "arithmetic"])
def test_built_in_problems_are_disjoint_repeatable_and_solvable(task):
    train, held_out = load_problems(task)
    assert load_problems(task) == (train, held_out) and len(held_out) >= 10
    bag = lambda p: (tuple(sorted(p.question.replace("?", "").split())), p.answer)
    bags = lambda problems: set(map(bag, problems))
    assert not bags(train) & bags(held_out)
    if task == "countdown":
        assert len(held_out) >= 512
        for p in train[:20]:
            found = any(
                evaluate_expression(f.format(*n, *o)) == (int(p.answer), list(n))
                for n in itertools.permutations(p.numbers)
                for o in itertools.product("+-*", repeat=2)
                for f in ("({0}{3}{1}){4}{2}", "{0}{3}({1}{4}{2})")
            )
            assert found, p
    else:
        assert all(grade(p, f"The answer is {p.answer}.").lenient for p in train)


def test_difficulty_is_checked():
    with pytest.raises(UserError, match="--difficulty 9: countdown has the levels 3, 4, 5"):
        load_problems("countdown", difficulty=9)


def test_arithmetic_answers():
    for level in (1, 2, 3, 4):
        for p in load_problems("arithmetic", difficulty=level)[1][:50]:
            _, _, a, sign, b = p.question.rstrip("?").split()
            a, b = int(a), int(b)
            assert int(p.answer) == {"plus": a + b, "minus": a - b, "times": a * b}[sign]


# -------------------------------------------------------------------------------------------- files


@pytest.fixture(autouse=True)
def fewer_questions():
    """All of them, here."""


def without_math_verify(monkeypatch, installed=False):
    for module in (grading, tasks):
        monkeypatch.setattr(module, "has_math_verify", lambda: installed)


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_jsonl(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"question": "How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 1,007"},
        "",
        {"prompt": "And?", "answer": "so \\boxed{-2.5}"},
        {"question": "x", "answer": 12},
    )
    assert [(p.question, p.answer, p.kind) for p in read_problems(path)] == [
        ("How many?", "1,007", "number"),
        ("And?", "-2.5", "number"),
        ("x", "12", "number"),
    ]


def test_a_number_of_a_file_stays_that_number(tmp_path):
    values = [1e-05, 1e16, 2.50, -3, 12345678901234567890]
    path = write(tmp_path / "a.jsonl", *({"question": f"q{v}", "answer": v} for v in values))
    problems = read_problems(path)
    assert [p.answer for p in problems] == [
        *("0.00001", "10000000000000000", "2.5", "-3", "12345678901234567890")
    ]
    assert all(p.kind == "number" and grade(p, p.answer).strict for p in problems)


@pytest.mark.parametrize(
    "rows, message",
    [
        (
            ['{"question": "a", "answer": NaN}'],
            "line 1: its reference answer is nan, neither a text",
        ),
        (['{"question": "a", "answer": -Infinity}'], "line 1: its reference answer is -inf"),
        ([], "it holds no rows"),
        (['{"question": "a", "answer": null}'], r"line 1: it has no answer .*it has question"),
        (['{"question": "a", "answer": true}'], "line 1: its reference answer is true or false"),
        (['{"question": "a", "answer": [1]}'], "line 1: its reference answer is a list"),
        (['{"question": "a", "answer": {"x": 1}}'], "line 1: its reference answer is an object"),
        ([{"question": ["a"], "answer": "1"}], "line 1: its question is a list, but not of mess"),
        ([{"prompt": None, "answer": "1"}], "line 1: it has no question .*it has answer"),
        ([{"question": "a\ud800", "answer": "1"}], "line 1: it holds half a character"),
        ([{"question": 5, "answer": "1"}], "line 1: its question is 5, neither a text nor a chat"),
        (['{"question": "a", "answer": "1"}', "{oops"], "line 2: not JSON"),
        (['{"question": "a"'], r"line 1: not JSON \((?!.*line 2)"),  # one line number, not two
        (["[1]"], "line 1: not a JSON object"),
        ([{"q": "a"}], "line 1: it has no question .no question or prompt or messages; it has q"),
        ([{"question": "  ", "answer": "1"}], "line 1: its question is empty"),
        (['{"question": "a", "answer": ' + "9" * 5_000 + "}"], "line 1: not JSON"),
        (
            [{"question": "a", "answer": " "}],
            "none of its 1 rows can be used; line 1: its reference answer",
        ),
    ],
)
def test_bad_files_name_file_and_line(tmp_path, rows, message, monkeypatch):
    without_math_verify(monkeypatch)
    path = write(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(UserError, match=message) as error:
        read_problems(path)
    assert "bad.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_utf8(tmp_path):
    row = '{"question": "caf\u00e9", "answer": "1"}'
    (tmp_path / "latin.jsonl").write_bytes(row.encode("latin-1"))
    with pytest.raises(UserError, match="line 1: not JSON"):
        read_problems(tmp_path / "latin.jsonl")


def test_a_question_stands_on_one_side_only(tmp_path):
    rows = [{"question": f"q{i % 5}", "answer": "1"} for i in range(50)]
    train, held_out = load_problems(data=write(tmp_path / "a.jsonl", *rows))
    assert len(train) + len(held_out) == 5
    assert not {p.question for p in train} & {p.question for p in held_out}


def test_a_part_of_an_answer_is_not_the_answer(tmp_path, monkeypatch, capsys):
    """(3, \\pi) must not become 3: without math-verify it is counted out, with it it is LaTeX.
    Words and lists of numbers are never LaTeX."""
    path = write(
        tmp_path / "a.jsonl",
        {"question": "a", "answer": "(3, \\pi)"},
        {"question": "b", "answer": "4 apples"},
        {"question": "c", "answer": "no idea"},
        {"question": "d", "answer": ""},
    )
    words = [("4 apples", "number"), ("no idea", "text")]
    for installed, kept in ((False, words), (True, [("(3, \\pi)", "latex"), *words])):
        without_math_verify(monkeypatch, installed)
        assert [(p.answer, p.kind) for p in read_problems(path)] == kept
        assert f"{4 - len(kept)} of 4 rows left out, the first is line" in capsys.readouterr().out


def test_missing_file():
    with pytest.raises(UserError, match="--eval-data nowhere.jsonl: no such file"):
        read_problems("nowhere.jsonl", "--eval-data")
    with pytest.raises(UserError, match="--data nowhere.jsonl: no such file"):
        read_problems("nowhere.jsonl")


def test_unusable_rows_are_counted_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    without_math_verify(monkeypatch)
    path = write(
        tmp_path / "a.jsonl",
        {"question": "a", "answer": "\\frac{\\pi}{2}"},
        {"question": "b", "answer": "4"},
    )
    assert [p.answer for p in read_problems(path)] == ["4"]
    assert (
        "1 of 2 rows left out, the first is line 1: its reference answer" in capsys.readouterr().out
    )


def test_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    prompt = [{"role": "user", "content": "How many?"}]
    rows = [{"prompt": prompt, "reward_model": {"ground_truth": "7", "style": "rule"}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_problems(tmp_path / "a.parquet") == [Problem("How many?", "7")]
    parquet.write_table(pyarrow.Table.from_pylist([{"x": 1}]), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="row 1: it has no question .*it has x"):
        read_problems(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_text("not parquet", encoding="utf-8")
    with pytest.raises(UserError, match="not a readable parquet file"):
        read_problems(tmp_path / "c.parquet")


def test_latex_in_a_killable_process():
    pytest.importorskip("math_verify")
    assert latex_equal("\\frac{1}{2}", "0.5") and not latex_equal("x+1", "x+2")
    difference = Problem("q", "p - q", "latex")
    for text, verdict in {
        "so it is \\boxed{-q+p}": (True, True),
        "-q + p": (True, True),
        "$-q + p$": (True, True),
        "so it is $q$, no, $-q+p$": (False, True),
        "First I subtract.\nThen it is \\(-q+p\\).": (False, True),
        "so it is $-q+p$, no, $q$": (False, False),
        "\\boxed{q-p}": (False, False),
    }.items():
        assert grade(difference, text) == verdict
    before = LATEX.failures
    # a truth that cannot be read is counted
    assert not latex_equal("\\frac{1}{2}", "") and LATEX.failures == before + 1


def test_no_signal_changes_a_verdict():
    """Ctrl-C goes to all processes of a terminal, SIGTERM to all of a group: the comparison that is
    in flight must not count as wrong."""
    pytest.importorskip("math_verify")
    assert latex_equal("\\frac{1}{2}", "0.5")
    process, failures = LATEX.apart.process, LATEX.failures
    assert os.getsid(process.pid) == process.pid  # a session of its own
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process.pid, number)
        assert latex_equal("\\frac{1}{2}", "0.5") and LATEX.apart.process is process
    process.kill()
    process.wait()
    assert latex_equal("\\frac{1}{2}", "0.5") and not latex_equal("x", "y")
    assert LATEX.apart.process is not process and LATEX.failures == failures


def test_a_comparison_that_hangs_costs_its_time_and_a_new_process(monkeypatch):
    pytest.importorskip("math_verify")
    assert latex_equal("x", "x")
    failures = LATEX.failures
    monkeypatch.setattr(latex, "LATEX_SECONDS", 0.2)
    os.kill(LATEX.apart.process.pid, signal.SIGSTOP)
    assert not latex_equal("1", "1") and LATEX.failures == failures + 1
    assert LATEX.apart.process is None
    monkeypatch.undo()
    assert latex_equal("x", "x") and not latex_equal("1", "2") and LATEX.failures == failures + 1
    assert not latex_equal("1", "1") and LATEX.failures == failures + 2  # it is remembered


def test_an_interrupted_question_leaves_no_reply_for_the_next(monkeypatch):
    pytest.importorskip("math_verify")
    assert latex_equal("x", "x")

    class Interrupted:
        def submit(self, read):
            raise KeyboardInterrupt

    reader, LATEX.apart.reader = LATEX.apart.reader, Interrupted()
    with pytest.raises(KeyboardInterrupt):
        latex_equal("x", "z")
    LATEX.apart.reader = reader
    assert not latex_equal("x", "y")


def test_a_script_without_a_main_guard_may_grade(tmp_path):
    pytest.importorskip("math_verify")
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from problems.latex import latex_equal\n"
        "print(latex_equal('yx', 'xy'), latex_equal('y', 'x'))\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, encoding="utf-8"
    )
    assert done.stdout == "True False\n", done.stderr


def test_a_library_that_does_not_start_is_named(monkeypatch):
    checker = latex._LatexChecker()
    checker.apart.command[2] = "pass"
    with pytest.raises(UserError, match="math-verify does not start"):
        checker.equal("x", "x")


# ------------------------------------------------------------------------------------------ prompts


class FakeTokenizer:
    chat_template = None

    def __call__(self, texts, add_special_tokens=True):
        first = [0] if add_special_tokens else []
        return SimpleNamespace(input_ids=[first + [ord(c) for c in text] for text in texts])

    def apply_chat_template(self, chats, tokenize, add_generation_prompt, enable_thinking):
        assert tokenize is False and add_generation_prompt and enable_thinking is False
        return [f"<user>{messages[0]['content']}<assistant>" for messages in chats]


def test_chat_template_where_there_is_one():
    tokenizer = FakeTokenizer()
    text, ids = render_prompt("Why?", tokenizer)
    assert text == "Question: Why?\nAnswer:" and ids[0] == 0 and len(ids) == len(text) + 1
    tokenizer.chat_template = "yes"
    text, ids = render_prompt("Why?", tokenizer)
    # the template brings its own special tokens
    assert text == "<user>Why?<assistant>" and len(ids) == len(text)


@pytest.mark.parametrize("chat", [True, False])
def test_many_prompts_are_rendered_as_each_is_alone(chat):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = tokenizer.chat_template if chat else None
    questions = ["What is 1 + 2?", "a\n<|im_end|>", "x" * 50]
    alone = [render_prompt(question, tokenizer) for question in questions]
    assert render_prompts([(q, ()) for q in questions], tokenizer) == alone and len(
        alone[0][1]
    ) != len(alone[2][1])


def test_no_prompt_ends_with_an_end_token():
    """Some tokenizers close every text with one; no answer begins behind it."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template, end = None, tokenizer.eos_token
    plain = [ids for _, ids in render_prompts([("Why?", ()), ("And?", ())], tokenizer)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    assert tokenizer("Why?").input_ids[-1] == tokenizer.eos_token_id
    assert [ids for _, ids in render_prompts([("Why?", ()), ("And?", ())], tokenizer)] == plain


def test_an_answer_ends_at_its_first_special_token():
    """What is drawn behind it must not be read as if it followed the text: 385<|im_end|>5."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    digits = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    special = sorted(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)
    assert len(special) == 3
    answers = [digits("385") + [i] + digits("5") for i in special]
    answers += [digits("385"), [special[0]] + digits("385"), []]
    assert response_texts(answers, tokenizer) == ["385"] * 4 + ["", ""]


def test_the_vocabulary_ends_behind_the_largest_id():
    """A tokenizer with holes is shorter than that, and its end token could never be drawn."""
    holes = SimpleNamespace(get_vocab=lambda: {"a": 0, "<end>": 7, "b": 3})
    assert vocabulary(holes) == 8
    assert vocabulary(AutoTokenizer.from_pretrained(TINY)) == 284


@pytest.mark.parametrize("special", [True, False])
def test_thinking_is_bounded_by_its_tokens(special):
    """<think> and </think> end no text; spelled with other tokens they bound nothing."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    spelled = tokenizer("</think>", add_special_tokens=False).input_ids
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    begin, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    digits = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    problem = Problem("q", "8")
    whole = [begin, *digits("7"), end, *digits("8")]
    never_closed = [begin, *digits("7"), *spelled, *digits("8")]
    closed, never = response_texts([whole, never_closed], tokenizer)
    assert closed == "<think>7</think>8" and never == "<think>7</think >8"
    assert grade(problem, closed) == Grade(True, True)
    assert grade(problem, never) == Grade(False, False)
