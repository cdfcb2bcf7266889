"""Data as people have it, a reward of their own, and data that have moved."""

import csv
import gzip
import io
import json
import sys
import types

import pytest
import torch
from conftest import SMALL, TINY

import evaluate
import train
from common.errors import UserError
from engine.engine import SingleProcess
from problems.files import DatasetSpec, rows_of
from problems.grading import grade
from problems.prompts import fit_context, render_prompt
from run import checkpoint, report, reward_function
from run.option_checks import parse
from run.setup import open_run
from tasks import Problem, key_of, load_problems, read_problems

ROWS = [{"question": f"What is {n} plus 1?", "answer": str(n + 1)} for n in range(7)]


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    written = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), written)
    return written.getvalue()


def as_array(rows):
    return json.dumps(rows, indent=1).encode()


FORMS = {"a.jsonl": as_jsonl, "a.json": as_array, "lines.json": as_jsonl, "a.csv": as_csv}


def read(folder, rows, *more):
    """What is read of these rows in a file a.jsonl."""
    (folder / "a.jsonl").write_bytes(as_jsonl(rows))
    return read_problems(folder / "a.jsonl", *more)


@pytest.mark.parametrize(
    "name", [*FORMS, pytest.param("a.parquet", marks=pytest.mark.optional("pyarrow"))]
)
def test_every_form_of_a_file(tmp_path, name):
    content = (FORMS | {"a.parquet": as_parquet})[name](ROWS)
    for spelled in (name, name.upper()):
        for packed in ("", ".gz", ".GZ"):
            path = tmp_path / (spelled + packed)
            path.write_bytes(gzip.compress(content) if packed else content)
            problems = read_problems(path)
            assert [(p.question, p.answer) for p in problems] == [(*row.values(),) for row in ROWS]
            assert problems[2].row["answer"] == "3"
            assert problems[2].place in ("line 3", "line 4", "row 3")
    if name in ("a.jsonl", "a.json", "a.csv"):  # a byte order mark and Windows line ends
        content = content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        (tmp_path / f"w{name}").write_bytes(b"\xef\xbb\xbf" + content)
        assert len(read_problems(tmp_path / f"w{name}")) == 7


HALF, OPEN = gzip.compress(as_jsonl(ROWS), mtime=0)[:40], gzip.compress(b"[", mtime=0)[:-3]
BROKEN = [
    ("a.json", b"[{]", "a.json: not JSON"),
    ("a.json", b"[5]", "a.json, row 1: not a JSON object"),
    ("a.csv", b"question,answer\na,1,2\n", "a.csv, line 2: has another number of fields"),
    ("a.csv", b"question,answer\na\n", "a.csv, line 2: has another number of fields"),
    ("a.csv", b'question,answer\n"a,1\n', "a.csv, line 1: not CSV"),
    ("a.csv", "question,answer\ncaf\xe9,1\n".encode("latin-1"), "a.csv: not UTF-8"),
    ("a.jsonl.gz", HALF, "a.jsonl.gz: not a whole .gz file"),
    ("a.csv.gz", b"question,answer\n", "a.csv.gz: not a whole .gz file"),
    ("a.json.gz", OPEN, "a.json.gz: not a whole .gz file"),
]


def test_broken_files_are_one_line(tmp_path):
    for name, content, message in BROKEN:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            read_problems(tmp_path / name)
        assert "\n" not in str(error.value)


def test_columns_by_name(tmp_path):
    rows = [{"q": "How many?", "x": {"gold": 7}, "question": "another"}]
    form = DatasetSpec(question="q", answer="x.gold")
    assert read(tmp_path, rows, "--data", form) == [Problem("How many?", "7")]
    with pytest.raises(UserError, match="line 1: it has no answer .no nothing; it has q, question"):
        read_problems(tmp_path / "a.jsonl", "--data", DatasetSpec(answer="nothing"))


def test_what_cannot_be_used_is_counted_by_reason(tmp_path, capsys):
    rows = [*ROWS, {"question": "a"}, {"question": "b"}, {"prompt": "c", "answer": {"x": 1}}]
    rows += [{"prompt": None, "question": "d", "answer": "4"}]
    assert len(read(tmp_path, rows)) == 8
    said = capsys.readouterr().out
    assert "2 of 11 rows left out, the first is line 8: it has no answer" in said
    assert "1 of 11 rows left out, the first is line 10: its reference answer is an object" in said
    (tmp_path / "a.jsonl").write_bytes(b"\n" + as_jsonl(ROWS[:2]))  # places are those of the file
    assert [place for place, _ in rows_of(tmp_path / "a.jsonl")] == ["line 2", "line 3"]


# ---------------------------------------------------------------------------------------- data sets


def a_dataset(monkeypatch, rows, configurations=("main", "other")):
    """A library `datasets` that holds these rows by split; returns what was asked of it."""
    asked = []

    def load(name, configuration=None, split=None):
        asked.append((name, configuration, split))
        if split not in rows:
            raise ValueError(f"Unknown split {split!r}.\nMore.")
        return rows[split]

    library = types.ModuleType("datasets")
    library.load_dataset, library.load_from_disk = load, lambda name: rows
    library.get_dataset_config_names = lambda name: list(configurations)
    library.config = types.SimpleNamespace(HF_DATASETS_CACHE="/nowhere")
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setattr("problems.files.check_network", lambda *a, **k: None)
    return asked


def test_a_data_set_of_the_hub(monkeypatch, capsys):
    asked = a_dataset(monkeypatch, {"train": ROWS, "test": ROWS[:2]})
    assert len(read_problems("openai/gsm8k")) == 7
    assert len(read_problems("openai/gsm8k:other", "--data", DatasetSpec(split="test"))) == 2
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "other", "test")]
    with pytest.raises(UserError, match="cannot read its split 'dev' .Unknown split 'dev'"):
        read_problems("openai/gsm8k", "--data", DatasetSpec(split="dev"))
    a_dataset(monkeypatch, {}, ("a", "b"))
    with pytest.raises(UserError, match="has the configurations a, b; name one of them: x/y:a"):
        read_problems("x/y")


def test_a_folder_of_data(monkeypatch, tmp_path):
    asked = a_dataset(monkeypatch, {"train": ROWS})
    assert len(read_problems(tmp_path)) == 7 and asked == [(str(tmp_path), None, "train")]
    (tmp_path / "dataset_dict.json").write_text("{}", encoding="utf-8")
    assert len(read_problems(tmp_path)) == 7 and len(asked) == 1  # as save_to_disk leaves it
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="a folder is read through datasets: pip install datasets"):
        read_problems(tmp_path)
    with pytest.raises(UserError, match="no file; a hub's data set is read through datasets"):
        read_problems("openai/gsm8k")
    with pytest.raises(UserError, match="--data data/none.jsonl: no such file"):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "data").mkdir()
        read_problems("data/none.jsonl")
    with pytest.raises(UserError, match="--data dta/none.csv.gz: no such file"):
        read_problems("dta/none.csv.gz")


@pytest.mark.optional("datasets")
def test_the_library_itself_reads_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes(as_jsonl(ROWS))
    (tmp_path / "data" / "test.jsonl").write_bytes(as_jsonl(ROWS[:3]))
    assert len(read_problems(tmp_path / "data")) == 7
    assert len(read_problems(tmp_path / "data", "--data", DatasetSpec(split="test"))) == 3


# -------------------------------------------------------------------------------------------- chats

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": [{"type": "text", "text": "2 "}, {"type": "text", "text": "+ 2?"}]},
]


class Template:
    """A tokenizer of letters whose template writes every message."""

    chat_template, eos_token_id = "yes", None

    def apply_chat_template(self, chats, **how):
        return ["".join(f"<{m['role']}>{m['content']}" for m in c) + "<assistant>" for c in chats]

    def __call__(self, texts, **how):
        return types.SimpleNamespace(input_ids=[[ord(c) for c in text] for text in texts])


def test_a_chat_reaches_the_prompt_whole(tmp_path):
    (problem,) = read(tmp_path, [{"prompt": CHAT, "answer": "4"}])
    assert problem.question == "2 + 2?" and problem.answer == "4"
    assert problem.history == (("system", "Be short."), ("user", "Hello"), ("assistant", "Hi."))
    text, _ = render_prompt(problem.question, Template(), problem.history)
    assert text == "<system>Be short.<user>Hello<assistant>Hi.<user>2 + 2?<assistant>"
    config = types.SimpleNamespace(max_position_embeddings=500)
    ((_, ids),) = fit_context([problem], Template(), config, 10)
    assert "".join(map(chr, ids)) == text
    tokenizer = Template()
    tokenizer.chat_template = None
    plain, _ = render_prompt(problem.question, tokenizer, problem.history)
    assert plain == "Be short.\n\nQuestion: Hello\nAnswer: Hi.\n\nQuestion: 2 + 2?\nAnswer:"


def test_another_system_message_is_another_question(tmp_path):
    chats = [[{**CHAT[0], "content": text}, CHAT[1]] for text in ("a", "b", "a")]
    rows = [{"prompt": chat, "answer": "4"} for chat in chats]
    a, b, again = map(key_of, read(tmp_path, rows))
    assert a == again != b


def test_chats_that_are_none(tmp_path):
    none = "not of messages with role and text"
    for prompt, reason in (
        (CHAT[:3], "its last message is the assistant's, not the user's"),
        ([*CHAT[:3], {"role": "user"}], none),
        ([{"role": "user", "content": [{"type": "image"}]}], none),
        ([], "its question is a list, neither a text nor a chat"),
    ):
        with pytest.raises(UserError, match=f"line 1: .*{reason}"):
            read(tmp_path, [{"prompt": prompt, "answer": "4"}])


@pytest.mark.optional("pyarrow")
def test_verls_parquet_keeps_its_system_message(tmp_path):
    row = {"prompt": [CHAT[0], CHAT[1]], "reward_model": {"ground_truth": "7", "style": "rule"}}
    (tmp_path / "a.parquet").write_bytes(as_parquet([row]))
    (problem,) = read_problems(tmp_path / "a.parquet")
    assert problem == Problem("Hello", "7", history=(("system", "Be short."),))


def test_a_row_that_the_template_refuses_is_named(tmp_path):
    class Strict(Template):
        def apply_chat_template(self, chats, **how):
            if any(message["role"] == "system" for chat in chats for message in chat):
                raise RuntimeError("System role not supported\nmore")
            return super().apply_chat_template(chats, **how)

    problems = read(tmp_path, [*ROWS, {"prompt": CHAT, "answer": "4"}])
    config = types.SimpleNamespace(max_position_embeddings=500)
    said = "line 8, question '2 . 2.': .*System role not supp"
    with pytest.raises(UserError, match=said) as error:
        fit_context(problems, Strict(), config, 10)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------ own rewards

SHORTER = '''
def shorter(question, answer, text):
    """Exact match, less a thousandth a character."""
    return float(text.strip() == answer) - 0.001 * len(text)
'''


def a_function(folder, text=SHORTER, name="shorter"):
    (folder / "mine.py").write_text(text, encoding="utf-8")
    return f"{folder / 'mine.py'}:{name}"


def paid_by(folder, text, *more):
    return reward_function.RewardFunction(a_function(folder, text, "f"), *more)


def test_a_function_is_paid_and_the_row_is_handed_over_where_it_is_asked_for(tmp_path):
    pay = reward_function.RewardFunction(a_function(tmp_path))
    assert pay(Problem("q", "12"), "12") == pytest.approx(0.998)
    assert pay(Problem("q", "12"), "so 12") == pytest.approx(-0.005)
    assert len(SHORTER.strip().splitlines()) <= 6
    problem = Problem("q", "1", row={"question": "q", "answer": "1", "level": 5, "more": None})
    every = "def f(question, answer, text, **row): return row['level'] + len(row)"
    one = "def f(question, answer, text, level=0): return level"
    neighbour = "import beside\ndef f(question, answer, text): return beside.VALUE"
    (tmp_path / "beside.py").write_text("VALUE = 3", encoding="utf-8")
    for text, reward in ((every, 7), (one, 5), (neighbour, 3)):
        assert paid_by(tmp_path, text)(problem, "x") == reward, text


FAILURES = {
    "raise ValueError('no')": "ValueError: no",
    "return float('nan')": "the reward is nan",
    "return 'much'": "could not convert",
    "import os; os._exit(1)": "its process died",
    "import time; time.sleep(60)": "no reward within 0.4 s",
}


def test_a_function_that_fails_is_named_with_the_answer(tmp_path, monkeypatch):
    for text, said in FAILURES.items():
        lines, usual = [], "def f(question, answer, text):\n    if text == 'bad':\n        "
        with monkeypatch.context() as patch:
            patch.setattr(reward_function, "REWARD_SECONDS", 0.4 if "sleep" in text else 20)
            pay = paid_by(tmp_path, f"{usual}{text}\n    return 2", lines.append)
            reward = pay(Problem("q", "1"), "bad")
        assert reward != reward and len(lines) == 1, text
        assert said in lines[0] and "for the response 'bad'" in lines[0] and "mine.py:f" in lines[0]
        assert pay(Problem("q", "1"), "good") == 2 and len(lines) == 1, text


def test_what_a_function_prints_is_no_reply(tmp_path, capfd):
    noisy = "import os\nprint('loaded')\ndef f(question, answer, text):\n    os.write(1, b'5\\n')\n"
    pay = paid_by(tmp_path, noisy + "    print('here')\n    return 2")
    assert pay(Problem("q", "1"), "x") == 2
    printed = capfd.readouterr()
    assert printed.out == "" and "loaded" in printed.err


def test_a_function_that_is_not_there_is_one_line(tmp_path):
    a_function(tmp_path)
    (tmp_path / "broken.py").write_text("def f(:", encoding="utf-8")
    for given, message in (
        ("nothing.py:f", "no such file; give FILE.py:NAME"),
        ("f", "give FILE.py:NAME"),
        (f"{tmp_path}/mine.py:g", "AttributeError: .*has no function g"),
        (f"{tmp_path}/broken.py:f", "SyntaxError"),
    ):
        with pytest.raises(UserError, match=f"--reward-function .*{message}"):
            reward_function.RewardFunction(given)


def test_a_step_is_paid_by_the_function(opened, tmp_path, capsys):
    """The verdict stands beside it; groups live by the rewards; a failure is a bad step."""
    letters = "def f(question, answer, text): return text.count('1') / 7 + int(answer)"
    run = opened("--reward-function", a_function(tmp_path, letters, "f"))
    metrics, bad = train.guarded_step(1, run)
    batch = run.last_batch
    gold = [int(batch.problems[row // 2].answer) for row in range(8)]
    expected = torch.tensor([text.count("1") / 7 + n for text, n in zip(batch.texts, gold)])
    assert bad is None and torch.allclose(batch.rewards, expected)
    assert metrics["reward"] == pytest.approx(expected.mean().item())
    assert metrics["correct"] == batch.lenient.float().mean().item()
    pairs, alive = expected.view(-1, 2), batch.has_reward_variance.view(-1, 2)[:, 0]
    assert alive.tolist() == (pairs[:, 0] != pairs[:, 1]).tolist()
    held_out = report.held_out(run, 0)
    assert 1 <= held_out["eval_reward"] < 31 and "eval_accuracy" in held_out
    report.record(1, metrics | held_out, None, run)
    assert "held-out reward" in capsys.readouterr().out
    run = opened("--reward-function", a_function(tmp_path, "def f(*a): raise OSError('down')", "f"))
    metrics, bad = train.guarded_step(1, run)
    assert "a reward is NaN" in bad and "OSError: down; for the response" in capsys.readouterr().out


def test_a_function_may_pay_for_answers_that_no_rule_checks(tmp_path):
    poem = "Write a poem.\nOf two lines."
    rows = [{"question": f"q{n}", "answer": f"{poem} {n}"} for n in range(8)]
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(rows))
    with pytest.raises(UserError, match="none of its 8 rows can be used"):
        load_problems(data=tmp_path / "a.jsonl")
    train_set, held_out = load_problems(data=tmp_path / "a.jsonl", any_answer=True)
    assert len(train_set) + len(held_out) == 8 and train_set[0].kind == "unchecked"
    assert not any(grade(train_set[0], train_set[0].answer))


# ------------------------------------------------------------------------------------------ moving


def test_data_may_move_and_must_ask_the_same(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # no curves
    data, moved, other = (tmp_path / name for name in ("a.jsonl", "moved.csv.gz", "other.jsonl"))
    data.write_bytes(as_jsonl(ROWS))
    out, copied = tmp_path / "run", tmp_path / "elsewhere" / "run"
    small = [*SMALL, "--prompts-per-step", "2", "--eval-prompts", "2", "--model", str(tiny_folder)]
    train.main([*small, "--out", str(out), "--data", str(data), "--steps", "1"])
    moved.write_bytes(gzip.compress(as_csv(ROWS)))
    data.unlink()
    again = ["--resume", "--out", str(out), "--steps", "2"]
    with pytest.raises(UserError, match="no such file; if it lies elsewhere now, add --data N"):
        train.main(again)
    other.write_bytes(as_jsonl(ROWS[1:]))
    with pytest.raises(UserError, match="other.jsonl: the questions in use are not those"):
        train.main([*again, "--data", str(other)])
    copied.parent.mkdir()
    out.rename(copied)
    again[2] = str(copied)
    train.main([*again, "--data", str(moved)])
    lines = (copied / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    assert json.loads((copied / "config.json").read_text(encoding="utf-8"))["data"] == str(moved)


def test_a_changed_reward_function_is_another_run(opened, tmp_path):
    run = opened("--reward-function", a_function(tmp_path))
    checkpoint.save(run, 0)
    run.lock.lock.release()
    again = parse(["--resume", "--out", str(run.out)], "")
    run, step = open_run(again, SingleProcess("cpu"))
    run.lock.lock.release()
    assert step == 0
    a_function(tmp_path, SHORTER.replace("0.001", "0.01"))
    with pytest.raises(UserError, match="the file is not what it was when the run"):
        open_run(again, SingleProcess("cpu"))


def test_evaluate_reads_the_same_forms(tmp_path):
    (tmp_path / "a.csv").write_bytes(as_csv([{"q": "What is 2 + 2?", "a": "4"}]))
    columns = ["--question-column", "q", "--answer-column", "a"]
    arguments = ["--model", str(TINY), "--data", str(tmp_path / "a.csv"), *columns]
    asked = evaluate.evaluation_set(args := evaluate.read_command_line(arguments, ""), None)
    assert evaluate.held_out_questions(args, asked) == [Problem("What is 2 + 2?", "4")]
