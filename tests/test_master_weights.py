"""float32 masters beside bfloat16 weights: their bits, AdamW's steps on them, and a whole run."""

import json
import shutil
import sys

import pytest
import torch
from conftest import random_model, verdicts
from safetensors.torch import load_file

import train
from common.models import load_model
from engine.engine import SingleProcess
from engine.master_weights import CHUNK, MasterAdamW, Masters, join, split
from evaluate import Response
from problems.grading import Grade
from run import report
from run.option_checks import parse
from run.setup import open_run


def test_split_by_hand():
    # 1 + 2^-9 lies between the bfloat16 1 and 1 + 2^-7: nearer to 1, 2^14 above its bits;
    # 1 + 2^-7 - 2^-9 is 2^14 below 1 + 2^-7; half way goes up
    values = torch.tensor([1 + 2**-9, 1 + 2**-7 - 2**-9, 1 + 2**-8, -1 - 2**-9, 0.0])
    high, low = split(values)
    assert high.tolist() == [1.0, 1 + 2**-7, 1 + 2**-7, -1.0, 0.0]
    assert low.tolist() == [2**14, -(2**14), -(2**15), 2**14, 0]


def test_split_loses_no_bit():
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0))
    values = bits.to(torch.int32).view(torch.float32)
    values = values[values.isfinite() & (values.abs() < 3e38)]
    high, low = split(values)
    assert torch.equal(join(high, low).view(torch.int32), values.view(torch.int32))
    error = (high.float() - values).abs()
    assert (error <= (values.to(torch.bfloat16).float() - values).abs()).all()


@pytest.mark.parametrize("in_main_memory", [False, True], ids=["split", "offload"])
def test_the_steps_are_adamw_s_to_the_last_bit(in_main_memory, monkeypatch):
    """Three steps with the same float32 gradients; a weight without one stays, decay included."""
    monkeypatch.setattr("engine.master_weights.CHUNK", 512)  # several chunks in a weight
    assert CHUNK % 64 == 0  # so that chunks are cut where vector instructions are, too
    model, twin = random_model(hidden=64), random_model(hidden=64)
    masters = Masters(model, in_main_memory)
    names = [name for name, _ in model.named_parameters()]
    ours = MasterAdamW([{"params": list(model.parameters())}], masters, 1e-3, 0.1)
    theirs = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    for step in range(3):
        for i, (p, q) in enumerate(zip(model.parameters(), twin.parameters())):
            if i != 4:
                q.grad = torch.randn(q.shape) * 10.0 ** (step - 1)
                masters.gradients[p] = q.grad.clone()
        assert masters.clip(0.5) == torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        ours.step(), theirs.step()
        ours.zero_grad(), theirs.zero_grad()
    for name, p, q in zip(names, model.parameters(), twin.parameters()):
        assert torch.equal(masters.full_tensor(p), q.detach()), name
        assert p.dtype == torch.bfloat16
        assert (p.float() - q).abs().max() <= q.abs().max() * 2**-8
    untouched = dict(random_model(hidden=64).named_parameters())[names[4]]
    assert torch.equal(masters.full_tensor(list(model.parameters())[4]), untouched)


def test_gradients_are_summed_in_float32():
    """1 and then 2^-10 eight times: in bfloat16 the sum would stay 1."""
    layer = torch.nn.Linear(1, 1, bias=False)
    masters = Masters(layer, False)
    for size in [1.0] + [2**-10] * 8:
        layer(torch.tensor([[size]], dtype=torch.bfloat16)).sum().backward()
    assert masters.gradients[layer.weight].item() == 1 + 2**-7
    assert layer.weight.grad is None


@pytest.fixture
def coins(monkeypatch):
    """Every second answer is right; nothing is evaluated or drawn, most of a short run's time."""
    verdict = lambda right: Grade(right, right)
    mixed = [[Response("", verdict(right), 7, True) for right in (True, False)]] * 2
    verdicts(monkeypatch, True, False)
    monkeypatch.setitem(sys.modules, "scripts.curves", None)  # as without matplotlib
    monkeypatch.setattr(report, "evaluate_over", lambda *args: mixed)


SIZES = (
    "--prompts-per-step 2 --num-generations 4 --updates-per-rollout 2 --max-new-tokens 5 "
    "--difficulty 2 --warmup-steps 1 --device cpu --lr 1e-3 --micro-batch 2 --no-self-check "
    "--save-total-limit 9"
).split()


def rows_of(folder):
    """The lines of metrics.jsonl but the first."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()[1:]]


@pytest.mark.parametrize("where", ["--split-master", "--offload"])
def test_a_run_and_its_resume_and_its_reference(where, tmp_path, tiny_folder, coins):
    """Two steps are one and, after a resume, one more, bit for bit; the saved weights are float32;
    before the first update the ratios are exactly 1; the reference is the float32 model rounded
    once, as the policy was, rotary tables in float32, and a resume knows that model again."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = [where, "--kl", "0.1", "--algo", "grpo", "--model", str(tiny_folder), "--steps", "2"]
    train.main([*SIZES, *more, "--out", str(whole)])
    later = shutil.ignore_patterns("final", "checkpoint-2")
    shutil.copytree(whole, parts, ignore=later)
    resumed = ["--resume", "--out", str(parts), "--steps", "2"]
    run, step = open_run(parse(resumed, ""), SingleProcess("cpu"))
    run.lock.lock.release()
    assert step == 1
    initial, _ = load_model(tiny_folder)
    for p, q in zip(run.reference.parameters(), initial.parameters()):
        assert torch.equal(p, q.to(torch.bfloat16))
    assert {b.dtype for b in run.reference.buffers()} == {torch.float32}
    train.main(resumed)
    a, b = (load_file(f / "final" / "model.safetensors") for f in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert {x.dtype for x in a.values()} == {torch.float32}
    assert any((x != x.to(torch.bfloat16).float()).any() for x in a.values())
    for row in rows_of(whole):
        assert row["updates"] == 2 and row["ratio_off_before_update"] == 0
        assert row["weights_changed"] > 0.9


def test_float16_scales_its_loss(tmp_path, tiny_folder, coins):
    """Its first scale, 65536, is right or it is lowered without a fault; weights move."""
    out = tmp_path / "run"
    more = ["--dtype", "float16", "--steps", "2", "--model", str(tiny_folder), "--out", str(out)]
    train.main([*SIZES, *more])
    for row in rows_of(out):
        assert row["skipped_updates"] == 0 and row["weights_changed"] > 0.5
        assert row["updates"] + row.get("rescaled_updates", 0) == 2
    text = (out / "checkpoint-2" / "run.json").read_text(encoding="utf-8")
    state = json.loads(text)["scaler"]
    assert state["scale"] <= 65536 and state["_growth_tracker"] >= 0


def test_an_overflow_is_no_fault(opened, coins):
    """A loss scale of 2^40 overflows: no weight moves, the scale falls, the step is not bad."""
    run = opened("--dtype", "float16")
    run.engine.scaler._init_scale = 2.0**40
    before = [p.detach().clone() for p in run.policy.parameters()]
    metrics, bad = train.guarded_step(1, run)
    assert bad is None and metrics["rescaled_updates"] == 1 and metrics["skipped_updates"] == 0
    assert run.engine.scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, q) for p, q in zip(run.policy.parameters(), before))
