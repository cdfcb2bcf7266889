"""The loop: what must not change the result, what must continue exactly, and one line for every
mistake."""

import dataclasses
import hashlib
import json
import math
import pathlib
import shlex
import shutil
import sys
from types import SimpleNamespace

import conftest
import pytest
import torch
import transformers
from conftest import TINY, changed_scores, program, write_questions
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import hapo
import losses
import train
from common import renamed
from common.errors import UserError
from engine import packing
from engine.engine import Engine, SingleProcess
from engine.float16 import Fp16Engine
from evaluate import Response
from problems.grading import Grade
from problems.latex import LATEX
from run import checkpoint, option_checks, options, report, schedules
from run.guard import Guard
from run.setup import open_run
from tasks import Problem

FAST = [*conftest.SMALL, *"--num-generations 4 --updates-per-rollout 2 --warmup-steps 2".split()]
FOUR = "--num-generations 4 --updates-per-rollout 2".split()  # as in FAST, for opened()
SMALL = []  # --model and --data of a random model and a file, made once
TIMES = ("seconds_generate", "seconds_score", "seconds_update", "tokens_per_second")


@pytest.fixture
def real_verdicts():
    """A test that asks for this grades answers and evaluates held-out questions."""


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """No pictures, as on a machine without matplotlib, and invented verdicts; no failed comparison
    of another test, which the first step would count."""
    monkeypatch.setitem(sys.modules, "scripts.curves", None)
    monkeypatch.setattr(LATEX, "failures", 0)
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


def resume(out, *more):
    train.main(["--out", str(out), "--resume", *map(str, more)])


def weights(out, name="final"):
    return load_file(pathlib.Path(out) / name / "model.safetensors")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_times(row):
    return {k: v for k, v in row.items() if k not in TIMES}


def metrics(out):
    return list(map(without_times, lines(out / "metrics.jsonl")))


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


def weights_of(run):
    return {name: p.detach().clone() for name, p in run.policy.named_parameters()}


def take(run, *steps):
    """Take these steps of an opened run as train.train does; their metrics."""
    rows = []
    for step in steps:
        metrics, bad = train.guarded_step(step, run)
        report.record(step, metrics, bad, run)
        rows.append(without_times(metrics))
    return rows


@pytest.fixture(scope="session")
def four_steps(tmp_path_factory, small):
    """A run of four steps, to be copied."""
    folder = tmp_path_factory.mktemp("four") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "scripts.curves", None)
        invent_verdicts(patch)
        run(folder, "--save-total-limit", 9, "--eval-every", 2, steps=4)
    return folder


def stopped_after(step, whole, out):
    """Copy a run as if it had been killed after a step; what it wrote of later ones is lost."""
    shutil.copytree(whole, out)
    shutil.rmtree(out / "final")
    for folder in checkpoint.folders(out)[: -step - 1]:
        shutil.rmtree(folder)
    return out


def test_a_run_and_its_files_and_the_same_seed_gives_the_same_metrics(
    real_verdicts, tmp_path, capsys
):
    shipped = ["--model", TINY, "--data", ""]
    final, _ = run(tmp_path / "run", *shipped)
    printed = capsys.readouterr().out
    assert "expect a loss near 0" in printed and "step 2/2" in printed
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2]
    assert {"eval_accuracy", "eval_greedy", "pass_rate", "expected_live_groups"} <= rows[0].keys()
    card = (tmp_path / "run" / "final" / "README.md").read_text(encoding="utf-8")
    assert f"| 2 | {rows[2]['eval_accuracy']:.3f} | {rows[2]['eval_greedy']:.3f} |" in card
    promised = (
        "step phase loss reward entropy grad_norm response_length clipped_ratio clip_low clip_high "
        "ratio_max zero_std_groups all_correct all_wrong"
    ).split()
    assert {*promised, *TIMES} <= rows[1].keys() and "eval_accuracy" in rows[2]
    for s in lines(tmp_path / "run" / "samples.jsonl"):
        assert len(s["tokens"]) == len(s["entropy"]) == len(s["temperature"])
        assert s["question"] and s["reward"] in (0, 1)
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert config["clip_high"] == 0.28 and config["max_new_tokens"] == 6
    for folder in ("final", "checkpoint-2"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / folder)
        transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / folder)
    again, again_rows = run(tmp_path / "again", *shipped)
    assert same(final, again) and metrics(tmp_path / "run") == again_rows


PARTS = "adaptive-temperature token-group-average advantage-redistribution adaptive-clip".split()


def test_hapo_with_all_four_off_is_dapo_to_the_last_bit(opened):
    """And each part alone changes the result: the later updates of a step see ratios other than 1,
    and a narrow clip range makes sure that some are at its edges."""
    narrow = "--updates-per-rollout 4 --lr 0.0005 --clip-low 0.1 --clip-high 0.1".split()

    def two_steps(*more):
        run = opened(*FOUR, *narrow, *more)
        return take(run, 1, 2), weights_of(run)

    rows, dapo = two_steps("--algo", "dapo")
    off_rows, off = two_steps(*[f"--no-{part}" for part in PARTS])
    assert same(dapo, off)
    for a, b in zip(rows, off_rows):
        assert all(a[key] == b[key] for key in a.keys() & b.keys())
    for part in PARTS:
        others_off = [f"--no-{other}" for other in PARTS if other != part]
        heat = ["--tau", "0.5"] if part == "adaptive-temperature" else []
        assert not same(dapo, two_steps(*others_off, *heat)[1]), part


@pytest.fixture
def gradients(monkeypatch):
    """Record the gradient of every update instead of applying it."""
    seen = []

    def step(self, closure=None):
        weights = [p for group in self.param_groups for p in group["params"]]
        seen.append(torch.cat([p.grad.flatten() for p in weights]))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return seen


@pytest.mark.parametrize("algo", ["hapo", "grpo"])
def test_micro_batches_change_no_gradient(opened, gradients, algo, monkeypatch):
    """Nor do answers that share lines: they do in whole passes (of unequal length, since some of
    the tokens end one), and in the last run nowhere."""
    passes = ("--micro-batch 1", "--micro-batch 2", "--micro-tokens 60 --gradient-checkpointing")
    settings = ("", *passes, "")
    for i, extra in enumerate(settings):
        if i == len(settings) - 1:
            monkeypatch.setattr(packing, "choose_packing", lambda *sizes: None)
        run = opened(*FOUR, "--algo", algo, "--grad-clip", "1e6", *extra.split())
        run.engine.eos_ids = range(60)
        step = train.train_step(1, run)
        assert len(set(step.batch.rollout.lengths.tolist())) > 2
        if algo == "hapo":  # ratios are 1: the loss is the tokens' mean advantage (GRPO's is 0)
            mask, parts = step.batch.loss_mask[:8], step.updates[0].micro_batches
            total = sum((part.loss.advantages * mask[part.rows]).sum() for part in parts)
            torch.testing.assert_close(float(step.updates[0].loss), float(-total / mask.sum()))
    assert len(gradients) == 2 * len(settings)
    for i, gradient in enumerate(gradients):
        assert (gradient - gradients[i % 2]).norm() <= 2e-4 * gradients[i % 2].norm(), i


def test_warm_up_is_linear_and_nothing_is_outside_the_clip_range_before_an_update(four_steps):
    rows = metrics(four_steps)[1:]
    assert [r["lr"] for r in rows] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])
    assert all(row["outside_before_update"] == 0 for row in rows)


@pytest.fixture
def one_update(opened, monkeypatch):
    """one_update(advantage, shift, *options, h=0.0, ref=None): loss of one token-mean update whose
    ratios are all exp(shift) and h all the same."""

    def loss(advantage, shift, *args, h=0.0, ref=None):
        run = opened("--lr", "0", *args)

        def shifted(scores, model):
            by = ref if model is run.reference else -shift
            return scores._replace(logp=scores.logp + by)

        def advantages(rewards, mask, *more):
            return advantage * torch.ones(mask.shape)

        with monkeypatch.context() as patch:
            changed_scores(patch, run, shifted)
            patch.setattr(hapo, "token_group_advantages", advantages)
            patch.setattr(hapo, "modulation", lambda H, *more: h * torch.ones_like(H))
            return train.train_step(1, run).updates[0].loss

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


def test_the_overlong_penalty_is_part_of_the_reward_and_not_of_the_accuracy(opened):
    run = opened("--overlong-buffer", "4")
    run.engine.eos_ids = range(60)  # responses of unequal length
    (row,) = take(run, 1)
    batch = run.last_batch
    # of at most 6 tokens, those from the third on cost a quarter each
    penalty = [max(-1.0, min(0.0, (2 - n) / 4)) for n in batch.rollout.lengths.tolist()]
    right = batch.rewards - torch.tensor(penalty)
    assert set(right.tolist()) == {0.0, 1.0} and len(set(penalty)) > 2
    assert row["correct"] == pytest.approx(right.mean().item())
    assert row["reward"] == pytest.approx(batch.rewards.mean().item())
    assert row["reward"] < row["correct"]


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


def test_algorithms_and_options_run(opened):
    settings = ["--temperature-form zscore", "--dynamic-sampling", "--kl 0.1", "--loss-mean fixed"]
    arms = ("forking", "archer", "entropy-advantage", "edge")
    settings += [f"--baseline {arm} --algo dapo" for arm in arms]
    for extra in settings:
        run = opened(*FOUR, *extra.split())
        (row,) = take(run, 1)
        assert row["updates"] + row["no_signal_updates"] == 2 and row["grad_norm"] >= 0, extra
        assert all(v.isfinite().all() for v in run.policy.parameters()), extra


def test_dynamic_sampling_ends_when_every_group_is_dead(real_verdicts, opened, capsys):
    run = opened(*FOUR, *"--dynamic-sampling --max-rounds 2".split())  # which is never right
    before = weights_of(run)
    (row,) = take(run, 1)
    assert "4 of 4 groups still have no reward variance" in capsys.readouterr().out
    assert row["unfilled_groups"] == 4 and row["groups"] == 8
    assert row["no_signal_updates"] == 2 and row["updates"] == 0
    # no live group: nothing moves, not even by weight decay
    assert same(before, weights_of(run))


def moved(run, before):
    """The names of the weights that are not what they were."""
    return {name for name, value in weights_of(run).items() if not torch.equal(value, before[name])}


def names_of(run, *parts):
    """The names of the weights of these blocks (by number) and of others (how they start)."""
    prefixes = tuple(f"model.layers.{x}." if isinstance(x, int) else x for x in parts)
    return {name for name, _ in run.policy.named_parameters() if name.startswith(prefixes)}


EMBEDDING = "model.embed_tokens."


def test_bupo_phases_in_training(opened):
    run = opened(*FOUR, *"--bupo-layer 2 --bupo-steps 2 --diagnose-every 1".split())
    start, rows = weights_of(run), take(run, 1, 2)
    assert moved(run, start) == names_of(run, 0, 1, EMBEDDING)
    second = weights_of(run)
    rows += take(run, 3)
    assert moved(run, second) == second.keys()
    assert [r["phase"] for r in rows] == ["internal", "internal", "full"]
    assert rows[0]["layer"] == 2
    assert {"internal_entropy", "internal_logp", "entropy", "sampler_logp"} <= rows[0].keys()
    assert {"entropy", "logp"} <= rows[2].keys()
    assert not {"internal_entropy", "sampler_logp", "sampler_entropy"} & rows[2].keys()
    assert rows[0]["outside_before_update"] == 0
    assert len(rows[0]["diagnose_kl"]) == len(rows[0]["diagnose_cosine"]) > 0


def test_an_entropy_is_named_by_its_temperature(opened, capsys):
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


def test_bupo_auto_and_arms(opened, capsys):
    assert (
        take(opened(*FOUR, *"--bupo-layer auto --bupo-steps 1".split()), 1)[0]["phase"]
        == "internal"
    )
    assert "boundary layer: " in capsys.readouterr().out
    layer = "--algo grpo --bupo-layer 2 --bupo-steps 1 --bupo-baseline".split()
    for baseline, trained in (("freeze", (2, EMBEDDING, "model.norm")), ("one-layer", (1,))):
        run = opened(*FOUR, *layer, baseline)
        start = weights_of(run)
        take(run, 1)
        assert moved(run, start) == names_of(run, *trained), baseline
        first = weights_of(run)
        take(run, 2)
        assert moved(run, first) == first.keys(), baseline
    run = opened(*FOUR, *"--bupo-layer 2 --bupo-baseline layer-lr".split())
    assert take(run, 1)[0]["phase"] == "full"


def test_failed_latex_comparisons_count_in_their_step(opened, monkeypatch):
    """Not from the start of this process on: a resumed run would begin anew at 0."""
    monkeypatch.setattr(LATEX, "failures", 2)
    assert [row["latex_failures"] for row in take(opened(), 1, 2)] == [2, 0]


@pytest.mark.parametrize("extra", ["", "--bupo-layer auto --bupo-steps 3"])
def test_four_steps_are_two_and_resume_and_two(four_steps, tmp_path, extra):
    """HAPO, and with BuPO, whose phases change after the resume. A half-written line and an
    unfinished checkpoint disappear."""
    whole = four_steps
    if extra:
        whole, more = tmp_path / "whole", ("--save-total-limit", 9, "--eval-every", 2)
        run(whole, *extra.split(), *more, steps=4)
    parts = stopped_after(2, whole, tmp_path / "parts")
    with open(parts / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 5, "loss"')
    shutil.copytree(parts / "checkpoint-2", parts / ".checkpoint-3.tmp")
    resume(parts)
    assert same(weights(whole), weights(parts)) and metrics(whole) == metrics(parts)
    assert lines(whole / "samples.jsonl") == lines(parts / "samples.jsonl")
    assert not (parts / ".checkpoint-3.tmp").exists()


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
    """2 steps are one step under the older names of options and state, and one more."""
    run(tmp_path / "whole", "--algo", "dapo", "--baseline", "forking")
    parts = stopped_after(1, tmp_path / "whole", tmp_path / "parts")
    as_of_before(parts)
    config = (parts / "config.json").read_text(encoding="utf-8")
    assert '"answers_per_prompt": 4' in config and '"comparison": "forking"' in config
    resume(parts)
    assert same(weights(tmp_path / "whole"), weights(parts))
    config = (parts / "config.json").read_text(encoding="utf-8")
    assert '"num_generations": 4' in config and "comparison" not in config


def test_an_option_s_older_name_is_answered_with_the_new_one():
    for old, new in renamed.OPTIONS.items():
        flag = lambda name: "--" + name.replace("_", "-")
        with pytest.raises(UserError, match=f"{flag(old)}: this option is called {flag(new)} now"):
            option_checks.parse([f"{flag(old)}=3"], "")


def test_a_damaged_checkpoint_is_passed_over(four_steps, tmp_path):
    newest = shutil.copytree(four_steps, tmp_path / "run") / "checkpoint-4"
    half, other = lambda x: x[: len(x) // 2], lambda x: x[:-9] + bytes([x[-9] ^ 1]) + x[-8:]
    damaged = {"optimizer.pt": half, "model.safetensors": other, "run.json": None}
    for name, damage in (damaged | {"checksums.json": None}).items():
        said, content = [], (newest / name).read_bytes()
        (newest / name).unlink()
        if damage:
            (newest / name).write_bytes(damage(content))
        found = checkpoint.newest_whole(tmp_path / "run", said.append)
        assert found.name == "checkpoint-3" and len(said) == 2, name
        assert said[0].startswith(f"warning: {newest} is passed over: {name}")
        assert said[1].endswith("checkpoint-3, the newest whole checkpoint")
        (newest / name).write_bytes(content)
    assert checkpoint.newest_whole(tmp_path / "run", str).name == "checkpoint-4"


def test_a_damaged_newer_checkpoint_does_not_cost_the_others(four_steps, tmp_path):
    """--save-total-limit counts back from the step just saved: what a resume has passed over does
    not crowd out what it saves."""
    out = shutil.copytree(four_steps, tmp_path / "run")
    shutil.rmtree(out / "checkpoint-3")
    (out / "checkpoint-4" / "run.json").unlink()
    resume(out, "--steps", 3, "--save-total-limit", 1)
    assert checkpoint.newest_whole(out, print).name == "checkpoint-3"
    assert same(weights(out), weights(four_steps, "checkpoint-3"))
    assert [r["step"] for r in metrics(out)] == [0, 1, 2, 3]


def test_a_run_killed_in_its_first_step_looks_once(four_steps, tmp_path):
    out = stopped_after(0, four_steps, tmp_path / "run")
    resume(out, "--steps", 1)
    assert [r["step"] for r in metrics(out)] == [0, 1]
    assert same(weights(out), weights(four_steps, "checkpoint-1"))


def test_resume_refuses_other_options_models_tokenizers_and_schedules(
    four_steps, tmp_path, tiny_folder, monkeypatch
):
    out = shutil.copytree(four_steps, tmp_path / "run")
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    text = text.replace('"<|im_start|>"', '"<|start|>"')
    (other / "tokenizer.json").write_text(text, encoding="utf-8")
    for option, value, message in (
        ("--lr", 0.5, "--lr 0.5: the run .* was started with 0.001"),
        ("--model", TINY, "another model than --model"),
        ("--model", other, "another tokenizer than --model"),
    ):
        with pytest.raises(UserError, match=message):
            resume(out, option, value)
    message = "already holds a run; --resume continues it, --overwrite deletes it"
    with pytest.raises(UserError, match=message):
        run(out)
    with pytest.raises(UserError, match="--tau 3.0"):
        run(out, "--tau", 3)  # not the folder first and the option after it
    decay = lambda step, options: 1 - step / (options.steps + 1)
    monkeypatch.setattr(schedules, "learning_rate_factor", decay)
    with pytest.raises(UserError, match="--steps 8: with it, the learning rate of step 1 would"):
        resume(out, "--steps", 8)


def test_a_resume_of_nothing_and_a_folder_that_is_a_file_are_refused(tmp_path, opened, capsys):
    out = tmp_path / "runs" / "typo"
    with pytest.raises(UserError, match="typo: holds no run that --resume could go on with"):
        resume(out)
    assert not out.parent.exists()
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for path in ("file", "file/run"):
        with pytest.raises(UserError, match=f"--out .*{path}: leads through a file"):
            run(tmp_path / path)
    # with all options of a run, it starts from the beginning
    where = [*FAST, *SMALL, "--out", str(out), "--resume"]
    assert open_run(option_checks.parse(where, ""), SingleProcess("cpu"))[1] is None
    assert "no whole checkpoint" in capsys.readouterr().out


def test_the_tiny_model_s_learning_rate_is_named_beside_a_large_model(
    tmp_path, monkeypatch, capsys
):
    estimate = SimpleNamespace(parameters=494e6, peak=1e9)
    monkeypatch.setattr("run.setup.memory.estimate", lambda *args: estimate)
    monkeypatch.setattr("run.setup.memory.check_fit", lambda *args: None)
    default = [x for x in FAST if x not in ("--lr", "1e-3")]
    for given, warned in ((FAST, False), (default, True)):  # FAST gives one
        where = ["--out", str(tmp_path / str(warned))]
        open_run(option_checks.parse([*given, *SMALL, *where], ""), SingleProcess("cpu"))
        warning = "warning: --lr 0.0002 is for the shipped tiny model"
        assert (warning in capsys.readouterr().out) == warned


def test_a_nan_never_reaches_the_optimiser_and_bad_steps_in_a_row_end_the_run(
    tmp_path, monkeypatch, capsys
):
    """The losses of step 2 are NaN, and so are those of steps 4 and 5."""
    count, original = [0], losses.masked_mean

    def masked_mean(*args):
        count[0] += 1
        return original(*args) * (math.nan if count[0] in (3, 4, 7, 8, 9, 10) else 1.0)

    monkeypatch.setattr(losses, "masked_mean", masked_mean)
    out, message = tmp_path / "run", "2 bad steps in a row .* last good checkpoint is .*point-3"
    with pytest.raises(UserError, match=message) as error:
        run(out, "--max-bad-steps", 2, "--save-total-limit", 9, steps=9)
    assert "\n" not in str(error.value) and "update skipped" in capsys.readouterr().out
    assert [r.get("skipped_updates") for r in metrics(out)[1:]] == [0, 2, 0, 2, 2]
    assert (out / "bad-step-5.jsonl").stat().st_size > 0
    # a bad step is not what a run should be resumed from
    assert [p.name[-1] for p in checkpoint.folders(out)] == ["3", "1", "0"]
    assert all(v.isfinite().all() for v in weights(out, "checkpoint-3").values())


def test_a_nan_reward_is_refused(tmp_path, monkeypatch):
    original = train.generate_and_grade

    def generate_and_grade(*args):
        batch = original(*args)
        batch.rewards[0] = torch.nan
        return batch

    monkeypatch.setattr(train, "generate_and_grade", generate_and_grade)
    with pytest.raises(UserError, match="bad steps in a row"):
        run(tmp_path / "run", "--max-bad-steps", 1, steps=9)
    bad = lines(tmp_path / "run" / "bad-step-1.jsonl")
    # the batch that was refused, in valid JSON
    assert len(bad) == 16 and sum(row["reward"] is None for row in bad) == 1
    assert "a reward is NaN" in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")


def test_a_full_disk_ends_in_one_line_and_loses_nothing(opened, monkeypatch):
    run = opened()
    checkpoint.save(run, 1)

    def save(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "save", save)
    full = "No space left on device"
    for error in (OSError(28, full), RuntimeError(full), SafetensorError(full)):  # noqa: B007
        message = f"checkpoint 2 cannot be written .{full}.; what was saved before is intact"
        with pytest.raises(UserError, match=message):
            checkpoint.save(run, 2)
        assert checkpoint.newest_whole(run.out, print).name == "checkpoint-1"
        assert not list(run.out.glob(".checkpoint*"))


def test_guard_alarms():
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


# a message, and command lines that it answers; it starts with the last option of each
BAD_OPTIONS = """
hapo compares the responses | --num-generations 1
must be a multiple of --updates-per-rollout 2 | --prompts-per-step 5
must divide the 8 responses of an update | --micro-batch 3
not both | --micro-batch 2 --micro-tokens 100
must lie between 0 and 1 | --rho 1.5 | --clip-low 1.2 | --lr nan
must lie between 0 and 0.9 | --tau -1
must lie between 0.05 and 10 | --temperature 0
must be at least 1 | --steps 0 | --max-new-tokens 0
must be larger than 1 | --dual-clip 0.5 | --dual-clip nan
addition has the levels | --data '' --difficulty 0 | --data '' --difficulty 7
no such folder | --model /nowhere
no such file | --data /nowhere.jsonl
this model has the layers 1 to 3 | --bupo-steps 1 --bupo-layer 99
must be auto or a layer | --bupo-layer x
the first phase must be shorter than the run | --bupo-layer 1 --bupo-steps 2
a baseline replaces HAPO; add --algo dapo | --baseline archer
its own bounds | --algo dapo --clip-low 0.1 --baseline archer
the released | --released --temperature-form zscore
belongs to HAPO | --algo dapo --released | --algo grpo --rho 0.5 | --algo dapo --no-adaptive-clip
without --bupo-layer | --bupo-norm | --bupo-baseline freeze | --bupo-steps 1
without HAPO's adaptive temperature | --algo dapo --tau 0.3 | --no-adaptive-temperature --tau 0.3
without HAPO's adaptive temperature | --no-adaptive-temperature --temperature-form zscore
A, C and D | --no-adaptive-temperature --no-advantage-redistribution --no-adaptive-clip --rho 0.5
does nothing without --dynamic-sampling | --max-rounds 9
does nothing: the phases | --bupo-layer 2 --bupo-baseline layer-lr --bupo-steps 3
belongs to the built-in tasks | --difficulty 1 | --task countdown
no prompt fits the model's context | --max-new-tokens 100000
the shortest has | --max-new-tokens 250
is for one process | --offload --split-master
--offload and --split-master | --split-master --dtype float32
its loss scaling | --offload --dtype float16
the 4 responses to a prompt | --decode-rows 3
needs --bupo-layer | --diagnose-every 1
must be cpu, cuda, mps or xpu | --device gpu
this machine has | --threads 0 | --threads -1 | --threads 9999
no such CUDA device | --device cuda:99
longer than --max-new-tokens 6 | --overlong-buffer 9
needs --data | --data '' --eval-data x
"""


def test_bad_options_are_one_line(tmp_path):
    for line in BAD_OPTIONS.strip().splitlines():
        message, *cases = line.split(" | ")
        for case in cases:
            with pytest.raises(UserError) as error:
                run(tmp_path / "run", *shlex.split(case))
            said = str(error.value)
            last = [word for word in case.split() if word.startswith("--")][-1]
            flag = last.replace("--no-", "--")
            assert message in said and said.startswith(f"{flag} ") and "\n" not in said, case


def make_unusable_models(folder, good):
    """Six model folders, each of which cannot be trained for a reason of its own."""
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.BertConfig(**sizes, vocab_size=30)
    transformers.BertModel(config).save_pretrained(folder / "bert")
    heads = dict(num_key_value_heads=2, vocab_size=400)
    config = transformers.GraniteConfig(**sizes, **heads, logits_scaling=4.0)
    for name in ("scaled", "no-tokenizer", "cut", "short"):
        shutil.copytree(good, folder / name)
    transformers.GraniteForCausalLM(config).save_pretrained(folder / "scaled")
    (folder / "empty").mkdir()
    for file in (folder / "no-tokenizer").glob("tokenizer*"):
        file.unlink()
    content = (folder / "cut" / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(content[: len(content) // 2])
    config = json.loads((folder / "short" / "config.json").read_text(encoding="utf-8"))
    config |= {"num_hidden_layers": 4, "layer_types": None}
    (folder / "short" / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_models_that_cannot_be_used(tmp_path, tiny_folder):
    make_unusable_models(tmp_path, tiny_folder)
    for name, message in (
        ("scaled", "logits are more than hidden states times the output embedding"),
        ("bert", "is not a causal language model"),
        ("empty", "holds no config.json"),
        ("no-tokenizer", "its tokenizer cannot be read"),
        ("cut", "its weights cannot be read"),
        ("short", "weights are missing"),
    ):
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
    start = lambda: run(tmp_path / "run", "--model", broken)
    assert program(monkeypatch, start, "train.py") == 2
    assert "weights are damaged" in capsys.readouterr().err.splitlines()[-1]


def test_a_default_that_depends_on_others_gives_way_to_what_was_asked_for():
    parse = lambda *args: option_checks.parse(["--estimate", *args], "")
    assert parse().tau == 0.05 and parse().clip_high == 0.28
    assert parse("--algo", "grpo").clip_high == 0.2
    assert parse("--temperature-form", "zscore").tau == 0.1
    assert parse("--tau", "0").tau == 0 and parse("--clip-high", "0").clip_high == 0
    assert parse("--loss-mean", "fixed").loss_mean == "fixed"
    assert parse("--no-adaptive-clip").adaptive_clip is False
    assert all(field.metadata["help"] for field in dataclasses.fields(options.Options))


def test_estimate_needs_no_weights(capsys, tmp_path):
    shutil.copy(TINY / "config.json", tmp_path)
    train.main(["--model", str(tmp_path), "--estimate"])
    assert "peak" in capsys.readouterr().out


def test_a_random_reward_is_a_coin_that_no_answer_changes(opened):
    """Half of the answers are paid, by seed and step alone; held-out accuracy is of verdicts, of
    which half are right here."""
    coin = "--reward random --prompts-per-step 16 --num-generations 4".split()
    a, b, c = opened(*coin), opened(*coin), opened(*coin, "--seed", "9")
    for p in b.policy.parameters():
        p.data *= 1.5
    draws = [
        [train.generate_and_grade(step, 0, None, 1.0, run) for step in (1, 2)] for run in (a, b, c)
    ]
    first, second = draws[0]
    # of 64 coins: 0.2 is 3.2 of their standard deviations
    assert all(abs(batch.rewards.mean() - 0.5) < 0.2 for batch in draws[0])
    assert not torch.equal(first.rewards, second.rewards)
    for ours, others in zip(draws[0], draws[1]):
        assert ours.texts != others.texts and torch.equal(ours.rewards, others.rewards)
    other = draws[2][0]  # of another seed
    assert not torch.equal(other.rewards, first.rewards) and other.problems != first.problems
    assert not torch.equal(a.uniform(1, 0), c.uniform(1, 0))
    held_out = report.held_out(a, 0)
    assert held_out["eval_accuracy"] == held_out["eval_lenient"] == 0.5
