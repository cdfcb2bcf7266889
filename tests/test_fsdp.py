"""Programs in processes of their own: two (gloo, CPU) against one, with a run that moves between
them; and one that is refused."""

import json
import os
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY
from safetensors.torch import load_file

import train
from common.errors import UserError
from engine.fsdp import check_processes

# HAPO with BuPO, unequal micro-batches, layers checkpointed, and dynamic sampling, whose live
# groups two processes deal out as one does. Behind the resume lie an aligned and a full step.
OPTIONS = (
    "--prompts-per-step 4 --num-generations 4 --updates-per-rollout 2 --max-new-tokens 8 "
    "--eval-prompts 2 --warmup-steps 1 --device cpu --bupo-layer 2 --bupo-steps 2 "
    "--micro-tokens 70 --gradient-checkpointing --save-total-limit 9 --dynamic-sampling "
    "--max-rounds 2"
).split()
COMPARED = (
    "loss reward entropy grad_norm response_length clip_low clip_high ratio_max zero_std_groups "
    "internal_entropy logp unfilled_groups all_wrong"
).split()


@pytest.fixture(autouse=True)
def fewer_questions():
    """All of them: the other processes draw all."""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def options(folder, out, *more):
    return [*OPTIONS, *map(str, ["--model", TINY, "--out", folder / out, *more])]


def one_process(*args):
    with pytest.MonkeyPatch.context() as patch:
        # an ImportError, as on a machine without matplotlib
        patch.setitem(sys.modules, "scripts.curves", None)
        train.main(options(*args))


def two_processes(*args):
    """Start train.py in two processes, as torchrun does."""
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    command = [sys.executable, "train.py", *options(*args)]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    return [subprocess.Popen(command, cwd=ROOT, env=env | rank, **output) for rank in ranks]


@pytest.fixture(scope="session")
def handed_over(tmp_path_factory):
    """One process runs four steps; two go on from its first, in the background, to the third."""
    folder = tmp_path_factory.mktemp("shard")
    one_process(folder, "one", "--steps", 4)
    later = shutil.ignore_patterns("final", "checkpoint-[234]")
    shutil.copytree(folder / "one", folder / "two", ignore=later)
    workers = two_processes(folder, "two", "--resume", "--steps", 3)
    yield folder, workers
    for worker in workers:
        worker.kill()


@pytest.fixture(scope="session")
def refused(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("refused"))
    command = [sys.executable, "train.py", "--num-generations", "1", "--out", out]
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, **output)
    yield process
    process.kill()


def result(out):
    rows = [json.loads(line) for line in open(out / "metrics.jsonl", encoding="utf-8")]
    return load_file(out / "final" / "model.safetensors"), rows


def moved_up_to_layer_2(checkpoint):
    """Everything up to layer 2 has been trained, and what lies above is the same bit for bit."""
    start = load_file(TINY / "model.safetensors")
    aligned = load_file(checkpoint / "model.safetensors")
    for name in start:
        block = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        upper = name == "model.norm.weight" or (block is not None and block >= 2)
        assert start[name].equal(aligned[name]) == upper, name


def test_one_process_hands_over_to_two(handed_over, refused):
    """Runs first of all (conftest.py), so that the other processes work beside the other tests."""
    folder, _ = handed_over
    moved_up_to_layer_2(folder / "one" / "checkpoint-2")


def test_two_processes_are_one(handed_over):
    """Two processes pick up what one has begun, and one picks up what two have left: as if one had
    done it all."""
    folder, workers = handed_over
    outputs = [w.communicate(timeout=80)[0] for w in workers]
    assert all(w.returncode == 0 for w in workers), outputs
    one_process(folder, "two", "--resume", "--steps", 4)
    (one, rows_one), (two, rows_two) = result(folder / "one"), result(folder / "two")
    assert one.keys() == two.keys() and "lm_head.weight" not in two  # tied stays tied
    for name in one:
        off = (one[name] - two[name]).abs()
        # lines are packed otherwise there; where a gradient is nothing but rounding, AdamW makes a
        # step of it
        assert off.max() < 1e-4 and (off > 1e-5).float().mean() < 1e-4, name
    assert [r["step"] for r in rows_two] == [0, 1, 2, 3, 4]
    assert all(row["ratio_off_before_update"] == 0 for row in rows_one[1:] + rows_two[1:])
    for a, b in zip(rows_one[1:], rows_two[1:]):
        for key in COMPARED:
            if key in a:
                assert a[key] == pytest.approx(b[key], abs=1e-5, rel=1e-4), (a["step"], key)
    moved_up_to_layer_2(folder / "two" / "checkpoint-2")


def test_the_program_exits_with_two_and_no_traceback(refused):
    _, errors = refused.communicate(timeout=80)
    assert refused.returncode == 2 and errors.count("\n") == 1
    assert errors.startswith("train.py: --num-generations 1")


def test_more_processes_than_prompts_is_one_line():
    o = SimpleNamespace(offload=False, prompts_per_step=2, updates_per_rollout=1)
    world = SimpleNamespace(size=4, sharded=True, device=SimpleNamespace(type="cpu"))
    message = (
        "--prompts-per-step 2: must be a multiple of processes x updates per rollout = 4 x 1 "
        ".more ranks than prompts."
    )
    with pytest.raises(UserError, match=message):
        check_processes(o, world)


def test_every_process_starts_on_its_own_card(monkeypatch):
    """Before any tensor is made: what is made without a number lies on the first card."""
    import torch

    from engine import fsdp
    from engine.engine import SingleProcess

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
