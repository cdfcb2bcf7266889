"""What is answered before torch is imported: help, versions and mistakes in the command line."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

TRAIN, EVALUATE, INTERNALS = "train.py", "evaluate.py", "internals.py"


@pytest.fixture
def answer(tmp_path):
    """answer(program, *arguments): (exit code, output) where importing torch is an error."""
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text(
            f"raise SystemExit('{name} was imported')\n", encoding="utf-8"
        )

    def run(program, *arguments):
        env = os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "100"}
        command = [sys.executable, ROOT / program, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.parametrize("program", [TRAIN, EVALUATE, INTERNALS])
def test_help_and_versions(answer, program):
    code, text = answer(program, "--help")
    assert code == 0 and "--version" in text and "--threads" in text
    code, text = answer(program, "--version")
    assert code == 0 and text.count(".") >= 8  # four versions of three parts each
    assert text.startswith("HAPO and BuPO 0.") and "torch 2." in text and "transformers 5." in text


MISTAKES = [
    (TRAIN, "--stepps 3", "unrecognized arguments: --stepps 3 (see --help)"),
    (TRAIN, "--steps three", "argument --steps: invalid int value: 'three' (see --help)"),
    (TRAIN, "--algo ppo", "argument --algo: invalid choice: 'ppo'"),
    (TRAIN, "--data nope.jsonl --out NEW", "--data nope.jsonl: no such file"),
    (TRAIN, "--data HELD --eval-data nope.csv --out NEW", "--eval-data nope.csv: no such file"),
    (
        TRAIN,
        "--model nope --out NEW",
        "--model nope: no such folder; give a Hugging Face model folder",
    ),
    (TRAIN, "--reward-function nope.py:f --out NEW", "--reward-function nope.py:f: no such file"),
    (TRAIN, "--out RUN", "already holds a run; --resume continues it, --overwrite deletes it"),
    (TRAIN, "--out assets/tiny-qwen3", "holds something that is not a run"),
    (TRAIN, "--resume --out nope", "--out nope: holds no run that --resume could go on with"),
    (TRAIN, "--resume --out RUN --seed 9", "--seed 9: the run in RUN was started with 0"),
    (EVALUATE, "", "the following arguments are required: --model (see --help)"),
    (EVALUATE, "--model nope", "--model nope: no such folder"),
    (EVALUATE, "--model assets/tiny-qwen3 --data nope.jsonl", "--data nope.jsonl: no such file"),
    (EVALUATE, "--model assets/tiny-qwen3 --samples 0", "--samples 0: must be at least 1"),
    (INTERNALS, "--model nope", "--model nope: no such folder"),
    (INTERNALS, "--model assets/tiny-qwen3 --compare nope", "--compare nope: no such folder"),
    (INTERNALS, "--model assets/tiny-qwen3 --answers nope", "--answers nope: no such file"),
    (INTERNALS, "--model assets/tiny-qwen3 --data nope", "--data nope: no such file"),
    (INTERNALS, "--model assets/tiny-qwen3 --sample 3", "unrecognized arguments: --sample 3"),
]


@pytest.mark.parametrize("program, given, message", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(answer, tmp_path, program, given, message):
    held = tmp_path / "held.jsonl"
    held.write_text('{"question": "1 + 1?", "answer": "2"}\n', encoding="utf-8")
    (tmp_path / "config.json").write_text(
        json.dumps({"prompts_per_step": 32, "seed": 0}), encoding="utf-8"
    )
    paths = {"HELD": str(held), "RUN": str(tmp_path), "NEW": str(tmp_path / "new")}
    arguments = [paths.get(word, word) for word in given.split()]
    code, text = answer(program, *arguments)
    for short, path in paths.items():
        message = message.replace(short, path)
    assert code == 2 and text.startswith(f"{program}: ") and text.count("\n") == 1
    assert message in text


def test_a_correct_command_line_goes_on_to_torch(answer):
    for program, given in ((TRAIN, []), (EVALUATE, ["--model", "assets/tiny-qwen3"])):
        code, text = answer(program, *given, "--out", "/nonexistent/there")
        assert (code, text.strip()) == (1, "torch was imported"), program
