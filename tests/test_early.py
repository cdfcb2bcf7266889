"""What is answered before torch is imported: help, versions and mistakes in the command line."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

# standard input: [[program, arguments]]; output: [[exit code, text]], as of `python PROGRAM ...`
ONE_AFTER_THE_OTHER = """
import contextlib, io, json, runpy, sys
said = []
for program, arguments in json.load(sys.stdin):
    sys.argv = [program, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.redirect_stderr(text):
        try:
            runpy.run_path(program, run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code
    said.append([code, text.getvalue()])
json.dump(said, sys.stdout)
"""


@pytest.fixture
def python(tmp_path):
    """python(*arguments, given=None): a process where importing torch is an error."""
    for name in ("torch", "transformers"):
        text = f"raise SystemExit('{name} was imported')\n"
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")

    def run(*arguments, given=None):
        path = os.pathsep.join((str(tmp_path), str(ROOT)))
        env = os.environ | {"PYTHONPATH": path, "COLUMNS": "100"}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, input=given
        )

    return run


@pytest.fixture
def answers(python):
    """answers(cases): (exit code, output) of each (program, arguments)."""
    return lambda cases: json.loads(
        python("-c", ONE_AFTER_THE_OTHER, given=json.dumps(cases)).stdout
    )


@pytest.mark.programs
def test_help_versions_and_a_correct_command_line(answers):
    programs = ("train.py", "evaluate.py", "internals.py")
    for code, text in answers([(program, ["--help"]) for program in programs]):
        assert code == 0 and "--version" in text and "--threads" in text
    for code, text in answers([(program, ["--version"]) for program in programs]):
        assert code == 0 and text.count(".") >= 8  # four versions of three parts each
        assert text.startswith("HAPO and BuPO 0.") and "torch 2." in text
        assert "transformers 5." in text
    # a correct one goes on to torch
    there = ["--out", "/nonexistent/there"]
    correct = [("train.py", there), ("evaluate.py", ["--model", "assets/tiny-qwen3", *there])]
    assert answers(correct) == [["torch was imported", ""]] * 2


MISTAKES = """
train.py --stepps 3 | unrecognized arguments: --stepps 3 (see --help)
train.py --steps three | argument --steps: invalid int value: 'three' (see --help)
train.py --algo ppo | argument --algo: invalid choice: 'ppo'
train.py --data nope.jsonl --out NEW | --data nope.jsonl: no such file
train.py --data HELD --eval-data nope.csv --out NEW | --eval-data nope.csv: no such file
train.py --model nope --out NEW | --model nope: no such folder; give a Hugging Face model folder
train.py --reward-function no.py:f --out NEW | --reward-function no.py:f: no such file
train.py --out RUN | already holds a run; --resume continues it, --overwrite deletes it
train.py --out assets/tiny-qwen3 | holds something that is not a run
train.py --resume --out nope | --out nope: holds no run that --resume could go on with
train.py --resume --out RUN --seed 9 | --seed 9: the run in RUN was started with 0
evaluate.py | the following arguments are required: --model (see --help)
evaluate.py --model nope | --model nope: no such folder
evaluate.py --model assets/tiny-qwen3 --data nope.jsonl | --data nope.jsonl: no such file
evaluate.py --model assets/tiny-qwen3 --samples 0 | --samples 0: must be at least 1
internals.py --model nope | --model nope: no such folder
internals.py --model assets/tiny-qwen3 --compare nope | --compare nope: no such folder
internals.py --model assets/tiny-qwen3 --answers nope | --answers nope: no such file
internals.py --model assets/tiny-qwen3 --data nope | --data nope: no such file
internals.py --model assets/tiny-qwen3 --sample 3 | unrecognized arguments: --sample 3
"""


@pytest.mark.programs
def test_a_mistake_is_one_line_and_exit_code_2(answers, python, tmp_path):
    held, run = tmp_path / "held.jsonl", {"prompts_per_step": 32, "seed": 0}
    held.write_text('{"question": "1 + 1?", "answer": "2"}\n', encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(run), encoding="utf-8")
    table = MISTAKES
    for short, path in (("HELD", held), ("RUN", tmp_path), ("NEW", tmp_path / "new")):
        table = table.replace(short, str(path))
    cases = [line.split(" | ") for line in table.strip().splitlines()]
    given = [command.split() for command, _ in cases]
    found = answers([(program, arguments) for program, *arguments in given])
    for (program, *_), (command, message), (code, text) in zip(given, cases, found):
        assert code == 2 and text.startswith(f"{program}: ") and text.count("\n") == 1, command
        assert message in text
    alone = python("train.py", "--stepps", "3")
    assert [alone.returncode, alone.stdout + alone.stderr] == found[0]
