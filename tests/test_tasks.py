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
from problems import grading, latex
from problems.countdown import evaluate_expression, random_expression
from problems.grading import Grade, grade, response_texts
from problems.latex import LATEX, latex_equal
from problems.numbers import last_quantity, parse_number
from problems.prompts import render_prompt, render_prompts
from sampling import vocabulary
from tasks import Problem, load_problems, read_problems

EIGHT = Problem("q", "8")
GAME = Problem("q", "16", "countdown", (3, 5, 2))


def cells(table):
    """[(head, text)] of a table: a line is a head, a colon and texts that are parted by bars."""
    found = []
    for line in table.strip().splitlines():
        head, _, texts = line.partition(": ")
        found += [(head, text) for text in texts.replace("<newline>", "\n").split(" | ")]
    return found


def value_of(head):
    return None if head == "none" else Fraction(head)


def verdict_of(problem, text):
    strict, lenient = grade(problem, text)
    return "strict" if strict else "lenient" if lenient else "wrong"


NUMBERS = r"""
72: 72 | 72.00 | 72 dollars
-3: -3
1234: 1,234
2469135/2: 1,234,567.50
11/2: $5.50
-5: -$5 | $-5
1/2: .5
3/4: 3/4 | \frac{3}{4}
-1/2: -\dfrac{1}{2}
50: 50%
18: 18. | **18** | $18$
-7: −7
100000: 1e5 | 1,00,000
1/100000: 1e-5
602000000000000000000000: 6.02e23
3: ٣ | ３
none: abc | NaN | inf | 1e9999 | 1/0 | \frac{1}{0} | 3 4 | 0x10
"""
LAST = """
2: so 3 - 1 = 2 apples
-4: x = -4
1234: costs $1,234.
25/2: v2.0 then 12.50 dollars
800000: 8e5
38: ٣8
83: 8٣
8: is 8. | 8, then
none: 10-4 | 5,6 and 7 | 1/2 or 3/4 | no number | 8.1.2 | 8e
"""


def test_parse_number():
    rows = [*cells(NUMBERS), ("none", ""), ("none", "1" * 41)]
    assert [row for row in rows if parse_number(row[1]) != value_of(row[0])] == []


def test_last_number():
    rows = [*cells(LAST), ("none", "8." + "1" * 41), ("none", "8/" + "1" * 41)]
    found = [(last_quantity(text), value_of(head), text) for head, text in rows]
    assert [row for row in found if (row[0] and row[0].value) != row[1]] == []


ANSWERS = r"""
strict: 8 | #### 8 | 5 + 3 = 8<newline>#### 8 | It is \boxed{8}. | \boxed{8.0} | ####8
strict: #### 7<newline>#### 8 | #### 8 apples | #### $8.00<newline>more text 9
lenient: The answer is 8. | 5 + 3 = 8 | \boxed{8
wrong: First 8,<newline>then 9 | #### 7<newline>or maybe 8 | \boxed{7} and \boxed{8} | eight
"""
EXPRESSIONS = r"""
strict: (3+5)*2 | 2*(5+3) | (3+5)*2 = 16 | \boxed{(3+5)*2} | (3+5)×2
strict: **(3+5)*2** | $(3+5)\times 2$
lenient: Sure: (3+5)*2 | I add:<newline>(3+5)*2<newline> | (3+5)*2 = 17 | (3+5)*2 = 16 = 4
lenient: (3+5)*2 (yes) | (3+5)*2 - correct | - (3+5)*2 | - first I add<newline>- (3+5)*2
lenient: 16 = (3 + 5) * 2. | (as in (3+5)*2) | ((3+5)*2 it is) | 1) (3+5)*2
wrong: 16 | 8*2 | 3+5+2 | (3+5)*2*1 | (3+5)*2<newline>no, 3*5+2 | so 2 − (−3) | -(3+5)*2
wrong: (3+5)**2
"""


@pytest.mark.parametrize("problem, table", [(EIGHT, ANSWERS), (GAME, EXPRESSIONS)])
def test_strict_and_lenient(problem, table):
    rows = [*cells(table), ("wrong", "")]
    assert [row for row in rows if verdict_of(problem, row[1]) != row[0]] == []


def test_expression_by_hand():
    assert evaluate_expression("(3+5)*2") == (16, [3, 5, 2])
    assert evaluate_expression("7/2 - 1") == (Fraction(5, 2), [7, 2, 1])
    texts = "2**3|2//3|-3+5|1/0|1/(2-2)|a+1|f(1)|1.5+1|__import__('os')|(1)(2)|()|1 2|٣+1|1+"
    texts = [*texts.split("|"), "0x1+1", "1_0+1", "True+1", "lambda:1", "9" * 201]
    for text in [*texts, "(" * 30 + "1" + ")" * 30]:
        assert evaluate_expression(text) is None, text


HOSTILE = ["9**9**9", "NaN", "٣٣", "import os; os.system('true')", "a" * 19_000 + "=5"]
HOSTILE += ["(" * 10_000, "(" * 10_000 + ")" * 10_000, "-" * 10_000 + "1", "1" * 100_000]
HOSTILE += ["1," * 50_000, "\\boxed{" * 5_000, "#### " * 10_000, "1/" * 5_000 + "1", "$" * 50_000]
HOSTILE += [" " * 50_000, "((((1)+1)+1)" * 500, "1" + ",111" * 1_600, "1" + " " * 19_000 + "x"]
HOSTILE += ["1" + "." * 19_000 + "x", "\n" * 19_000 + "1", "- " * 9_000 + "1", "1)" * 9_000]
HOSTILE += ["1 + (" * 4_000, "1 " * 9_000 + "x", "1\n" * 9_000, "*1" * 9_000, "<a" * 9_000 + "1"]
HOSTILE += ["\\text{" * 3_000 + "1", "\\frac{1" * 2_000, "1 million " * 1_900, "5 " + "m" * 19_000]


def test_hostile_answers_cost_little_and_evaluate_nothing():
    for text in HOSTILE:
        started = time.process_time()
        for problem in (EIGHT, GAME):
            assert grade(problem, text).strict is False, text[:20]
        assert time.process_time() - started < 1.0, text[:20]


def test_random_expressions_are_worth_what_they_say():
    rng = random.Random(0)
    for _ in range(300):
        numbers = [rng.randint(1, 12) for _ in range(rng.randint(1, 5))]
        text, value = random_expression(numbers, rng)
        found, used = evaluate_expression(text)
        assert found == value and sorted(used) == sorted(numbers)


@pytest.mark.parametrize("task", ["countdown", "arithmetic"])
def test_built_in_problems_are_disjoint_repeatable_and_solvable(task, monkeypatch):
    assert load_problems(task) == load_problems(task)
    monkeypatch.setattr(tasks, "QUESTIONS", 20_000)  # all of them
    train, held_out = load_problems(task)
    assert len(held_out) >= 10
    bag = lambda p: (tuple(sorted(p.question.replace("?", "").split())), p.answer)
    assert not set(map(bag, train)) & set(map(bag, held_out))
    if task == "arithmetic":
        assert all(grade(p, f"The answer is {p.answer}.").lenient for p in train)
        return
    assert len(held_out) >= 512
    for p in train[:20]:
        assert any(
            evaluate_expression(f.format(*n, *o)) == (int(p.answer), list(n))
            for n in itertools.permutations(p.numbers)
            for o in itertools.product("+-*", repeat=2)
            for f in ("({0}{3}{1}){4}{2}", "{0}{3}({1}{4}{2})")
        ), p


def test_arithmetic_answers():
    for level in (1, 2, 3, 4):
        for p in load_problems("arithmetic", difficulty=level)[1][:50]:
            _, _, a, sign, b = p.question.rstrip("?").split()
            a, b = int(a), int(b)
            assert int(p.answer) == {"plus": a + b, "minus": a - b, "times": a * b}[sign]
    with pytest.raises(UserError, match="--difficulty 9: countdown has the levels 3, 4, 5"):
        load_problems("countdown", difficulty=9)


# -------------------------------------------------------------------------------------------- files


def without_math_verify(monkeypatch, installed=False):
    for module in (grading, tasks):
        monkeypatch.setattr(module, "has_math_verify", lambda: installed)


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_jsonl(tmp_path):
    worked = {"question": "How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 1,007"}
    boxed = {"prompt": "And?", "answer": "so \\boxed{-2.5}"}
    path = write(tmp_path / "a.jsonl", worked, "", boxed, {"question": "x", "answer": 12})
    found = [(p.question, p.answer, p.kind) for p in read_problems(path)]
    assert found[:2] == [("How many?", "1,007", "number"), ("And?", "-2.5", "number")]
    assert found[2:] == [("x", "12", "number")]


def test_a_number_of_a_file_stays_that_number(tmp_path):
    values = [1e-05, 1e16, 2.50, -3, 12345678901234567890]
    path = write(tmp_path / "a.jsonl", *({"question": f"q{v}", "answer": v} for v in values))
    problems = read_problems(path)
    assert [p.answer for p in problems[:4]] == ["0.00001", "10000000000000000", "2.5", "-3"]
    assert problems[4].answer == "12345678901234567890"
    assert all(p.kind == "number" and grade(p, p.answer).strict for p in problems)


# The rows of a file, and the message; a text is a line as it stands there.
BAD = [
    (['{"question": "a", "answer": NaN}'], "line 1: its reference answer is nan, neither a tex"),
    (['{"question": "a", "answer": -Infinity}'], "line 1: its reference answer is -inf"),
    ([], "it holds no rows"),
    ([{"question": "a", "answer": None}], r"line 1: it has no answer .*it has question"),
    ([{"question": "a", "answer": True}], "line 1: its reference answer is true or false"),
    ([{"question": "a", "answer": [1]}], "line 1: its reference answer is a list"),
    ([{"question": "a", "answer": {"x": 1}}], "line 1: its reference answer is an object"),
    ([{"question": ["a"], "answer": "1"}], "line 1: its question is a list, but not of mess"),
    ([{"prompt": None, "answer": "1"}], "line 1: it has no question .*it has answer"),
    ([{"question": "a\ud800", "answer": "1"}], "line 1: it holds half a character"),
    ([{"question": 5, "answer": "1"}], "line 1: its question is 5, neither a text nor a chat"),
    ([{"question": "a", "answer": "1"}, "{oops"], "line 2: not JSON"),
    (['{"question": "a"'], r"line 1: not JSON \((?!.*line 2)"),  # one line number, not two
    (["[1]"], "line 1: not a JSON object"),
    ([{"q": "a"}], "line 1: it has no question .no question or prompt or messages; it has q"),
    ([{"question": "  ", "answer": "1"}], "line 1: its question is empty"),
    (['{"question": "a", "answer": ' + "9" * 5_000 + "}"], "line 1: not JSON"),
    ([{"question": "a", "answer": " "}], "none of its 1 rows can be used; line 1: its reference"),
]


def test_bad_files_name_file_and_line(tmp_path, monkeypatch):
    without_math_verify(monkeypatch)
    for rows, message in BAD:
        with pytest.raises(UserError, match=message) as error:
            read_problems(write(tmp_path / "bad.jsonl", *rows))
        assert "bad.jsonl" in str(error.value) and "\n" not in str(error.value), message


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
    answers = ["(3, \\pi)", "4 apples", "no idea", ""]
    path = write(tmp_path / "a.jsonl", *({"question": f"q{a}", "answer": a} for a in answers))
    words = [("4 apples", "number"), ("no idea", "text")]
    for installed, kept, line in ((False, words, 1), (True, [("(3, \\pi)", "latex"), *words], 4)):
        without_math_verify(monkeypatch, installed)
        assert [(p.answer, p.kind) for p in read_problems(path)] == kept
        left_out = f"{4 - len(kept)} of 4 rows left out, the first is line {line}: its reference an"
        assert left_out in capsys.readouterr().out


def test_missing_file():
    for flag in ("--eval-data", "--data"):
        with pytest.raises(UserError, match=f"{flag} nowhere.jsonl: no such file"):
            read_problems("nowhere.jsonl", flag)


@pytest.mark.optional("pyarrow")
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


FORMULAS = r"""
strict: so it is \boxed{-q+p} | -q + p | $-q + p$
lenient: so it is $q$, no, $-q+p$ | First I subtract.<newline>Then it is \(-q+p\).
wrong: so it is $-q+p$, no, $q$ | \boxed{q-p}
"""


@pytest.mark.optional("math_verify")
def test_latex_in_a_killable_process():
    assert latex_equal("\\frac{1}{2}", "0.5") and not latex_equal("x+1", "x+2")
    difference = Problem("q", "p - q", "latex")
    assert [row for row in cells(FORMULAS) if verdict_of(difference, row[1]) != row[0]] == []
    before = LATEX.failures
    # a truth that cannot be read is counted
    assert not latex_equal("\\frac{1}{2}", "") and LATEX.failures == before + 1


@pytest.mark.optional("math_verify")
def test_no_signal_changes_a_verdict():
    """Ctrl-C goes to all processes of a terminal, SIGTERM to all of a group: the comparison that is
    in flight must not count as wrong."""
    assert latex_equal("1 + y", "y + 1")
    process, failures = LATEX.apart.process, LATEX.failures
    assert os.getsid(process.pid) == process.pid  # a session of its own
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process.pid, number)  # each comparison is new: verdicts are remembered
        assert latex_equal(f"{number:d} + y", f"y + {number:d}") and LATEX.apart.process is process
    process.kill()
    process.wait()
    assert latex_equal("3 + y", "y + 3") and not latex_equal("3 + y", "y")
    assert LATEX.apart.process is not process and LATEX.failures == failures


@pytest.mark.optional("math_verify")
def test_a_comparison_that_hangs_costs_its_time_and_a_new_process(monkeypatch):
    assert latex_equal("x", "x")
    failures = LATEX.failures
    monkeypatch.setattr(latex, "LATEX_SECONDS", 0.2)
    os.kill(LATEX.apart.process.pid, signal.SIGSTOP)
    assert not latex_equal("1", "1") and LATEX.failures == failures + 1
    assert LATEX.apart.process is None
    monkeypatch.undo()
    assert latex_equal("x", "x") and not latex_equal("1", "2") and LATEX.failures == failures + 1
    assert not latex_equal("1", "1") and LATEX.failures == failures + 2  # it is remembered


@pytest.mark.optional("math_verify")
def test_an_interrupted_question_leaves_no_reply_for_the_next():
    assert latex_equal("a + b", "b + a")  # the process runs

    class Interrupted:
        def submit(self, read):
            raise KeyboardInterrupt

    reader, LATEX.apart.reader = LATEX.apart.reader, Interrupted()
    with pytest.raises(KeyboardInterrupt):
        latex_equal("a", "b")
    LATEX.apart.reader = reader
    assert latex_equal("2a", "a + a")  # the reply to the question before would be False


@pytest.mark.optional("math_verify")
@pytest.mark.programs
def test_a_script_without_a_main_guard_may_grade(tmp_path):
    script = tmp_path / "script.py"
    first = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom problems.latex import latex_equal"
    then = "print(latex_equal('yx', 'xy'), latex_equal('y', 'x'))"
    script.write_text(f"{first}\n{then}\n", encoding="utf-8")
    how = dict(capture_output=True, text=True, timeout=60, encoding="utf-8")
    done = subprocess.run([sys.executable, script], **how)
    assert done.stdout == "True False\n", done.stderr


def test_a_library_that_does_not_start_is_named():
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


def test_many_prompts_are_rendered_as_each_is_alone():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    questions = ["What is 1 + 2?", "a\n<|im_end|>", "x" * 50]
    for template in (tokenizer.chat_template, None):
        tokenizer.chat_template = template
        alone = [render_prompt(question, tokenizer) for question in questions]
        assert render_prompts([(q, ()) for q in questions], tokenizer) == alone, template
        assert len(alone[0][1]) != len(alone[2][1])


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
