"""Two processes (gloo, CPU) against one, with a run that moves between them."""

import json
import os
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, program
from safetensors.torch import load_file

import train
from common.errors import UserError
from engine import fsdp
from engine.engine import SingleProcess

# HAPO with BuPO, unequal micro-batches, layers checkpointed, and dynamic sampling, whose live
# groups two processes deal out as one does. Behind the resume lie an aligned and a full step.
OPTIONS = (
    "--prompts-per-step 4 --num-generations 3 --updates-per-rollout 2 --max-new-tokens 8 "
    "--eval-prompts 2 --warmup-steps 1 --device cpu --bupo-layer 2 --bupo-steps 2 "
    "--micro-tokens 140 --gradient-checkpointing --save-total-limit 9 --dynamic-sampling "
    "--max-rounds 2 --reward random"
).split()
COMPARED = (
    "loss reward entropy grad_norm response_length clip_low clip_high ratio_max zero_std_groups "
    "internal_entropy logp unfilled_groups all_wrong"
).split()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def train_in(tmp_path_factory, tiny_folder):
    """(folder, run in this process, start in two): the last two call train.py with RUN, OPTIONS."""
    folder = tmp_path_factory.mktemp("shard")
    rows = [{"question": f"What is {n} plus 1?", "answer": str(n + 1)} for n in range(40)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")
    inputs = ["--model", str(tiny_folder), "--data", str(folder / "questions.jsonl")]
    options = lambda name, more: [*OPTIONS, *inputs, "--out", str(folder / name), *more.split()]

    def one_process(name, more):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "scripts.curves", None)  # as without matplotlib
            train.main(options(name, more))

    def two_processes(name, more):
        env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        command = [sys.executable, "train.py", *options(name, more)]
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
        return [subprocess.Popen(command, cwd=ROOT, env=env | rank, **output) for rank in ranks]

    return folder, one_process, two_processes


@pytest.fixture(scope="session")
def handed_over(train_in):
    """One process runs four steps; two go on from its first, in the background, to the third."""
    folder, one_process, two_processes = train_in
    one_process("one", "--steps 4")
    later = shutil.ignore_patterns("final", "checkpoint-[234]")
    shutil.copytree(folder / "one", folder / "two", ignore=later)
    workers = two_processes("two", "--resume --steps 3")
    yield workers
    for worker in workers:
        worker.kill()


def result(out):
    rows = [json.loads(line) for line in open(out / "metrics.jsonl", encoding="utf-8")]
    return load_file(out / "final" / "model.safetensors"), rows


def moved_up_to_layer_2(model, checkpoint):
    """Everything up to layer 2 has been trained, and what lies above is the same bit for bit."""
    start, aligned = (load_file(f / "model.safetensors") for f in (model, checkpoint))
    for name in start:
        upper = name == "model.norm.weight" or name.startswith("model.layers.2")
        assert start[name].equal(aligned[name]) == upper, name


@pytest.mark.programs
def test_one_process_hands_over_to_two(train_in, handed_over, tiny_folder):
    """Runs first of all (conftest.py), so that the other processes work beside the other tests."""
    moved_up_to_layer_2(tiny_folder, train_in[0] / "one" / "checkpoint-2")


@pytest.mark.programs
def test_two_processes_are_one(train_in, handed_over, tiny_folder):
    """Two processes pick up what one has begun, and one picks up what two have left: as if one had
    done it all."""
    folder, one_process, _ = train_in
    outputs = [w.communicate(timeout=80)[0] for w in handed_over]
    assert all(w.returncode == 0 for w in handed_over), outputs
    one_process("two", "--resume --steps 4")
    (one, rows_one), (two, rows_two) = result(folder / "one"), result(folder / "two")
    assert one.keys() == two.keys() and "lm_head.weight" not in two  # tied stays tied
    # lines are packed otherwise there; where a gradient is nothing but rounding, AdamW makes a step
    # of it: of 182,000 weights very few
    off = torch.cat([(one[name] - two[name]).abs().view(-1) for name in one])
    assert off.max() < 3e-4 and (off > 1e-5).sum() < 8
    assert [r["step"] for r in rows_two] == [0, 1, 2, 3, 4]
    assert all(row["ratio_off_before_update"] == 0 for row in rows_one[1:] + rows_two[1:])
    for a, b in zip(rows_one[1:], rows_two[1:]):
        for key in COMPARED:
            if key in a:
                assert a[key] == pytest.approx(b[key], abs=1e-5, rel=1e-4), (a["step"], key)
    moved_up_to_layer_2(tiny_folder, folder / "two" / "checkpoint-2")


def test_the_program_exits_with_two_and_no_traceback(monkeypatch, capsys, tmp_path):
    bad = ["--num-generations", "1", "--out", tmp_path]
    assert program(monkeypatch, train.main, "train.py", *bad) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and errors.startswith("train.py: --num-generations 1")


def test_more_processes_than_prompts_is_one_line():
    o = SimpleNamespace(offload=False, prompts_per_step=2, updates_per_rollout=1)
    world = SimpleNamespace(size=4, sharded=True, device=SimpleNamespace(type="cpu"))
    message = "--prompts-per-step 2: must be a multiple of .* = 4 x 1 .more ranks than prompts."
    with pytest.raises(UserError, match=message):
        fsdp.check_processes(o, world)


def test_every_process_starts_on_its_own_card(monkeypatch):
    """Before any tensor is made: what is made without a number lies on the first card."""
    order = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: order.append(str(device)))

    def begin(self, device):
        order.append(f"begin {device}")
        raise KeyboardInterrupt

    monkeypatch.setattr(SingleProcess, "__init__", begin)
    with pytest.raises(KeyboardInterrupt):
        fsdp.DistributedProcesses("cuda")
    assert order == ["cuda:1", "begin cuda:1"]
