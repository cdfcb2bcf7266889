"""The loop: what must not change the result, what must continue exactly, and one line for every
mistake."""

import dataclasses
import hashlib
import json
import math
import pathlib
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import TINY, changed_scores, write_questions
from safetensors.torch import load_file, save_file

import hapo
import losses
import train
from common import renamed
from common.command import run_main
from common.errors import UserError
from engine import packing
from engine.engine import Engine, SingleProcess
from engine.float16 import Fp16Engine
from evaluate import Response
from problems.grading import Grade
from problems.latex import LATEX
from run import checkpoint, option_checks, options, report
from run.setup import open_run
from tasks import Problem

FAST = (
    "--prompts-per-step 4 --num-generations 4 --updates-per-rollout 2 --max-new-tokens 8 "
    "--eval-prompts 4 --lr 1e-3 --warmup-steps 1 --device cpu"
).split()
SMALL = []  # --model and --data of a random model and a file, made once
TIMES = ("seconds_generate", "seconds_score", "seconds_update", "tokens_per_second")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    # an ImportError, as on a machine without matplotlib
    monkeypatch.setitem(sys.modules, "scripts.curves", None)


@pytest.fixture
def real_verdicts():
    """A test that asks for this grades answers and evaluates held-out questions."""


@pytest.fixture(autouse=True)
def verdicts(monkeypatch, request):
    if "real_verdicts" not in request.fixturenames:
        invent_verdicts(monkeypatch)


def invent_verdicts(monkeypatch):
    """Verdicts that depend on question and answer only, since random weights are never right; and
    no evaluation, most of a short run's time."""

    def grade(problem, text, *more):
        right = sum((problem.question + text).encode()) % 2 == 0
        return Grade(right, right)

    mixed = [[Response("", Grade(right, right), 7, True) for right in (True, False)]] * 2
    monkeypatch.setattr("train.grade", grade)
    monkeypatch.setattr(report, "evaluate_over", lambda *args: mixed)


@pytest.fixture(scope="session", autouse=True)
def small(tmp_path_factory, tiny_folder):
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    write_questions(path)
    SMALL[:] = ["--model", str(tiny_folder), "--data", str(path)]


def run(out, *more, steps=2):
    train.main([*FAST, *SMALL, "--out", str(out), "--steps", str(steps), *map(str, more)])
    return weights(out), metrics(out)


def weights(out):
    return load_file(pathlib.Path(out) / "final" / "model.safetensors")


def metrics(out):
    rows = [
        json.loads(line) for line in open(pathlib.Path(out) / "metrics.jsonl", encoding="utf-8")
    ]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------ a run's files


def test_a_run_and_its_files(real_verdicts, tmp_path, capsys):
    run(tmp_path / "run", "--data", "")
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl", encoding="utf-8")]
    assert [r["step"] for r in rows] == [0, 1, 2]
    assert {"eval_accuracy", "eval_greedy", "pass_rate", "expected_live_groups"} <= rows[0].keys()
    card = (tmp_path / "run" / "final" / "README.md").read_text(encoding="utf-8")
    assert f"| 2 | {rows[2]['eval_accuracy']:.3f} | {rows[2]['eval_greedy']:.3f} |" in card
    promised = (
        "step phase loss reward entropy grad_norm response_length clipped_ratio clip_low clip_high "
        "ratio_max zero_std_groups all_correct all_wrong"
    ).split()
    assert {*promised, *TIMES} <= rows[1].keys() and "eval_accuracy" in rows[2]
    samples = [
        json.loads(line) for line in open(tmp_path / "run" / "samples.jsonl", encoding="utf-8")
    ]
    for s in samples:
        assert len(s["tokens"]) == len(s["entropy"]) == len(s["temperature"])
        assert s["question"] and s["reward"] in (0, 1)
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert config["clip_high"] == 0.28 and config["max_new_tokens"] == 8
    for folder in ("final", "checkpoint-2"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / folder)
        transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / folder)
    printed = capsys.readouterr().out
    assert "expect a loss near 0" in printed and "step 2/2" in printed
    assert "warning: the model is almost never correct" in printed


def test_the_same_seed_gives_the_same_metrics(real_verdicts, tmp_path):
    shipped = ["--model", TINY, "--data", "", "--prompts-per-step", "8"]
    a, b = run(tmp_path / "a", *shipped), run(tmp_path / "b", *shipped)
    c = run(tmp_path / "c", *shipped, "--seed", 1, steps=1)
    assert same(a[0], b[0]) and a[1] == b[1]
    assert not same(load_file(tmp_path / "a" / "checkpoint-1" / "model.safetensors"), c[0])


# --------------------------------------------------------------------------------------- reductions


PARTS = "adaptive-temperature token-group-average advantage-redistribution adaptive-clip".split()


def test_hapo_with_all_four_off_is_dapo_to_the_last_bit(tmp_path):
    dapo = run(tmp_path / "dapo", "--algo", "dapo")
    hapo = run(tmp_path / "hapo", "--algo", "hapo", *[f"--no-{part}" for part in PARTS])
    on = run(tmp_path / "on", "--algo", "hapo")
    assert same(dapo[0], hapo[0])
    for a, b in zip(dapo[1], hapo[1]):
        assert all(a[key] == b[key] for key in a.keys() & b.keys())
    assert not same(dapo[0], on[0])


def test_each_part_alone_changes_the_result(tmp_path):
    # the second update of a step sees ratios other than 1; a narrow clip range makes sure that some
    # are at its edges
    args = (
        "--lr 0.0005 --prompts-per-step 8 --updates-per-rollout 4 --clip-low 0.1 --clip-high 0.1"
    ).split()
    dapo = run(tmp_path / "dapo", "--algo", "dapo", *args, steps=2)
    for part in PARTS:
        others_off = [f"--no-{other}" for other in PARTS if other != part]
        heat = ["--tau", "0.5"] if part == "adaptive-temperature" else []
        alone = run(tmp_path / part, *args, *others_off, *heat, steps=2)
        assert not same(dapo[0], alone[0]), part


@pytest.fixture
def gradients(monkeypatch):
    """Record the gradient of every update instead of applying it."""
    seen = []

    def step(self, closure=None):
        seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return seen


@pytest.mark.parametrize("algo", ["hapo", "grpo"])
def test_micro_batches_change_no_gradient(tmp_path, gradients, algo, monkeypatch):
    """Nor do answers that share lines: they do in whole passes (the shipped model's are of unequal
    length), and in the last run nowhere."""
    passes = ("--micro-batch 1", "--micro-batch 2", "--micro-tokens 60 --gradient-checkpointing")
    settings, always = ("", *passes, ""), ["--model", TINY, "--algo", algo, "--grad-clip", "1e6"]
    for i, extra in enumerate(settings):
        if i == len(settings) - 1:
            monkeypatch.setattr(packing, "choose_packing", lambda *sizes: None)
        run(tmp_path / str(i), *always, *extra.split(), steps=1)
    assert len(gradients) == 2 * len(settings)
    for i in range(1, len(settings)):
        for update in (0, 1):
            for a, b in zip(gradients[update], gradients[2 * i + update]):
                torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


def test_nothing_is_outside_the_clip_range_before_the_first_update(tmp_path):
    _, rows = run(tmp_path / "run", steps=3)
    assert all(row["outside_before_update"] == 0 for row in rows[1:])


# ----------------------------------------------------------------------- one update, worked by hand


@pytest.fixture
def one_update(tmp_path, monkeypatch):
    """one_update(advantage, shift, *options, h=0.0, ref=None): loss of one token-mean update whose
    ratios are all exp(shift) and h all the same."""

    def loss(advantage, shift, *args, h=0.0, ref=None):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        o = option_checks.parse([*FAST, *SMALL, "--out", str(out), "--lr", "0", *args], "")
        run, _ = open_run(o, SingleProcess("cpu"))

        def shifted(scores, model):
            by = ref if model is run.reference else -shift
            return scores._replace(logp=scores.logp + by)

        def advantages(rewards, mask, *more):
            return advantage * torch.ones(mask.shape)

        with monkeypatch.context() as patch:
            changed_scores(patch, run, shifted)
            patch.setattr(hapo, "token_group_advantages", advantages)
            patch.setattr(hapo, "modulation", lambda H, *more: h * torch.ones_like(H))
            update = train.train_step(1, run).updates[0]
        return update.loss

    return loss


def test_an_update_by_hand(one_update):
    e = math.exp
    # a ratio of e^3 with A < 0: PPO's minimum does not clip it
    assert one_update(-1.0, 3.0) == pytest.approx(e(3), rel=1e-4)
    assert one_update(-1.0, 3.0, "--dual-clip", "10") == pytest.approx(10, rel=1e-4)
    # k3 at d = 1
    loss = one_update(0.0, 0.0, "--kl", "0.1", ref=1.0)
    assert loss == pytest.approx(0.1 * (e(1) - 2), rel=1e-3)
    assert one_update(1.0, 1.0, "--no-adaptive-clip") == pytest.approx(-1.28, rel=1e-4)
    loss = one_update(1.0, 1.0, "--no-advantage-redistribution", h=0.5)
    assert loss == pytest.approx(-(1 + 0.28 * 1.5), rel=1e-4)
    # h = -1/2, ratio 0.86: outside the zone [0.9, 1.14] of the base bounds, so A stays;
    # the release's zone is adapted, [0.85, ...]
    assert one_update(1.0, math.log(0.86), h=-0.5) == pytest.approx(-0.86, rel=1e-4)
    loss = one_update(1.0, math.log(0.86), "--released", h=-0.5)
    assert loss == pytest.approx(-0.86 * 0.5, rel=1e-4)


def test_warm_up_is_linear(tmp_path):
    _, rows = run(tmp_path / "run", "--warmup-steps", 2, steps=3)
    assert [r["lr"] for r in rows[1:]] == pytest.approx([5e-4, 1e-3, 1e-3])


def test_the_overlong_penalty_is_part_of_the_reward_and_not_of_the_accuracy(tmp_path, monkeypatch):
    kept, original = [], train.generate_and_grade
    keep = lambda *args: kept.append(original(*args)) or kept[-1]
    monkeypatch.setattr(train, "generate_and_grade", keep)
    _, rows = run(tmp_path / "run", "--overlong-buffer", "4", steps=1)
    batch = kept[0]
    penalty = [max(-1.0, min(0.0, (4 - n) / 4)) for n in batch.rollout.lengths.tolist()]
    right = batch.rewards - torch.tensor(penalty)
    assert set(right.tolist()) <= {0.0, 1.0} and (batch.rewards < 0).any()
    assert rows[1]["correct"] == pytest.approx(right.mean().item())
    assert rows[1]["reward"] == pytest.approx(batch.rewards.mean().item())
    assert rows[1]["reward"] < rows[1]["correct"]


def test_a_question_that_is_asked_twice_counts_once(monkeypatch):
    monkeypatch.undo()
    answers = [[Response("", Grade(g, g), 3, True)] for g in (True, True, False, False)]
    monkeypatch.setattr(report, "sample_responses", lambda *args, **kwargs: answers)
    fake = SimpleNamespace(
        options=SimpleNamespace(max_new_tokens=4, responses_per_step=8),
        dist=SingleProcess("cpu"),
        engine=SimpleNamespace(generate=None),
        generate=None,
        tokenizer=None,
        eos_ids=[],
    )
    before = (("system", "Be short."),)  # the same words behind other ones are another question
    a, b = Problem("a", "1"), Problem("a", "1", history=before)
    result = report.summarise(report.evaluate_over(fake, [a, b, b, a], 1.0, 0, ""))
    # a: right, wrong; b: right, wrong. Both means are 1/2, so their standard error is 0 (as four
    # answers it would be 0.29)
    assert result.lenient == 0.5 and result.lenient_error == 0


def test_algorithms_and_options_run(tmp_path):
    settings = ["--temperature-form zscore", "--dynamic-sampling", "--kl 0.1", "--loss-mean fixed"]
    arms = ("forking", "archer", "entropy-advantage", "edge")
    settings += [f"--baseline {arm} --algo dapo" for arm in arms]
    for i, extra in enumerate(settings):
        final, rows = run(tmp_path / str(i), *extra.split(), steps=1)
        assert rows[1]["updates"] + rows[1]["no_signal_updates"] == 2 and rows[1]["grad_norm"] >= 0
        assert all(v.isfinite().all() for v in final.values())


def test_dynamic_sampling_ends_when_every_group_is_dead(
    real_verdicts, tiny_folder, tmp_path, capsys
):
    before = load_file(tiny_folder / "model.safetensors")
    questions = [{"question": f"{i} + {i}?", "answer": "987654"} for i in range(20)]
    never = tmp_path / "never.jsonl"
    never.write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    sampling = "--dynamic-sampling --max-rounds 2".split()
    final, rows = run(tmp_path / "run", *sampling, "--data", never)
    assert "4 of 4 groups still have no reward variance" in capsys.readouterr().out
    assert rows[1]["unfilled_groups"] == 4 and rows[1]["groups"] == 8
    assert rows[1]["no_signal_updates"] == 2 and rows[1]["updates"] == 0
    # no live group: nothing moves, not even by weight decay
    assert same({k: before[k] for k in final}, final)


# --------------------------------------------------------------------------------------------- BuPO


def test_bupo_phases_in_training(tiny_folder, tmp_path):
    settings = "--bupo-layer 2 --bupo-steps 2 --diagnose-every 1".split()
    _, rows = run(tmp_path / "run", *settings, steps=3)
    assert [r.get("phase") for r in rows[1:]] == ["internal", "internal", "full"]
    assert rows[1]["layer"] == 2
    assert {"internal_entropy", "internal_logp", "entropy", "sampler_logp"} <= rows[1].keys()
    assert {"entropy", "logp"} <= rows[3].keys()
    assert not {"internal_entropy", "sampler_logp", "sampler_entropy"} & rows[3].keys()
    assert rows[1]["outside_before_update"] == 0
    assert len(rows[1]["diagnose_kl"]) == len(rows[1]["diagnose_cosine"]) > 0
    start = load_file(tiny_folder / "model.safetensors")
    one = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    for name in one:
        block = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        upper = name == "model.norm.weight" or (block is not None and block >= 2)
        assert torch.equal(one[name], start[name]) == upper, name
    three = load_file(tmp_path / "run" / "checkpoint-3" / "model.safetensors")
    assert not any(torch.equal(one[name], three[name]) for name in one)


def test_an_entropy_is_named_by_its_temperature(tmp_path, opened, capsys):
    """At T_base 0.5 the entropies that h is computed from are those of logits / 0.5, in phase 1 as
    in phase 2, and not the sampler's, which are of raw logits."""
    run = opened(*"--bupo-layer 2 --bupo-steps 1 --temperature 0.5 --lr 0".split())
    metrics, _ = train.guarded_step(1, run)
    report.record(1, metrics, None, run)
    assert "  entropy " in capsys.readouterr().out
    batch, every = run.last_batch, [slice(0, 8)]
    tokens = batch.rollout.mask.sum()
    assert (batch.old.policy, batch.old.temperature) == ("layer 2", 0.5)
    assert (batch.full.policy, batch.full.entropy_temperature) == ("full policy", 0.5)
    scored = run.engine.batch_logprobs(run.policy, batch.rollout, every, None).entropy
    assert torch.equal(batch.full.entropy, scored)
    assert metrics["entropy"] == pytest.approx(float(scored.sum() / tokens), rel=1e-6)
    sampler = batch.rollout.scores
    assert (sampler.policy, sampler.entropy_temperature) == ("sampler", 1.0)
    assert metrics["entropy"] < 0.95 * float(sampler.entropy.sum() / tokens)
    assert '"entropy"' in open(run.out / "samples.jsonl", encoding="utf-8").readline()
    metrics, _ = train.guarded_step(2, run)
    batch = run.last_batch
    assert batch.full is batch.old and batch.full.policy == "full policy"
    at_base = batch.old.entropy.sum() / batch.rollout.mask.sum()
    assert metrics["entropy"] == pytest.approx(float(at_base), rel=1e-6)


def test_phase_1_at_temperature_1_takes_the_sampler_s_entropies(opened):
    """There they are the full policy's at T_base, and cost no pass of the whole model."""
    run = opened(*"--bupo-layer 2 --bupo-steps 1 --lr 0".split())
    batch = train.train_step(1, run).batch
    assert batch.full.policy == "sampler" and batch.full.entropy is batch.rollout.entropy
    scored = run.engine.batch_logprobs(run.policy, batch.rollout, [slice(0, 8)], None).entropy
    torch.testing.assert_close(batch.full.entropy, scored, atol=1e-5, rtol=1e-4)


def test_bupo_auto_and_arms(tiny_folder, tmp_path, capsys):
    run(tmp_path / "auto", "--bupo-layer", "auto", "--bupo-steps", "1")
    assert "boundary layer: " in capsys.readouterr().out
    layer = "--bupo-layer 2 --bupo-steps 1 --bupo-baseline".split()
    run(tmp_path / "freeze", "--algo", "grpo", *layer, "freeze")
    start = load_file(tiny_folder / "model.safetensors")
    first = load_file(tmp_path / "freeze" / "checkpoint-1" / "model.safetensors")
    for name in first:
        frozen = name.startswith("model.layers.") and int(name.split(".")[2]) < 2
        assert torch.equal(first[name], start[name]) == frozen, name
    lowest = lambda tensors: {k: v for k, v in tensors.items() if ".layers.0." in k}
    assert not same(lowest(first), lowest(weights(tmp_path / "freeze")))
    run(tmp_path / "one", "--algo", "grpo", *layer, "one-layer")
    first = load_file(tmp_path / "one" / "checkpoint-1" / "model.safetensors")
    for name in first:
        assert torch.equal(first[name], start[name]) == (".layers.1." not in name), name
    assert not same(lowest(first), lowest(weights(tmp_path / "one")))
    _, rows = run(tmp_path / "lr", "--bupo-layer", "2", "--bupo-baseline", "layer-lr")
    assert rows[1]["phase"] == "full"


def test_failed_latex_comparisons_count_in_their_step(tmp_path, monkeypatch):
    """Not from the start of this process on: a resumed run would begin anew at 0."""
    monkeypatch.setattr(LATEX, "failures", 2)
    _, rows = run(tmp_path / "run", "--steps", "2")
    assert [row["latex_failures"] for row in rows[1:3]] == [2, 0]


# ----------------------------------------------------------------------------------------- resuming


SETTINGS = {
    "grpo": "--algo grpo",
    "hapo": "--algo hapo",
    "bupo": "--algo hapo --bupo-layer auto --bupo-steps 3",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_four_steps_are_two_and_resume_and_two(tmp_path, name):
    extra = SETTINGS[name].split()
    whole, rows = run(tmp_path / "whole", *extra, "--eval-every", 2, steps=4)
    if "--bupo-steps" in extra:  # the phase switch lies behind the resume
        run(tmp_path / "parts", *extra, "--eval-every", 2, "--save-total-limit", 9, steps=4)
        for n in (3, 4):
            shutil.rmtree(tmp_path / "parts" / f"checkpoint-{n}")
    else:
        run(tmp_path / "parts", *extra, "--eval-every", 2, steps=2)
    train.main(["--out", str(tmp_path / "parts"), "--resume", "--steps", "4"])
    assert same(whole, weights(tmp_path / "parts")) and rows == metrics(tmp_path / "parts")
    samples = lambda name: [
        json.loads(s) for s in open(tmp_path / name / "samples.jsonl", encoding="utf-8")
    ]
    assert samples("whole") == samples("parts")


def as_of_before(out):
    """Give the options and the state of a run the names that they had before."""
    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(renamed.with_old_names(config, renamed.OPTIONS)), encoding="utf-8")
    for folder in checkpoint.folders(out):
        state = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        given = checkpoint.given_settings(options.stored_options(out))
        given = json.dumps(renamed.with_old_names(given, renamed.OPTIONS), sort_keys=True)
        state = renamed.with_old_names(state, renamed.STATE)
        state["settings"] = hashlib.sha256(given.encode()).hexdigest()
        (folder / "run.json").write_text(json.dumps(state), encoding="utf-8")
        sums = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
        sums["run.json"] = hashlib.sha256((folder / "run.json").read_bytes()).hexdigest()
        (folder / "checksums.json").write_text(json.dumps(sums), encoding="utf-8")


def test_a_run_with_older_names_goes_on(tmp_path):
    """4 steps are 2 steps under the older names of options and state, and 2 more."""
    more = ("--algo", "dapo", "--baseline", "forking")
    whole, _ = run(tmp_path / "whole", *more, steps=4)
    run(tmp_path / "parts", *more, steps=2)
    as_of_before(tmp_path / "parts")
    config = (tmp_path / "parts" / "config.json").read_text(encoding="utf-8")
    assert '"answers_per_prompt": 4' in config and '"comparison": "forking"' in config
    train.main(["--out", str(tmp_path / "parts"), "--resume", "--steps", "4"])
    assert same(whole, weights(tmp_path / "parts"))
    config = (tmp_path / "parts" / "config.json").read_text(encoding="utf-8")
    assert '"num_generations": 4' in config and "comparison" not in config


def test_an_option_s_older_name_is_answered_with_the_new_one():
    for old, new in renamed.OPTIONS.items():
        flag = lambda name: "--" + name.replace("_", "-")
        with pytest.raises(UserError, match=f"{flag(old)}: this option is called {flag(new)} now"):
            option_checks.parse([f"{flag(old)}=3"], "")


@pytest.fixture(scope="session")
def three_steps(tmp_path_factory):
    """A run of three steps, to be copied."""
    folder = tmp_path_factory.mktemp("three") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "scripts.curves", None)
        invent_verdicts(patch)
        run(folder, steps=3)
    return folder


DAMAGED = {
    "truncated": "optimizer.pt",
    "flipped": "model.safetensors",
    "missing": "run.json",
    "no sums": "checksums.json",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_checkpoint_is_passed_over(three_steps, tmp_path, capsys, damage):
    shutil.copytree(three_steps, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint-3"
    victim = newest / DAMAGED[damage]
    content = bytearray(victim.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "truncated":
        victim.write_bytes(content[: len(content) // 2])
    else:
        victim.unlink()
    capsys.readouterr()
    shutil.rmtree(tmp_path / "run" / "final")
    train.main(["--out", str(tmp_path / "run"), "--resume"])
    printed = capsys.readouterr().out
    assert f"{newest} is passed over" in printed and victim.name in printed
    assert "checkpoint-2, the newest whole checkpoint" in printed
    assert same(weights(three_steps), weights(tmp_path / "run"))
    assert [r["step"] for r in metrics(tmp_path / "run")] == [0, 1, 2, 3]


def test_a_damaged_newer_checkpoint_does_not_cost_the_others(tmp_path):
    """--save-total-limit counts back from the step just saved: what a resume has passed over does
    not crowd out what it saves."""
    run(tmp_path / "run", "--save-total-limit", 9, steps=3)
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run" / "checkpoint-3" / "run.json").unlink()
    train.main(
        ["--out", str(tmp_path / "run"), "--resume", "--steps", "2", "--save-total-limit", "1"]
    )
    assert checkpoint.newest_whole(tmp_path / "run", print).name == "checkpoint-2"


def test_a_run_killed_in_its_first_step_looks_once(three_steps, tmp_path):
    run(tmp_path / "run", steps=1)
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoint-1")
    train.main(["--out", str(tmp_path / "run"), "--resume", "--steps", "3"])
    assert [r["step"] for r in metrics(tmp_path / "run")] == [0, 1, 2, 3]
    assert same(weights(tmp_path / "run"), weights(three_steps))


def test_a_half_written_line_and_an_unfinished_checkpoint_disappear(tmp_path):
    _, rows = run(tmp_path / "run", steps=2)
    with open(tmp_path / "run" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 3, "loss"')
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "run" / ".checkpoint-3.tmp")
    train.main(["--out", str(tmp_path / "run"), "--resume", "--steps", "3"])
    assert metrics(tmp_path / "run")[:3] == rows
    assert [r["step"] for r in metrics(tmp_path / "run")] == [0, 1, 2, 3]
    assert not (tmp_path / "run" / ".checkpoint-3.tmp").exists()


def test_resume_refuses_other_options_models_and_tokenizers(tmp_path, tiny_folder):
    run(tmp_path / "run", steps=1)
    with pytest.raises(UserError, match="--lr 0.5: the run .* was started with 0.001"):
        train.main(["--out", str(tmp_path / "run"), "--resume", "--lr", "0.5"])
    with pytest.raises(UserError, match="another model than --model"):
        train.main(["--out", str(tmp_path / "run"), "--resume", "--model", str(TINY)])
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(
        text.replace('"<|im_start|>"', '"<|start|>"'), encoding="utf-8"
    )
    with pytest.raises(UserError, match="another tokenizer than --model"):
        train.main(["--out", str(tmp_path / "run"), "--resume", "--model", str(other)])
    message = "already holds a run; --resume continues it, --overwrite deletes it"
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run")
    with pytest.raises(UserError, match="--tau 3.0"):
        run(tmp_path / "run", "--tau", 3)  # not the folder first and the option after it


def test_a_resume_of_nothing_and_a_folder_that_is_a_file_are_refused(tmp_path):
    out = tmp_path / "runs" / "typo"
    with pytest.raises(UserError, match="typo: holds no run that --resume could go on with"):
        train.main(["--resume", "--out", str(out)])
    assert not out.parent.exists()
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for path in ("file", "file/run"):
        with pytest.raises(UserError, match=f"--out .*{path}: leads through a file"):
            run(tmp_path / path)


def test_the_tiny_model_s_learning_rate_is_named_beside_a_large_model(
    tmp_path, monkeypatch, capsys
):
    estimate = SimpleNamespace(parameters=494e6, peak=1e9)
    monkeypatch.setattr("run.setup.memory.estimate", lambda *args: estimate)
    monkeypatch.setattr("run.setup.memory.check_fit", lambda *args: None)
    open_run(
        option_checks.parse([*FAST, *SMALL, "--out", str(tmp_path / "a")], ""), SingleProcess("cpu")
    )
    assert "warning: --lr" not in capsys.readouterr().out  # FAST gives one
    default = [x for x in FAST if x not in ("--lr", "1e-3")]
    open_run(
        option_checks.parse([*default, *SMALL, "--out", str(tmp_path / "b")], ""),
        SingleProcess("cpu"),
    )
    assert "warning: --lr 0.0002 is for the shipped tiny model" in capsys.readouterr().out


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path, capsys):
    run(tmp_path / "run", "--resume", steps=1)
    assert "no whole checkpoint" in capsys.readouterr().out
    assert (tmp_path / "run" / "final").is_dir()


# ------------------------------------------------------------------------------------------- guards


def poison(monkeypatch, at, times=1):
    """From the at-th update on, `times` losses are NaN."""
    count, original = [0], losses.masked_mean

    def masked_mean(*args):
        count[0] += 1
        return original(*args) * (float("nan") if at <= count[0] < at + times else 1.0)

    monkeypatch.setattr(losses, "masked_mean", masked_mean)


def test_a_nan_never_reaches_the_optimiser(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, at=3, times=2)  # both updates of step 2
    final, rows = run(tmp_path / "run", steps=3)
    assert [r.get("skipped_updates") for r in rows[1:]] == [0, 2, 0]
    assert all(v.isfinite().all() for v in final.values())
    assert "update skipped" in capsys.readouterr().out
    # a bad step is not what a run should be resumed from
    assert not (tmp_path / "run" / "checkpoint-2").exists()


def test_bad_steps_in_a_row_end_the_run(tmp_path, monkeypatch):
    poison(monkeypatch, at=3, times=10**6)
    message = "3 bad steps in a row .* last good checkpoint is .*checkpoint-1"
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path / "run", "--max-bad-steps", 3, steps=9)
    assert "\n" not in str(error.value)
    assert (tmp_path / "run" / "bad-step-4.jsonl").stat().st_size > 0
    assert checkpoint.newest_whole(tmp_path / "run", lambda text: None).name == "checkpoint-1"


def test_broken_weights_end_the_run(tmp_path, monkeypatch):
    original = Engine.optimizer_step

    def optimizer_step(engine, loss):
        result = original(engine, loss)
        with torch.no_grad():
            engine.policy.model.norm.weight[0] = torch.nan
        return result

    monkeypatch.setattr(Engine, "optimizer_step", optimizer_step)
    with pytest.raises(UserError, match="bad steps in a row"):
        run(tmp_path / "run", "--max-bad-steps", 2, steps=9)


def test_a_nan_reward_is_refused(tmp_path, monkeypatch):
    original = train.generate_and_grade

    def generate_and_grade(*args):
        batch = original(*args)
        batch.rewards[0] = torch.nan
        return batch

    monkeypatch.setattr(train, "generate_and_grade", generate_and_grade)
    with pytest.raises(UserError, match="bad steps in a row"):
        run(tmp_path / "run", "--max-bad-steps", 2, steps=9)
    bad = [
        json.loads(line) for line in open(tmp_path / "run" / "bad-step-2.jsonl", encoding="utf-8")
    ]
    # the batch that was refused, in valid JSON
    assert len(bad) == 16 and sum(row["reward"] is None for row in bad) == 1
    assert "a reward is NaN" in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("library", ["os", "torch", "safetensors"])
def test_a_full_disk_ends_in_one_line_and_loses_nothing(tmp_path, monkeypatch, library):
    from safetensors import SafetensorError

    original, calls = torch.save, [0]

    def save(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 3:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    error = {
        "os": OSError(28, "No space left on device"),
        "torch": RuntimeError("No space left on device"),
        "safetensors": SafetensorError("No space left on device"),
    }[library]
    with pytest.raises(UserError, match="checkpoint 2 cannot be written .No space left on device."):
        run(tmp_path / "run", steps=4)
    assert checkpoint.newest_whole(tmp_path / "run", print).name == "checkpoint-1"
    assert not list((tmp_path / "run").glob(".checkpoint*"))


def test_guard_alarms():
    from run.guard import Guard

    said = []
    guard = Guard(said.append)
    usual = {"grad_norm": 1.0, "entropy": 0.5, "response_length": 20}
    for step in range(1, 29):
        guard.good_step({"step": step, **usual})
    guard.good_step({"step": 29, **usual, "response_length": 200})
    assert len(said) == 1 and "response length 200 at step 29, 10.0 times" in said[0]
    assert "clipped_ratio" in said[0]
    for step in range(30, 40):  # back to normal: no echo
        guard.good_step({"step": step, **usual})
    assert len(said) == 1
    guard.good_step({"step": 40, **usual, "entropy": 0.05})
    assert len(said) == 2 and "collapses" in said[1]
    guard.good_step({"step": 41, **usual, "entropy": 0.05})  # known by now, a resume included
    resumed = Guard(said.append)
    resumed.restore(json.loads(json.dumps(guard.state())))
    resumed.good_step({"step": 42, **usual, "entropy": 0.05})
    assert len(said) == 2
    guard.good_step({"step": 43, **usual, "grad_norm": 0.0, "updates": 0})  # all groups dead
    assert len(said) == 2
    phase_1 = {"grad_norm": 1.0, "response_length": 20, "sampler_entropy": 9.0}
    guard.good_step({"step": 44, **phase_1})  # the entropy is not known there
    assert len(said) == 2 and guard.means["entropy"] < 1
    old = guard.state()
    del old["away"]  # a checkpoint of before
    resumed.restore(old)


def test_what_becomes_of_an_update():
    """By loss and gradient norm; under float16 an overflow is no fault as long as the loss scale
    can still fall, a NaN loss is."""
    inf, nan = math.inf, math.nan
    settings = dataclasses.replace(option_checks.parse(["--estimate"], ""), dtype="float32")
    cases = [(0.0, 1.0, "applied"), (inf, 1.0, "skipped"), (0.0, nan, "skipped")]
    scaled = [(0.0, 1.0, "applied"), (0.0, inf, "rescaled"), (nan, nan, "skipped")]
    for kind, rows in (("float32", cases), ("float16", scaled), ("at scale 1", cases)):
        for loss, gradient, outcome in rows:
            p = torch.nn.Parameter(torch.ones(2))
            module = torch.nn.Module()
            module.p = p
            module.config = None
            engine = Engine(module, settings, SingleProcess("cpu"), 1, [])
            if kind != "float32":
                settings = dataclasses.replace(settings, plain=True)
                engine = Fp16Engine(module, settings, SingleProcess("cpu"), 1, [])
                engine.scaler._init_scale = 1024.0 if kind == "float16" else 1.0
                engine.scaler.scale(torch.ones(1))
            p.grad = torch.tensor([gradient, 0.0])
            assert engine.optimizer_step(loss)[0] == outcome, (kind, loss, gradient)
            assert (p != 1).any() == (outcome == "applied") and p.grad is None


# -------------------------------------------------------------------------------------- bad options


@pytest.mark.parametrize(
    "args, message",
    [
        (["--num-generations", "1"], "--num-generations 1: hapo compares the responses"),
        (
            ["--prompts-per-step", "5"],
            "--prompts-per-step 5: must be a multiple of --updates-per-rollout 2",
        ),
        (["--micro-batch", "3"], "--micro-batch 3: must divide the 8 responses of an update"),
        (["--micro-batch", "2", "--micro-tokens", "100"], "not both"),
        (["--rho", "1.5"], "--rho 1.5: must lie between 0 and 1"),
        (["--tau", "-1"], "--tau -1.0"),
        (["--clip-low", "1.2"], "--clip-low 1.2"),
        (["--temperature", "0"], "--temperature 0.0"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
        (["--data", "", "--difficulty", "0"], "--difficulty 0: addition has the levels"),
        (["--lr", "nan"], "--lr nan"),
        (["--dual-clip", "0.5"], "--dual-clip 0.5"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--algo", "ppo"], "invalid choice: 'ppo'"),
        (["--steps", "many"], "invalid int value"),
        (["--model", "/nowhere"], "--model /nowhere: no such folder"),
        (["--data", "/nowhere.jsonl"], "--data /nowhere.jsonl: no such file"),
        (
            ["--bupo-layer", "99", "--bupo-steps", "1"],
            "--bupo-layer 99: this model has the layers 1 to",
        ),
        (["--bupo-layer", "x"], "--bupo-layer x: must be auto or a layer"),
        (
            ["--bupo-layer", "1", "--bupo-steps", "2"],
            "--bupo-steps 2: the first phase must be shorter than the run",
        ),
        (["--baseline", "archer"], "--baseline archer: a baseline replaces HAPO; add --algo dapo"),
        (["--algo", "dapo", "--baseline", "archer", "--clip-low", "0.1"], "its own bounds"),
        (["--released", "--temperature-form", "zscore"], "--temperature-form zscore: the released"),
        (["--algo", "dapo", "--released"], "--released True: belongs to HAPO"),
        (["--algo", "grpo", "--rho", "0.5"], "--rho 0.5: belongs to HAPO"),
        (["--bupo-norm"], "--bupo-norm True: does nothing without --bupo-layer"),
        (
            ["--bupo-baseline", "freeze"],
            "--bupo-baseline freeze: does nothing without --bupo-layer",
        ),
        (["--bupo-steps", "1"], "--bupo-steps 1: does nothing without --bupo-layer"),
        (["--algo", "dapo", "--no-adaptive-clip"], "--adaptive-clip False: belongs to HAPO"),
        (["--algo", "dapo", "--tau", "0.3"], "--tau 0.3: does nothing without HAPO's adaptive"),
        (["--no-adaptive-temperature", "--tau", "0.3"], "--tau 0.3: does nothing without"),
        (["--max-rounds", "9"], "--max-rounds 9: does nothing without --dynamic-sampling"),
        (
            ["--no-adaptive-temperature", "--temperature-form", "zscore"],
            "--temperature-form zscore: does nothing without HAPO's adaptive temperature",
        ),
        (
            "--no-adaptive-temperature --no-advantage-redistribution --no-adaptive-clip "
            "--rho 0.5".split(),
            "--rho 0.5: does nothing without HAPO's A, C and D",
        ),
        (
            "--bupo-layer 2 --bupo-baseline layer-lr --bupo-steps 3".split(),
            "--bupo-steps 3: does nothing: the phases",
        ),
        (["--difficulty", "1"], "--difficulty 1: belongs to the built-in tasks"),
        (["--task", "countdown"], "--task countdown: belongs to the built-in tasks"),
        (["--max-new-tokens", "100000"], "--max-new-tokens 100000: no prompt fits"),
        (["--max-new-tokens", "250"], r"the shortest has \d+: at most \d+ are left"),
        (["--offload", "--split-master"], "--split-master True: is for one process"),
        (["--split-master", "--dtype", "float32"], "--dtype float32: --offload and --split-master"),
        (["--offload", "--dtype", "float16"], "--dtype float16: its loss scaling"),
        (["--decode-rows", "3"], "--decode-rows 3: the 4 responses to a prompt"),
        (["--diagnose-every", "1"], "--diagnose-every 1: needs --bupo-layer"),
        (["--device", "gpu"], "--device gpu: must be cpu, cuda, mps or xpu"),
        (["--threads", "0"], "--threads 0: this machine has"),
        (["--threads", "-1"], "--threads -1: this machine has"),
        (["--threads", "9999"], "--threads 9999: this machine has"),
        (["--device", "cuda:99"], "--device cuda:99: no such CUDA device"),
        (["--dual-clip", "nan"], "--dual-clip nan"),
        (["--data", "", "--difficulty", "7"], "--difficulty 7: addition has the levels"),
        (["--overlong-buffer", "9"], "--overlong-buffer 9: longer than"),
        (["--data", "", "--eval-data", "x"], "--eval-data x: needs --data"),
    ],
)
def test_bad_options_are_one_line(tmp_path, args, message):
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path / "run", *args)
    assert "\n" not in str(error.value)


def make_unusable_models(folder, good):
    """Six model folders, each of which cannot be trained for a reason of its own."""
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.BertConfig(**sizes, vocab_size=30)
    transformers.BertModel(config).save_pretrained(folder / "bert")
    heads = dict(num_key_value_heads=2, vocab_size=400)
    config = transformers.GraniteConfig(**sizes, **heads, logits_scaling=4.0)
    transformers.GraniteForCausalLM(config).save_pretrained(folder / "scaled")
    for file in good.glob("*token*"):
        shutil.copy(file, folder / "scaled")
    (folder / "empty").mkdir()
    for name in ("no-tokenizer", "cut", "short"):
        shutil.copytree(good, folder / name)
    for file in (folder / "no-tokenizer").glob("tokenizer*"):
        file.unlink()
    content = (folder / "cut" / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(content[: len(content) // 2])
    config = json.loads((folder / "short" / "config.json").read_text(encoding="utf-8"))
    config |= {"num_hidden_layers": 4, "layer_types": None}
    (folder / "short" / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_models_that_cannot_be_used(tmp_path, tiny_folder):
    make_unusable_models(tmp_path, tiny_folder)
    cases = {
        "scaled": "logits are more than hidden states times the output embedding",
        "bert": "is not a causal language model",
        "empty": "holds no config.json",
        "no-tokenizer": "its tokenizer cannot be read",
        "cut": "its weights cannot be read",
        "short": "weights are missing",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            run(tmp_path / "run", "--model", tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_folder_that_is_not_a_run_is_never_deleted(tiny_folder):
    with pytest.raises(UserError, match="holds something that is not a run"):
        train.main(["--out", str(tiny_folder), "--overwrite"])
    assert (tiny_folder / "model.safetensors").exists()


def test_damaged_weights_are_one_line(real_verdicts, tiny_folder, tmp_path, capsys, monkeypatch):
    broken = shutil.copytree(tiny_folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: run(tmp_path / "run", "--model", broken))
    assert stop.value.code == 2
    assert "weights are damaged" in capsys.readouterr().err.splitlines()[-1]


def test_a_default_that_depends_on_others_gives_way_to_what_was_asked_for():
    parse = lambda *args: option_checks.parse(["--estimate", *args], "")
    assert parse().tau == 0.05 and parse().clip_high == 0.28
    assert parse("--algo", "grpo").clip_high == 0.2
    assert parse("--temperature-form", "zscore").tau == 0.1
    assert parse("--tau", "0").tau == 0 and parse("--clip-high", "0").clip_high == 0
    assert parse("--loss-mean", "fixed").loss_mean == "fixed"


def test_every_option_has_a_flag_and_a_help_text():
    for field in dataclasses.fields(options.Options):
        assert field.metadata["help"]
    assert option_checks.parse(["--no-adaptive-clip", "--estimate"], "").adaptive_clip is False


def test_estimate_needs_no_weights(capsys, tmp_path):
    shutil.copy(TINY / "config.json", tmp_path)
    train.main(["--model", str(tmp_path), "--estimate"])
    assert "peak" in capsys.readouterr().out


def test_a_random_reward_is_a_coin_that_no_answer_changes(tmp_path):
    """Half of the answers are paid, by seed and step alone; held-out accuracy is of verdicts, of
    which half are right here."""
    coin = "--reward random --prompts-per-step 16".split()
    _, rows = run(tmp_path / "a", *coin)
    rewards = [row["reward"] for row in rows[1:]]
    # of 64 coins: 0.2 is 3.2 of their standard deviations
    assert all(abs(reward - 0.5) < 0.2 for reward in rewards) and len(set(rewards)) == 2
    assert rows[0]["eval_accuracy"] == rows[0]["eval_lenient"] == 0.5
    _, again = run(tmp_path / "b", *coin, "--lr", "0")
    assert [row["reward"] for row in again[1:]] == rewards
    _, other = run(tmp_path / "c", *coin, "--seed", "9", steps=1)
    assert other[1]["reward"] != rewards[0]
