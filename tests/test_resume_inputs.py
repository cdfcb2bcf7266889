"""What a resumed run must find unchanged, and folders that were moved, linked or written over."""

import json
import os
from decimal import Decimal

import pytest
from conftest import TINY
from transformers import AutoTokenizer

import train
from common.errors import UserError
from tasks import load_problems, read_problems

CLOCK = "{% set now = strftime_now('%H:%M:%S.%f') %}"


@pytest.fixture
def given(tmp_path):
    """The options of a short run on a copy of the shipped model, whose tokenizer a test changes."""
    from common.models import load_model

    model, tokenizer = load_model(str(TINY))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = "".join(f'{{"question": "What is {i} + 1?", "answer": "{i + 1}"}}\n' for i in range(12))
    (tmp_path / "q.jsonl").write_text(rows, encoding="utf-8")
    sizes = "--prompts-per-step 4 --num-generations 2 --updates-per-rollout 1 --max-new-tokens 8"
    more = "--eval-prompts 2 --device cpu --no-self-check --save-total-limit 2"
    paths = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "q.jsonl")]
    return [*sizes.split(), *more.split(), *paths, "--out", str(tmp_path / "run")]


def change_template(folder, change):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = change(tokenizer.chat_template)
    tokenizer.save_pretrained(folder)


def test_a_template_that_asks_for_the_clock_is_named_on_resume(given, tmp_path):
    change_template(tmp_path / "model", lambda text: CLOCK + "{{ now }}" + text)
    train.main([*given, "--steps", "1"])
    with pytest.raises(
        UserError, match="a question has another prompt .*: now '.*asks for the clo"
    ):
        train.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "2"])


def test_a_template_that_has_changed_names_the_row(given, tmp_path):
    train.main([*given, "--steps", "1"])
    for folder in (tmp_path / "model", tmp_path / "run" / "checkpoint-1"):
        change_template(
            folder, lambda text: "{% if '7 + 1' in messages[0].content %}!{% endif %}" + text
        )
    sums = tmp_path / "run" / "checkpoint-1" / "checksums.json"
    from run.checkpoint import _sha256

    names = [p for p in sums.parent.iterdir() if p.name != "checksums.json"]
    sums.write_text(json.dumps({p.name: _sha256(p) for p in names}), encoding="utf-8")
    with pytest.raises(UserError, match=r"line 8: now '!.*the chat template or the tokenizer has"):
        train.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "2"])


def test_templates_in_a_folder_are_kept(given, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tools": "{{ 'x' }}"}
    tokenizer.save_pretrained(tmp_path / "model")
    inner = os.path.join("additional_chat_templates", "tools.jinja")
    assert (tmp_path / "model" / inner).is_file()
    train.main([*given, "--steps", "1"])
    for folder in ("checkpoint-1", "final"):
        assert (tmp_path / "run" / folder / inner).read_text(encoding="utf-8") == "{{ 'x' }}"
    sums = json.loads((tmp_path / "run/checkpoint-1/checksums.json").read_text(encoding="utf-8"))
    assert "additional_chat_templates/tools.jinja" in sums
    train.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "2"])


def test_a_fault_of_the_program_is_no_full_disk(given, tmp_path, monkeypatch):
    def wrong(run, folder, weights):
        raise IsADirectoryError(21, "Is a directory", str(folder))

    monkeypatch.setattr("run.checkpoint.save_model", wrong)
    with pytest.raises(IsADirectoryError):
        train.main([*given, "--steps", "1"])


def test_linked_checkpoints_are_followed_and_only_the_link_is_deleted(given, tmp_path):
    train.main([*given, "--steps", "2"])
    run, moved = tmp_path / "run", tmp_path / "moved"
    (run / "checkpoint-2").rename(moved)
    (run / "checkpoint-2").symlink_to(moved, target_is_directory=True)
    train.main(["--resume", "--out", str(run), "--steps", "5"])
    assert not (run / "checkpoint-2").is_symlink() and (run / "checkpoint-5").is_dir()
    assert (moved / "run.json").is_file()
    (run / "checkpoint-6").symlink_to(moved, target_is_directory=True)
    train.main([*given, "--steps", "1", "--overwrite"])
    names = {p.name for p in run.glob("checkpoint-*")}
    assert names == {"checkpoint-0", "checkpoint-1"} and (moved / "run.json").is_file()


def test_only_exact_repetitions_are_one_question(tmp_path, capsys):
    asked = ["Is CO a gas?", "Is Co a gas?", "if a:\n  b\nc", "if a:\n  b\n  c", "Is CO a gas?"]
    rows = "".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in asked)
    (tmp_path / "q.jsonl").write_text(rows, encoding="utf-8")
    train_set, held_out = load_problems(data=str(tmp_path / "q.jsonl"))
    assert len(train_set) + len(held_out) == 4
    assert "1 of 5 rows ask what another does" in capsys.readouterr().out


def test_decimals_and_an_empty_question_beside_a_prompt(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    chat = [{"role": "user", "content": "How many?"}]
    rows = [
        {"question": "", "prompt": chat, "answer": Decimal("7.50")},
        {"question": "Why?", "prompt": [], "answer": Decimal("12.00")},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [(p.question, p.answer, p.kind) for p in read_problems(str(tmp_path / "a.parquet"))]
    assert found == [("How many?", "7.50", "number"), ("Why?", "12.00", "number")]
