"""What a resumed run must find unchanged, and folders that were moved, linked or written over."""

import json
import os
import shutil
from decimal import Decimal

import pytest
from conftest import SMALL
from transformers import AutoTokenizer

from common.errors import UserError
from engine.engine import SingleProcess
from run import checkpoint, option_checks
from run.setup import open_run
from tasks import load_problems, read_problems

CLOCK = "{% set now = strftime_now('%H:%M:%S.%f') %}"
SEVEN = "{% if 'is 7 plus' in messages[0].content %}!{% endif %}"


@pytest.fixture
def model(tiny_folder, tmp_path):
    """A copy of the small model, whose tokenizer a test changes."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def started(opened, model):
    """started(*options): a run on the copy, before its first step."""
    return lambda *more: opened("--model", str(model), *more)


def again(run, *more):
    """(run, step) of a run that is resumed, or opened with these options."""
    run.lock.lock.release()
    options = option_checks.parse(["--out", str(run.out), *(more or ["--resume"])], "")
    return open_run(options, SingleProcess("cpu"))


def change_template(folder, change):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = change(tokenizer.chat_template)
    tokenizer.save_pretrained(folder)


def test_a_template_that_asks_for_the_clock_is_named_on_resume(started, model):
    change_template(model, lambda text: CLOCK + "{{ now }}" + text)
    run = started()
    checkpoint.save(run, 0)
    message = "a question has another prompt .*: now '.*asks for the clo"
    with pytest.raises(UserError, match=message):
        again(run)


def test_a_template_that_has_changed_names_the_row(started, model):
    run = started()
    checkpoint.save(run, 0)
    saved = run.out / "checkpoint-0"
    for folder in (model, saved):
        change_template(folder, lambda text: SEVEN + text)
    names = [p for p in saved.iterdir() if p.name != "checksums.json"]
    sums = json.dumps({p.name: checkpoint._sha256(p) for p in names})
    (saved / "checksums.json").write_text(sums, encoding="utf-8")
    with pytest.raises(UserError, match=r"line 8: now '!.*the chat template or the tokenizer has"):
        again(run)


def test_templates_in_a_folder_are_kept(started, model):
    change_template(model, lambda text: {"default": text, "tools": "{{ 'x' }}"})
    inner = os.path.join("additional_chat_templates", "tools.jinja")
    assert (model / inner).is_file()
    run = started()
    checkpoint.save(run, 0)
    run, _ = again(run)
    checkpoint.save(run, 1)
    checkpoint.save_model(run, run.out / "final", checkpoint.gather(run)[0])
    for folder in ("checkpoint-0", "checkpoint-1", "final"):
        assert (run.out / folder / inner).read_text(encoding="utf-8") == "{{ 'x' }}"
    sums = json.loads((run.out / "checkpoint-1" / "checksums.json").read_text(encoding="utf-8"))
    assert "additional_chat_templates/tools.jinja" in sums


def test_a_fault_of_the_program_is_no_full_disk(opened, monkeypatch):
    def wrong(run, folder, weights):
        raise IsADirectoryError(21, "Is a directory", str(folder))

    monkeypatch.setattr("run.checkpoint.save_model", wrong)
    with pytest.raises(IsADirectoryError):
        checkpoint.save(opened(), 0)


def test_linked_checkpoints_are_followed_and_only_the_link_is_deleted(opened, tmp_path):
    run, moved = opened("--save-total-limit", "2"), tmp_path / "moved"
    for step in (1, 2):
        checkpoint.save(run, step)
    link = run.out / "checkpoint-2"
    link.rename(moved)
    link.symlink_to(moved, target_is_directory=True)
    run, step = again(run)
    assert step == 2
    for step in (3, 4):
        checkpoint.save(run, step)
    assert not link.is_symlink() and (run.out / "checkpoint-4").is_dir()
    assert (moved / "run.json").is_file()
    link.symlink_to(moved, target_is_directory=True)
    where = ["--model", run.options.model, "--data", run.options.data]
    again(run, *SMALL, *where, "--overwrite")
    assert not list(run.out.glob("checkpoint-*")) and (moved / "run.json").is_file()


def test_only_exact_repetitions_are_one_question(tmp_path, capsys):
    asked = ["Is CO a gas?", "Is Co a gas?", "if a:\n  b\nc", "if a:\n  b\n  c", "Is CO a gas?"]
    rows = "".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in asked)
    (tmp_path / "q.jsonl").write_text(rows, encoding="utf-8")
    train_set, held_out = load_problems(data=str(tmp_path / "q.jsonl"))
    assert len(train_set) + len(held_out) == 4
    assert "1 of 5 rows ask what another does" in capsys.readouterr().out


@pytest.mark.optional("pyarrow")
def test_decimals_and_an_empty_question_beside_a_prompt(tmp_path):
    import pyarrow
    from pyarrow import parquet

    chat = [{"role": "user", "content": "How many?"}]
    rows = [
        {"question": "", "prompt": chat, "answer": Decimal("7.50")},
        {"question": "Why?", "prompt": [], "answer": Decimal("12.00")},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [(p.question, p.answer, p.kind) for p in read_problems(str(tmp_path / "a.parquet"))]
    assert found == [("How many?", "7.50", "number"), ("Why?", "12.00", "number")]
