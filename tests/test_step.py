"""The parts of a step: batches, group rules, denominators, the reference model, records, curves."""

import dataclasses
import functools
import hashlib
import inspect
import os
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, Asks, changed_scores, drawn, given_batch, verdicts

import bupo
import hapo
import internals
import losses
import train
from common.errors import UserError
from common.threads import use_threads
from engine.engine import SingleProcess
from run import baselines, checkpoint, option_checks, report, setup
from run.batch import join, rollout_of, select
from run.setup import open_run
from tasks import Problem

# ----------------------------------------------------------------------------------------- batches


def a_batch(name, answers):
    """A batch of groups of two answers, none of its fields alike."""
    pairs = [ids for group in answers for ids in group]
    rollout = dataclasses.replace(
        rollout_of([[i] for i in range(len(pairs))], pairs),
        prompt=torch.arange(len(answers))[:, None],
        prompt_mask=torch.ones(len(answers), 1).bool(),
    )
    right = torch.tensor([len(ids) > 2 for ids in pairs])
    return train.Batch(
        problems=[Problem(f"{name}{p}", "1") for p in range(len(answers))],
        texts=[f"{name}{ids}" for ids in pairs],
        rollout=rollout,
        strict=~right,
        lenient=right,
        correct=right,
        rewards=right.float() - 0.5 * torch.arange(len(pairs)),
        has_reward_variance=~right,
        in_loss=right,
        loss_mask=rollout.mask,
    )


def test_select_and_join_carry_every_field_along():
    a, b = a_batch("a", [([5], [6, 6, 6]), ([7, 7], [8])]), a_batch("b", [([9], [4, 4, 4, 4])])
    both = join([a, b])
    assert [p.question for p in both.problems] == ["a0", "a1", "b0"]
    assert both.texts == a.texts + b.texts and both.rollout.mask.shape == (6, 4)
    picked = select(both, [2, 0])
    assert [p.question for p in picked.problems] == ["b0", "a0"]
    assert picked.texts == b.texts + a.texts[:2]
    assert picked.rollout.responses() == [[9], [4, 4, 4, 4], [5], [6, 6, 6]]
    assert picked.rewards.tolist() == [0, 0.5, 0, 0.5]
    for name in ("strict", "lenient", "correct", "has_reward_variance", "in_loss"):
        expected = torch.cat([getattr(b, name), getattr(a, name)[:2]])
        assert getattr(picked, name).tolist() == expected.tolist()
    assert picked.old is None
    # padded to the longest, rows in the new order
    assert picked.loss_mask.sum(1).tolist() == [1, 4, 1, 3]


@pytest.mark.parametrize("reward", ["lenient", "random"])
def test_equal_answers_are_paid_the_same(opened, monkeypatch, reward):
    """To one prompt, whatever said of them, coin or verdict: their gradients would cancel but for
    rounding, of which AdamW makes a whole step."""
    verdicts(monkeypatch, True, False, False, True)
    sizes = "--prompts-per-step 8 --num-generations 4 --algo grpo".split()
    run = opened("--reward", reward, *sizes)
    run.uniform = lambda step, attempt: torch.full((6, 32), 0.5)
    before = [p.detach().clone() for p in run.policy.parameters()]
    step = train.train_step(1, run)
    groups = [step.batch.texts[i : i + 4] for i in range(0, 32, 4)]
    assert all(len(set(group)) == 1 for group in groups)
    paid = step.batch.rewards.view(8, 4)
    assert torch.equal(paid, paid[:, :1].expand(8, 4))
    assert reward == "lenient" or 0 < paid.mean() < 1  # a coin for each prompt
    assert [update.outcome for update in step.updates] == ["no_signal"]
    assert all(torch.equal(p, q) for p, q in zip(before, run.policy.parameters()))


def test_equal_answers_are_those_to_one_prompt(opened, monkeypatch):
    verdicts(monkeypatch, True, False, False)
    monkeypatch.setattr(train, "response_texts", lambda answers, tokenizer: list("abab" * 4))
    batch = drawn(opened("--num-generations", "4"))
    paid = batch.correct.view(4, 4).int().tolist()
    # verdicts 1001 0010 0100 1001, of which a's first and b's first count
    assert paid == [[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1], [1, 0, 1, 0]]


def test_the_verdict_stays_apart_from_the_reward(opened, monkeypatch):
    verdicts(monkeypatch, True, False, False)
    run = opened("--overlong-buffer", "6")
    batch = drawn(run)
    assert batch.correct.tolist() == [True, False, False] * 2 + [True, False]
    penalty = losses.overlong_penalty(batch.rollout.lengths, 6, 6)
    assert torch.equal(batch.rewards, batch.correct.float() + penalty) and (penalty < 0).any()
    assert report.tally(batch)["correct"] == 3 == report.tally(batch)["strict"]
    assert report.tally(batch)["rewards"] == pytest.approx(batch.rewards.sum().item())


def test_rloo_by_hand():
    # rewards 1, 0, 0: each less the mean of the two others; equal rewards give exactly 0
    rewards = torch.tensor([1.0, 0, 0, 0.1, 0.1, 0.1])
    advantages = losses.rloo_advantages(rewards, 3)
    assert advantages.tolist() == [1.0, -0.5, -0.5, 0, 0, 0]
    assert (losses.rloo_advantages(torch.tensor([3.0, 1.0]), 1) == 0).all()


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_a_rule_reaches_every_arm(opened, monkeypatch, name):
    verdicts(monkeypatch, True, False, False, False, True, True, False, False)
    for arm in ("none", "entropy-advantage", "edge"):
        run = opened("--algo", "dapo", "--advantage", name, "--baseline", arm)
        batch = train.train_step(1, run).batch
        mask, entropy = batch.loss_mask, batch.full.entropy
        advantages = getattr(losses, f"{name}_advantages")(batch.rewards, 2)
        if arm == "edge":
            advantages *= baselines.edge_weight((entropy * mask).sum(1) / mask.sum(1), 2)
        expected = advantages[:, None] * mask
        if arm == "entropy-advantage":
            expected = baselines.entropy_advantage(expected, entropy)
        torch.testing.assert_close(batch.advantages, expected)


def test_a_rule_beside_hapos_own_is_one_line():
    with pytest.raises(UserError, match="--advantage rloo: HAPO's B is a group rule itself"):
        option_checks.parse(["--estimate", "--advantage", "rloo"], "")
    option_checks.parse(["--estimate", "--advantage", "rloo", "--no-token-group-average"], "")


def test_the_share_of_needed_tokens_by_hand(opened, monkeypatch):
    """Two groups of answers in one pass: prompts once, answers without their last token."""
    verdicts(monkeypatch, True, False)
    run = opened("--prompts-per-step", "2")
    step = train.train_step(1, run)
    lengths, prompts = step.batch.rollout.lengths, step.batch.rollout.prompt_mask.sum(1)
    needed = int(lengths.sum()) - 4 + int(prompts.sum())
    packed = run.engine.pack(step.batch.rollout, [0, 1, 2, 3]).ids.numel()
    assert report.useful_token_fraction(step.updates, step.batch, run) == needed / packed > 0.8
    monkeypatch.setattr(run.engine, "pack", internals.unpacked)
    width = int((prompts.repeat_interleave(2) + lengths).max()) - 1
    share = report.useful_token_fraction(step.updates, step.batch, run)
    assert share == needed / (4 * width) < 0.7
    assert report.useful_token_fraction([], step.batch, run) == 1


def test_under_dynamic_sampling_as_statistics_are_of_all_responses_drawn(opened, monkeypatch):
    """Two rounds of four groups, of which one has variance: the step trains on four groups, and the
    next sampler's statistics are of all eight."""
    verdicts(monkeypatch, True, False, *[False] * 14)
    run, rounds = opened("--dynamic-sampling", "--max-rounds", "2"), []
    draw = train.generate_and_grade
    keep = lambda *args: rounds.append(draw(*args)) or rounds[-1]
    monkeypatch.setattr(train, "generate_and_grade", keep)
    batch = train.train_step(1, run).batch
    assert len(rounds) == 2 and len(batch.texts) == 8
    entropies = torch.cat([part.rollout.entropy[part.rollout.mask] for part in rounds])
    expected = hapo.entropy_stats(entropies, torch.ones_like(entropies), 0.8)
    torch.testing.assert_close(torch.stack(run.sampler_stats), torch.stack(expected))


@pytest.mark.parametrize("mean", ["token", "sequence", "fixed"])
def test_groups_that_stayed_dead_are_not_in_the_denominator(opened, monkeypatch, mean):
    """One live group of four: the update's loss is that group's alone, whatever the mean."""
    verdicts(monkeypatch, True, False, *[False] * 6)
    run = opened(*f"--loss-mean {mean} --algo dapo --dynamic-sampling --max-rounds 1".split())
    batch = drawn(run)
    assert report.tally(batch)["zero_std"] == 3
    batch.rollout.mask[0, 4:] = False  # a shorter response: the three means differ
    given_batch(monkeypatch, batch)
    shift = 0.1 * torch.arange(8)[:, None]  # so that the loss is not 0
    changed_scores(monkeypatch, run, lambda s, model: s._replace(logp=s.logp + shift))
    step = train.train_step(1, run)
    batch, (update,) = step.batch, step.updates
    assert batch.in_loss.tolist() == [True, True] + [False] * 6
    counts = report.clip_counts([update], batch)
    assert update.outcome == "applied" and counts["tokens"] == batch.rollout.lengths[:2].sum()
    ratio = torch.exp(-0.1 * torch.arange(2.0))[:, None]
    of_live = losses.clipped_surrogate(ratio, batch.advantages[:2], 0.2, 0.28), batch.loss_mask[:2]
    means = dict(token=losses.masked_mean, sequence=losses.sequence_mean)
    means["fixed"] = functools.partial(losses.fixed_length_mean, length=6)
    expected = means[mean](*of_live).item()
    assert update.loss == pytest.approx(expected, rel=1e-4) and abs(expected) > 1e-3


def test_without_kl_there_is_no_reference_and_a_dead_update_moves_nothing(opened, monkeypatch):
    verdicts(monkeypatch, True, False)
    run = opened("--algo", "dapo")
    assert run.reference is None
    assert train.train_step(1, run).updates[0].outcome == "applied"  # AdamW has its moments
    verdicts(monkeypatch, False)
    before = [p.detach().clone() for p in run.policy.parameters()]
    (dead,) = train.train_step(2, run).updates
    assert dead == train.Update() and dead.outcome == "no_signal"
    assert all(torch.equal(a, b) for a, b in zip(before, run.policy.parameters()))


def test_kl_adds_its_term_and_wakes_an_update_whose_groups_are_dead(opened, monkeypatch):
    verdicts(monkeypatch, False)
    run = opened("--algo", "dapo", "--kl", "0.5")
    with torch.no_grad():
        run.reference.model.norm.weight.mul_(1.5)
    step = train.train_step(1, run)
    batch, mask = step.batch, step.batch.loss_mask
    expected = 0.5 * losses.kl_k3(batch.old.logp, batch.reference.logp)[mask].mean().item()
    assert step.updates[0].outcome == "applied" and expected > 1e-3
    assert step.updates[0].loss == pytest.approx(expected, rel=1e-3)


def test_a_run_of_an_older_version_is_one_line(opened, tmp_path):
    """A new option has its default; a checkpoint that lacks something is refused."""

    def change(file, old, new):
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, new), encoding="utf-8")
        return hashlib.sha256(file.read_bytes()).hexdigest()

    run = opened()
    checkpoint.save(run, 0)
    run.lock.lock.release()
    change(run.out / "config.json", '"plain": false,', "")
    old = run.out / "checkpoint-0" / "run.json"
    before = hashlib.sha256(old.read_bytes()).hexdigest()
    change(old.parent / "checksums.json", before, change(old, "sampler_stats", "stats"))
    again = option_checks.parse(["--resume", "--out", str(run.out)], "")
    assert again.plain is False
    with pytest.raises(UserError, match="older version of this code .no sampler_stats") as error:
        open_run(again, SingleProcess("cpu"))
    assert "\n" not in str(error.value)


ROWS = """
{"step": 0, "eval_accuracy": 0.1, "eval_greedy": 0.2, "eval_error": null}
{"step": 1, "phase": "internal", "layer": 2, "pivot": -1, "h_max": 1, "h_min": -3, "reward": 0.5,\
 "internal_entropy": 0.3, "entropy": 0.4, "response_length": 9, "grad_norm": 1.5,\
 "zero_std_groups": 1, "groups": 4}
{"step": 2, "phase": "full", "reward": null, "entropy": null, "response_length": 8,\
 "grad_norm": 2.5, "zero_std_groups": 2, "groups": 4}
"""


@pytest.mark.optional("matplotlib")
def test_every_panel_is_drawn(tmp_path, monkeypatch):
    """Numbers that are missing leave a gap; more runs than colours have each their own."""
    import matplotlib.pyplot as plt

    from scripts import curves

    (tmp_path / "metrics.jsonl").write_text(ROWS.strip(), encoding="utf-8")
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    monkeypatch.setitem(plt.rcParams, "axes.prop_cycle", plt.cycler(color=["blue", "red"]))
    picture = curves.plot([tmp_path] * 3)
    assert picture == tmp_path / "curves.png" and picture.stat().st_size > 10_000
    for (title, _), panel in zip(curves.PANELS, figures[0].axes):
        assert panel.get_title() == title and panel.lines, title
    assert len({str(line.get_color()) for line in figures[0].axes[2].lines}) == 3
    monkeypatch.undo()
    plt.close(figures[0])


@pytest.mark.optional("matplotlib")
def test_stretches_of_steps():
    from scripts.curves import spans

    assert spans([1, 2, 3, 7, 10, 11]) == [(1, 3), (7, 7), (10, 11)] and spans([]) == []


def test_curves_without_matplotlib_say_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "scripts" / "curves.py"), run_name="__main__")
    assert stopped.value.code == 2 and "pip install matplotlib" in capsys.readouterr().err
    with pytest.raises(ImportError):  # the end of a run goes on without the picture
        runpy.run_path(str(ROOT / "scripts" / "curves.py"), run_name="scripts.curves")


HOLD = f"""
import filelock, os, pathlib, sys, time
LOCK, WRITER = {setup.LOCK!r}, {setup.WRITER!r}
{inspect.getsource(setup.lock)}
held = lock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.programs
def test_a_folder_has_one_writer(tmp_path):
    """Another process's lock is refused by name, and is gone once that process is killed."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]  # without run.setup's other imports
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} is writing to this folder"):
            setup.lock(tmp_path)
    finally:
        holder.kill()  # -9
        holder.wait()
    with setup.lock(tmp_path):
        assert (tmp_path / ".writer").read_text(encoding="utf-8") == f"{os.getpid()}\n"


def test_a_run_holds_the_lock_of_its_folder_until_it_ends(opened):
    run = opened()
    with pytest.raises(UserError, match=f"process {os.getpid()} is writing to this folder"):
        open_run(dataclasses.replace(run.options, resume=True), SingleProcess("cpu"))
    run.lock.lock.release()
    setup.lock(run.out).lock.release()


def test_the_reference_is_scored_without_an_entropy(opened, monkeypatch):
    """Nobody reads it; the policy's own is measured once, and not again in the update."""
    run, asked = opened("--kl", "0.1"), []
    real = run.engine.token_logprobs

    def spy(model, rollout, rows, layer, measure_entropy=True):
        asked.append((model is run.reference, measure_entropy))
        return real(model, rollout, rows, layer, measure_entropy)

    monkeypatch.setattr(run.engine, "token_logprobs", spy)
    train.train_step(1, run)
    assert asked == [(False, True), (True, False), (False, False)]


@pytest.mark.programs
def test_threads_spin_briefly_unless_told_otherwise():
    """Set before torch is imported, and only where the user has set nothing."""
    for program in ("train", "evaluate", "internals"):
        text = (ROOT / f"{program}.py").read_text(encoding="utf-8")
        assert text.index("import common.threads") < text.index("\nimport torch")
    say = "import os, common.threads; print(os.environ.get('GOMP_SPINCOUNT'))"
    base = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for given, expected in (
        ({}, "4000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ):
        command = [sys.executable, "-c", say]
        done = subprocess.run(command, cwd=ROOT, env=base | given, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr


def test_a_busy_machine_is_named(monkeypatch):
    """Not where it is idle, nor where one thread waits for nobody."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for threads, load, named in ((2, 0.2, False), (2, 2.1, True), (1, 2.1, False)):
        said = []
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0), raising=False)
        use_threads(None, said.append)
        assert ["--threads 1" in text for text in said] == [True] * named, (threads, load)


def test_waits_do_not_grow_with_the_passes(opened, monkeypatch):
    """Behind the answers: updates of one pass ask as much as updates of two."""
    verdicts(monkeypatch, True, False)
    asked = []
    for more in ([], ["--micro-batch", "2"]):
        run = opened("--prompts-per-step", "8", "--updates-per-rollout", "4", *more)
        before, batch = report.weight_sample(run), drawn(run)
        with monkeypatch.context() as patch, Asks() as asks:
            given_batch(patch, batch)
            step = train.train_step(1, run)
            metrics = report.step_metrics(step, before, run)
        assert metrics["updates"] == 4
        assert len(step.updates[0].micro_batches) == (2 if more else 1)
        asked.append(asks.count)
    assert asked[0] == asked[1] < 25


def test_processes_diagnose_as_many_answers_as_the_widest_allows(opened, monkeypatch):
    """Every pass of a sharded model is a collective call: all make the same number of them."""
    run = opened("--bupo-layer", "2", "--bupo-steps", "1", "--diagnose-every", "1", "--steps", "2")
    train.train_step(1, run)
    width = torch.tensor(internals.DIAGNOSED_TOKENS // 3)
    monkeypatch.setattr(run.dist, "all_reduce_max", lambda own: width)
    asked = []
    names = ("layer_similarity", "internal_entropy", "perplexity")
    for room, name in (*((internals, n) for n in names), (bupo, "internal_entropy")):
        real = getattr(room, name)
        spy = lambda *given, real=real, **more: (asked.append(given[-1]), real(*given, **more))[1]
        monkeypatch.setattr(room, name, spy)
    report.diagnose(run)
    bupo.measure_boundary(run.policy, *run.diagnosed, run.vocab_size, run.dist)
    assert asked == [3] * 4


# What torch leaves open: the gradient of these at a bound, or among equal values, is not documented
# and has changed from version to version.
OPEN = "Clamp Maximum Minimum Amax Amin Max Min Sort Topk Kthvalue Quantile Median".split()
STEPS = """
--dual-clip 3 --kl 0.1
--plain --dual-clip 3
--algo dapo --baseline gspo
--algo dapo --baseline cispo
--algo dapo --baseline entropy-advantage
--bupo-layer 2 --bupo-steps 1
"""


@pytest.mark.parametrize("options", STEPS.strip().splitlines())
def test_no_gradient_passes_an_operation_whose_ties_torch_leaves_open(opened, monkeypatch, options):
    """Of all operations between the weights and the loss of a step, none is one of OPEN."""
    verdicts(monkeypatch, True, False)
    run, passed = opened(*options.split()), set()
    backward = run.engine.backward

    def record(loss):
        waiting = [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in passed:
                passed.add(node)
                waiting += [following for following, _ in node.next_functions]
        backward(loss)

    monkeypatch.setattr(run.engine, "backward", record)
    train.train_step(1, run)
    names = {type(node).__name__.partition("Backward")[0] for node in passed}
    assert len(names) > 10 and not names & set(OPEN)
