"""Alarms: each check at its threshold, on hundreds of recorded runs, in a run, and long after."""

import json
import random
import re

import pytest
from conftest import ROOT, TINY, program, sharpened, verdicts

import losses
import train
from run import checkpoint, first_look, report
from run.alarms import find_alarms
from run.option_checks import parse
from run.setup import open_run
from scripts import diagnose

NAMES = set(re.findall(r'Alarm\("([\w-]+)"', (ROOT / "run/alarms.py").read_text(encoding="utf-8")))
HEALTHY = {
    "groups": [10] * 9,
    "zero_std_groups": [1] * 9,
    "clipped_ratio": [0.0] * 9,
    "response_length": [10.0] * 9,
    "sampler_gap": [1e-3] * 9,
    "loss_off": [1e-7] * 9,
    "zero_entropies": [0.0] * 9,
    "ratio_off_before_update": [0.0] * 9,
}


def rows_of(correct, reward=None, **columns):
    """Lines of metrics.jsonl: six healthy steps with some columns changed."""
    columns = {**HEALTHY, "correct": correct, "reward": reward or correct, **columns}
    names, count = list(columns), len(correct)
    values = zip(*(columns[name][:count] for name in names), strict=True)
    return [{"step": n, **dict(zip(names, row))} for n, row in enumerate(values, 1)]


def found(*args, own_reward=True, **columns):
    """{name: step} of the alarms of such steps."""
    alarms = find_alarms(rows_of(*args, **columns), own_reward)
    assert len({alarm.name for alarm in alarms}) == len(alarms)
    return {alarm.name: alarm.step for alarm in alarms}


STEADY = [0.4, 0.4, 0.4, 0.4, 0.4, 0.4]


def test_a_healthy_run_has_no_alarm():
    assert found(STEADY) == {}
    assert found([0.2, 0.3, 0.4, 0.5, 0.6, 0.7]) == {}


MANY = dict(groups=[1000] * 9)  # with so many groups every fall is larger than chance


def test_collapse_is_half_of_the_best_mean_of_three_steps():
    # means of three: 0.4, 0.3, 0.203 and 0.4, 0.3, 0.197: half of the best is 0.2
    assert found([0.4, 0.4, 0.4, 0.1, 0.11], **MANY) == {}
    assert found([0.4, 0.4, 0.4, 0.1, 0.09], **MANY) == {"collapse": 5}
    assert found([0.09, 0.09, 0.09, 0.0, 0.0, 0.0], **MANY) == {}  # never above 0.1
    # the best need not be the first: means 0.2 to 0.6 to 0.25
    assert found([0.2] * 3 + [0.6] * 3 + [0.25] * 3, **MANY) == {"collapse": 9}
    # after a collapse responses may run to the cap: it is the collapse that is told
    fallen = found([0.4, 0.4, 0.4, 0.0, 0.0, 0.0], clipped_ratio=[0, 0, 0, 0.5, 0.5, 0.5], **MANY)
    assert fallen == {"collapse": 5}


def test_a_fall_that_chance_allows_is_no_collapse():
    # 0.6 to 0.2: the largest variance between them is that of 0.5, 1/4. Five deviations are
    # 5 (1/4 / n)^0.5 for n groups in three steps: 0.4 for n = 39.06
    fall = [0.6, 0.6, 0.6, 0.2, 0.2, 0.2]
    assert found(fall, groups=[13] * 6) == {}
    assert found(fall, groups=[14] * 6) == {"collapse": 6}
    # thirty groups of which more than nine tenths have no variance are no chance
    assert found(fall, groups=[10] * 6, zero_std_groups=[1, 1, 1, 10, 9, 9]) == {"collapse": 6}
    assert found(fall, groups=[10] * 6, zero_std_groups=[1, 1, 1, 9, 9, 9]) == {}


@pytest.mark.parametrize("groups, correct", [(32, 0.15), (16, 0.3), (4, 0.3)])
def test_a_long_run_that_stays_as_it_is_has_no_alarm(groups, correct):
    """300 steps of prompts whose pass rates have a beta distribution: lows and highs by chance."""
    rows, rng = [], random.Random(0)
    for step in range(1, 301):
        rates = [rng.betavariate(1.5 * correct, 1.5 * (1 - correct)) for _ in range(groups)]
        right = [sum(rng.random() < rate for _ in range(8)) for rate in rates]
        share = sum(right) / groups / 8
        zero = sum(count in (0, 8) for count in right)
        counts = {"groups": groups, "zero_std_groups": zero}
        rows.append({"step": step, "reward": share, "correct": share, **counts})
    assert find_alarms(rows) == []


def test_a_long_phase_1_is_65_percent_of_the_best():
    # means of three: 0.4, 0.33, 0.263 and 0.4, 0.33, 0.257; 65 % of the best is 0.26
    internal = dict(phase=["internal"] * 6, layer=[3] * 6)
    assert found([0.4, 0.4, 0.4, 0.19, 0.2], **internal) == {}
    assert found([0.4, 0.4, 0.4, 0.19, 0.18], **internal) == {"long-phase-1": 5}
    # what follows from it is not told again
    assert found([0.4, 0.4, 0.4, 0.0, 0.0, 0.0], **internal) == {"long-phase-1": 5}


def test_groups_without_variance_are_too_hard_or_too_easy_a_task():
    dead = [9, 8, 8, 9, 8, 8]  # of ten, 83 % over three steps
    assert found([0.0] * 6, zero_std_groups=dead) == {"too-hard": 3}
    assert found([0.95] * 6, zero_std_groups=dead) == {"too-easy": 3}
    assert found([0.0] * 6, zero_std_groups=[8] * 6) == {}  # 80 %: not above
    assert found([0.5] * 6, zero_std_groups=dead) == {}  # neither
    # after a collapse no group has variance: it is the collapse that is told
    fallen = found([0.4, 0.4, 0.4, 0.0, 0.0, 0.0], zero_std_groups=[1, 1, 1, 10, 10, 10])
    assert fallen == {"collapse": 6}


def test_cut_responses_are_a_cap_or_grow():
    assert found(STEADY, clipped_ratio=[0.19] * 6) == {}
    assert found(STEADY, clipped_ratio=[0.3] * 6) == {"cap": 6}
    assert found(STEADY[:5], clipped_ratio=[0.3] * 6) == {}
    # a model that learns to end in time: means of correct responses 0.3 to 0.46, to 0.44
    cut = dict(clipped_ratio=[0.9, 0.8, 0.7, 0.4, 0.3, 0.3])
    assert found([0.3, 0.3, 0.3, 0.46, 0.46, 0.46], **cut) == {}
    assert found([0.3, 0.3, 0.3, 0.44, 0.44, 0.44], **cut) == {"cap": 6}
    assert found([0.1, 0.1, 0.1, 0.19, 0.19, 0.19], **cut) == {"cap": 6}  # by less than 0.1
    assert found([0.0, 0.0, 0.0, 0.2, 0.2, 0.2], **cut) == {}
    assert found([0.6, 0.6, 0.6, 0.8, 0.8, 0.8], **cut) == {}  # half of the way to 1
    for correct in (STEADY, [0.2, 0.2, 0.2, 0.5, 0.5, 0.5]):
        assert found(correct, clipped_ratio=[0, 0, 0, 0.1, 0.3, 0.4]) == {"growing": 6}


def test_a_reward_that_rises_without_correct_responses():
    falling, rising = [0.5, 0.5, 0.5, 0.4, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert found(falling, rising) == {"format-reward": 5}  # means 0.5 to 0.4
    longer = dict(response_length=[10, 10, 10, 20, 20, 20])
    assert found(falling, rising, **longer) == {"length-reward": 5}
    # without another reward than the verdict there is nothing to hack
    assert found(falling, rising, own_reward=False) == {}
    assert found(rising, [x + 1 for x in rising]) == {}  # both rise
    # the reward doubles, and the share of correct responses does not move
    assert found(STEADY, [0.1, 0.1, 0.1, 0.3, 0.3, 0.3]) == {"format-reward": 5}
    # 1 for a correct response and -1 for a wrong one: near 0, gains are large, but it is correct
    mixed = [0.45, 0.48, 0.47, 0.5, 0.52, 0.55]
    assert found(mixed, [2 * x - 1 for x in mixed]) == {}


@pytest.mark.parametrize(
    "column, name, below, above",
    [
        ("sampler_gap", "sampler", 0.01, 0.011),
        ("loss_off", "loss-mean", 1e-3, 1.1e-3),
        ("zero_entropies", "entropy-formula", 0.01, 0.011),
        ("ratio_off_before_update", "scoring", 1e-3, 1.1e-3),
    ],
)
def test_a_single_step_shows_what_is_computed_wrongly(column, name, below, above):
    assert found(STEADY, **{column: [below] * 6}) == {}
    assert found(STEADY, **{column: [0, above, above, 0, 0, 0]}) == {name: 2}


def test_at_a_low_temperature_true_entropies_are_0():
    zero = dict(zero_entropies=[0.25] * 6)
    assert found(STEADY, temperature=[0.1] * 6, **zero) == {}
    assert found(STEADY, temperature=[1.0] * 6, **zero) == {"entropy-formula": 1}


def test_runs_of_older_versions_and_bad_steps_are_read():
    rows = [{"step": n, "reward": 0.3} for n in range(1, 7)]
    assert find_alarms([{"step": 0, "pass_rate": 0.3}, *rows, {"step": 7, "skipped": "NaN"}]) == []
    # whatever column is missing, and from whichever step on
    whole = rows_of(STEADY, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], clipped_ratio=[0.5] * 6)
    for name in set(whole[0]) - {"step", "reward"}:
        for start in range(6):
            cut = [{k: x for k, x in row.items() if k != name} for row in whole[start:]]
            find_alarms(whole[:start] + cut)
            find_alarms(cut + whole[:start])
    find_alarms([row | {"groups": 0, "zero_std_groups": 0} for row in whole])


# ---------------------------------------------------------------------------------- recorded runs

# runs of the evidence file whose reward falls by more than half, or which train BuPO's phase 1 for
# a quarter of the run or longer: not healthy
FAILING = re.compile(r"-0\.0008-|bupo-[24]x|bupo-watched|one-layer-whole|cispo@0\.0004-10[36]")


def recorded(run):
    steps = re.search(r"--bupo-steps (\d+)", run["options"])
    last = int(steps.group(1)) if steps else 0
    return [
        {
            "step": step,
            "reward": reward,
            "phase": "internal" if step <= last else "full",
            "groups": 16,  # 8 with the real model; how many had no variance was not kept
            "zero_std_groups": 0,
        }
        for step, reward in run["reward"]
    ]


def test_no_alarm_in_the_healthy_runs_of_the_evidence_file():
    lines = (ROOT / "experiments" / "claims_runs.jsonl").read_text(encoding="utf-8").splitlines()
    runs = [json.loads(line) for line in lines]
    healthy = [run for run in runs if not FAILING.search(run["name"])]
    assert len(healthy) == 665  # as docs/troubleshooting.md says, and so are the numbers below
    sounded = [run["name"] for run in healthy if find_alarms(recorded(run))]
    assert sounded == []
    long = [find_alarms(recorded(run)) for run in runs if run["name"].startswith("bupo-4x-")]
    assert sum(bool(alarms) and alarms[0].name == "long-phase-1" for alarms in long) == 10
    fast = [find_alarms(recorded(run)) for run in runs if "-0.0008-" in run["name"]]
    assert len(fast) == 16 and sum(map(bool, fast)) == 14
    longer = [find_alarms(recorded(run)) for run in runs if run["name"].startswith("bupo-2x-")]
    assert len(longer) == 10 and sum(map(bool, longer)) == 3


# -------------------------------------------------------------------------------------- in a run


def test_an_alarm_is_printed_once_and_not_again_after_a_resume(opened, capsys):
    run = opened("--steps", "5")
    for step in (1, 2):
        metrics, bad = train.guarded_step(step, run)
        report.record(step, metrics | {"ratio_off_before_update": 0.5}, bad, run)
    said = capsys.readouterr().out
    assert said.count("alarm at step 1, scoring: before the first update a ratio differs") == 1
    assert said.count("alarm at") == 1 and "See docs/troubleshooting.md#scoring" in said
    assert said.count("more steps like this one take") == 1
    checkpoint.save(run, 2)
    run.lock.lock.release()
    again, step = open_run(parse(["--resume", "--out", str(run.out)], ""), run.dist)
    assert step == 2 and again.known_alarms == {"scoring"} and again.history.count == 2
    again.lock.lock.release()


@pytest.mark.parametrize("mean", ["token", "sequence", "fixed"])
def test_a_loss_is_compared_with_the_mean_over_its_mini_batch(opened, monkeypatch, mean):
    verdicts(monkeypatch, True, False)
    # with mechanism C the loss is not 0 before the first update
    run = sharpened(opened("--micro-batch", "2", "--loss-mean", mean, "--lr", "1e-5"))

    def off():
        done = train.train_step(1, run)
        assert len(done.updates[0].micro_batches) > 1
        return report.loss_off(done.updates, done.batch, run)

    assert off() < 1e-6
    name = {"token": "masked_mean", "sequence": "sequence_mean", "fixed": "fixed_length_mean"}[mean]
    real = getattr(losses, name)
    monkeypatch.setattr(losses, name, lambda values, mask, *rest: real(values, mask, *rest[:-1]))
    assert off() > 1e-2


def test_entropies_of_zero_are_counted(opened):
    run = opened()
    step = train.train_step(1, run)
    batch = step.batch
    assert report.signal_metrics(batch, None, run)["zero_entropies"] == 0
    valid = batch.rollout.mask.nonzero()[:3]
    entropy = batch.full.entropy.clone()
    for (row, place), value in zip(valid.tolist(), (0.0, -1e-3, 1e-9)):
        entropy[row, place] = value
    batch.full = batch.full._replace(entropy=entropy)
    metrics = report.signal_metrics(batch, None, run)
    tokens = int(batch.rollout.mask.sum())
    assert metrics["zero_entropies"] == pytest.approx(2 / tokens)
    assert metrics["at_floor"] == pytest.approx(3 / tokens)


def test_the_expected_share_of_groups_with_variance_by_hand():
    # rates 1/4 and 3/4 of four samples: the spread 1/16 is 1/4 of 1/2 * 1/2, all of it chance, so
    # all prompts are alike, and two responses differ half of the time
    assert first_look.share_with_variance([0.25, 0.75], 4, 2) == pytest.approx(0.5, abs=1e-3)
    # rates 0, 1/2, 1/2, 1 of four: spread 1/8, alike (1/2 - 1/4) / (3/4) = 1/3, so Beta(1, 1):
    # E[p^g] = 1 / (g + 1)
    for size in (2, 3, 8):
        share = first_look.share_with_variance([0.0, 0.5, 0.5, 1.0], 4, size)
        assert share == pytest.approx(1 - 2 / (size + 1))
    assert first_look.share_with_variance([0.0, 0.0], 4, 8) == 0
    assert first_look.share_with_variance([1.0, 1.0], 4, 8) == 0


def test_a_time_is_said_in_a_unit_that_fits():
    assert [report.duration(x) for x in (7.4, 119, 130, 7300)] == [
        "7 s", "119 s", "2 minutes", "2.0 hours",
    ]  # fmt: skip


# ---------------------------------------------------------------------------- doctor and diagnose

DOCTOR = "--doctor --prompts-per-step 4 --num-generations 4 --updates-per-rollout 1 --device cpu"


def test_doctor_takes_a_step_and_keeps_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [*DOCTOR.split(), "--model", TINY, "--eval-prompts", "4"]
    assert program(monkeypatch, train.main, "train.py", *arguments) == 0
    said = capsys.readouterr().out
    for part in ("torch ", "self-check passed", "expected: with --num-generations 4", "one step"):
        assert part in said, part
    assert "chat template" in said and "nothing is wrong" in said
    assert list(tmp_path.iterdir()) == [] and "already holds a run" not in said
    write_run(tmp_path / "taken", [])
    arguments += ["--out", tmp_path / "taken"]
    assert program(monkeypatch, train.main, "train.py", *arguments) == 0
    assert f"note: {tmp_path / 'taken'} already holds a run" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "taken").iterdir()) == [
        "config.json", "metrics.jsonl",
    ]  # fmt: skip


def test_doctor_ends_with_2_where_something_is_wrong(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [*DOCTOR.split(), "--model", TINY, "--eval-prompts", "4", "--difficulty", "4"]
    assert program(monkeypatch, train.main, "train.py", *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--doctor: the model is almost never correct" in error
    assert list(tmp_path.iterdir()) == []


def write_run(folder, rows, **options):
    folder.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(options), encoding="utf-8")
    return folder


def test_diagnose_names_alarm_and_line_of_the_table(monkeypatch, tmp_path, capsys):
    rows = rows_of([0.4, 0.4, 0.4, 0.0, 0.0, 0.0], **MANY)
    run = write_run(tmp_path / "run", [{"step": 0, "pass_rate": 0.4}, *rows])
    assert program(monkeypatch, diagnose.main, "diagnose.py", run) == 0
    said = capsys.readouterr().out
    assert "6 steps" in said and "share of correct responses 0.4 to 0" in said
    assert "alarm at step 5, collapse" in said
    assert "\n    the reward rises, or starts well, then everything collapses; " in said


def test_diagnose_of_a_healthy_run_and_of_bad_steps(monkeypatch, tmp_path, capsys):
    run = write_run(tmp_path / "run", rows_of(STEADY))
    assert program(monkeypatch, diagnose.main, "diagnose.py", run) == 0
    assert "no alarm" in capsys.readouterr().out
    bad = write_run(tmp_path / "bad", [{"step": 3, "skipped": "a loss is NaN"}])
    assert program(monkeypatch, diagnose.main, "diagnose.py", bad) == 0
    assert "alarm at step 3, nan: a bad step: a loss is NaN" in capsys.readouterr().out


def test_diagnose_says_bad_input_in_one_line(monkeypatch, tmp_path, capsys):
    for folder, message in (
        (tmp_path / "none", "no such file; name the folder of a run"),
        (write_run(tmp_path / "empty", []), "no step yet"),
    ):
        assert program(monkeypatch, diagnose.main, "diagnose.py", folder) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error


def test_every_alarm_has_a_section_and_a_line_of_the_table():
    text = diagnose.TABLE.read_text(encoding="utf-8")
    assert len(NAMES) == 12
    for name in NAMES | {"nan"}:
        assert f"\n## {name}\n" in text, name
        assert diagnose.table_line(name).count("; ") >= 3
    titles = re.findall("\n## (.*)", text)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\(#([\w-]+)\)", text)) <= anchors
