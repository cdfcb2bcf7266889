"""The statistics of experiments/claims.py, by hand; and that it runs what is missing, no more."""

import json
import pathlib
import re
import sys
import types

import pytest
import torch
from conftest import ROOT

from common.errors import UserError
from run import option_checks


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import claims
    import claims_page
    import claims_pilot
    import claims_plan
    import claims_runs
    import paired

    return types.SimpleNamespace(
        main=claims, page=claims_page, pilot=claims_pilot, plan=claims_plan, runs=claims_runs,
        paired=paired, planned=claims_runs.read_json(claims_plan.PLAN),
    )  # fmt: skip


def test_statistics_by_hand(tools):
    paired = tools.paired
    # mean 2.5, deviation sqrt(5 / 3) = 1.2910, t of 3 degrees 3.182: half width 2.0540;
    # of 16 sign patterns only + + + + and - - - - reach a sum of 10
    e = paired.effect([1.0, 2.0, 3.0, 4.0])
    assert e == pytest.approx((2.5, 0.4460, 4.5540, 2 / 16), abs=1e-4)
    assert paired.sign_flip([1, 1, -1]) == 1  # sums of 1 and of 3: none is smaller than 1
    assert paired.sign_flip([3, 1]) == 0.5  # 4 and -4 of 4, 2, -2, -4
    assert paired.sign_flip([0.1] * 10) == 2 / 1024
    assert paired.sign_flip([0.1] * 8) == 2 / 256
    # Holm: .01 x 3, .03 x 2, and .04 x 1 = .04 raised to the .06 before it
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.holm([0.9, 0.8]) == [1.0, 1.0]
    # 1 = 1 counts half, 1 < 3, 2 > 1, 2 < 3
    assert paired.probability_of_improvement([1, 2], [1, 3]) == 1.5 / 4


# the claim's bar, mean, half of the interval, p | verdict
VERDICTS = """
smallest 0.01       0.05  0.01  0.01  | holds
smallest 0.01       0.05  0.06  0.20  | not decided
smallest 0.01       0.005 0.001 0.01  | contradicted: too small to matter
smallest 0.01      -0.05  0.02  0.01  | contradicted: the reverse
smallest 0.01      -0.05  0.02  0.06  | contradicted
smallest 0.01      -0.05  0.08  0.30  | not decided
smallest 0.01      -0.01  0.015 0.04  | contradicted
at_most 0.03        0.01  0.01  1     | holds
at_most 0.03        0.01  0.03  1     | not decided
at_most 0.03        0.06  0.02  1     | contradicted
no_worse_by 0.01    0.0   0.005 1     | holds
no_worse_by 0.01    0.0   0.02  1     | not decided
no_worse_by 0.01   -0.04  0.02  1     | contradicted
none 0              0.1   0.01  0.002 | a difference
none 0              0.1   0.2   0.4   | no difference
start 0            -0.2   0.01  0.002 | nothing learned, much lost
start 0             0.2   0.01  0.002 | something learned
start 0             0.0   0.01  0.9   | nothing learned
"""


def test_verdicts_of_a_table_by_hand(tools):
    page = tools.page
    for line in VERDICTS.strip().splitlines():
        given, _, expected = line.partition(" | ")
        bar, *numbers = given.split()
        limit, mean, half, p = map(float, numbers)
        pair = ["random", "start"] if bar == "start" else ["hapo", "dapo"]
        claim = {} if limit == 0 else {bar: limit}
        effect = tools.paired.Effect(mean, mean - half, mean + half, 0.0)
        reverse = expected.endswith("the reverse")
        assert page.judge(claim, pair, effect, p) == (expected.partition(":")[0], reverse), line
    assert page.whole(["holds", "not decided", "contradicted"]) == "contradicted"
    assert page.whole(["holds", "not decided"]) == "not decided"
    assert page.whole(["holds"] * 2) == "holds"
    assert page.said("contradicted", True) == "contradicted: the reverse"


def test_a_run_s_measures(tools):
    run = {"eval_accuracy": [[0, 0.1], [12, 0.2], [24, 0.4], [36, 0.6], [48, 0.8]]}
    assert tools.pilot.final(run) == pytest.approx(0.7)  # steps 36 and 48, later than 32
    assert tools.page.half_way(run) == 0.4
    run |= {key: run["eval_accuracy"] for key in ("eval_greedy", "eval_length", "pass_at_8")}
    run |= {"entropy": [[1, 0.5], [32, 0.1], [48, 0.6]], "response_length": [[1, 5.0], [48, 9.0]]}
    seen = tools.page.measures(run | {"tokens": 1500, "updates": 96})
    assert seen["entropy"] == 0.6 and seen["entropy, all steps"] == pytest.approx(0.4)
    assert seen["length"] == 9.0 and seen["length, all steps"] == 7.0 and seen["start"] == 0.1
    # from 0.2 at step 12 to 0.6 at step 24: 0.5 after three quarters of the way
    steps_to = tools.page.steps_to
    assert steps_to([[0, 0.1], [12, 0.2], [24, 0.6], [36, 0.9]], 0.5) == pytest.approx(21)
    assert steps_to([[0, 0.1], [12, 0.2]], 0.5) is None
    run = {"similarity": [[1, 0.5], [6, 0.7], [24, 0.4], [25, 0.3]]}
    assert tools.page.similarity(run, "similarity, step 1 to 24") == (0.5, 0.4)
    assert tools.page.similarity(run, "similarity") == (0.5, 0.3)
    assert tools.page.similarity({"similarity": []}, "similarity") is None


def test_a_claim_s_p_is_its_largest_by_holm_over_the_claims(tools):
    several = {1: 2, 2: 1, 3: 1, 4: 2}
    claims = [{"id": n, "smallest": 0.01, "compare": [None] * k} for n, k in several.items()]
    claims += [{"id": 6, "at_most": 0.03, "compare": [None]}]
    effect = lambda p: tools.paired.Effect(0.0, 0.0, 0.0, p)
    rows = [(claims[0], None, effect(p), 10, None) for p in (0.002, 0.01)]
    rows += [(claims[1], None, effect(0.004), 10, None), (claims[3], None, effect(0.001), 10, None)]
    # four claims, one without runs, one with half of them: .004 x 4, .01 x 3, 1, 1
    assert tools.page.corrected_ps(claims, rows) == pytest.approx(
        {2: 0.016, 1: 0.03, 3: 1.0, 4: 1.0}
    )


CURVES = "eval_accuracy eval_greedy entropy response_length pass_at_8 eval_length".split()


def a_result(value, steps=(0, 48)):
    """A run whose curves all have one value."""
    curve = [[step, value] for step in steps]
    return dict.fromkeys(CURVES, curve) | {"tokens": 1, "updates": 1, "similarity": []}


def test_a_claim_of_which_runs_are_missing_has_no_verdict(tools):
    claim = {"id": 15, "claim": "B helps here, hurts there", "metric": "final", "smallest": 0.01}
    claim |= {"direction": 1, "compare": [["short-B", "short"], ["long", "long-B"]]}
    seeds = [101, 102, 103]
    plan = {"common": {"seeds": seeds}, "arms": {}}
    found = {("short", s): a_result(0.5) for s in seeds}
    for gain, verdict in ((0.1, "runs missing"), (-0.2, "contradicted")):
        found |= {("short-B", s): a_result(0.5 + gain + s / 1e4) for s in seeds}
        assert f"| **{verdict}** |" in tools.page.table(plan, found, {}, [claim])[0][2]


def test_seconds_of_whole_runs_and_of_steps_on_the_same_answers(tools):
    plan = {"common": {"seeds": [101, 102]}, "arms": {"hapo": {}, "dapo": {}}}
    found = {(arm, seed): {} for arm in plan["arms"] for seed in (101, 102)}
    times = {"hapo-101": 80.0, "dapo-101": 100.0, "hapo-102": 90.0}  # one was not timed
    times |= {"hapo-101, same answers": 1.1, "dapo-101, same answers": 1.0}
    claim = lambda metric: {"metric": metric, "at_most": 0.03}
    whole = tools.page.comparison(plan, found, times, claim("seconds"), ["hapo", "dapo"])
    assert whole == ([pytest.approx(-0.2)], [(80.0, 100.0)])
    claimed = claim("seconds, same answers")
    same = tools.page.comparison(plan, found, times, claimed, ["hapo", "dapo"])
    assert same == ([pytest.approx(0.1)], [(1.1, 1.0)])


# the best learning rates of the pilot: one arm of DAPO's family has another than its family
OWN = dict.fromkeys("dapo dapo+A dapo+B dapo+C dapo+D short-dapo long-dapo".split(), 2e-4)
OWN |= dict.fromkeys("short-dapo+B short-hapo long-dapo+B long-hapo".split(), 2e-4)
OWN |= {"grpo": 1e-4, "bupo": 1e-4, "hapo": 4e-4}
RATES = {"grpo": 1e-4, "dapo": 2e-4}
CHOSEN = {"difficulty": 3, "rates": RATES, "own": OWN, "real": {"grpo": 1e-5, "dapo": 2e-5}}
CHOSEN["final, half-way"] = {"3 dapo 0.0002": [0.6, 0.5, 0, 2]}


@pytest.fixture
def laid_out(tools, monkeypatch, tmp_path):
    """A folder for results, a pilot's choice, and a training that only writes its lines.

    `stop` maps a seed to the step at which its training stops too early. Pictures are
    named and not drawn."""
    runs, pilot = tmp_path / "claims_runs.jsonl", tmp_path / "claims_pilot.json"
    trained, stop = [], {}
    named = lambda folder, found, tables: [f"{name}.png" for name in (*tables, "curves", "others")]
    monkeypatch.setitem(sys.modules, "claims_plots", types.SimpleNamespace(draw=named))
    moved = {
        tools.runs: {"ROOT": "", "RUNS": runs.name, "TIMES": "times.json", "SAME": "same.json"},
        tools.main: {"COST": "cost.json"},
        tools.main.claims_again: {"AGAIN": "again.json"},
        tools.plan: {"PILOT": pilot.name},
        tools.page: {"PAGE": "evidence.md", "PLOTS": "plots"},
    }
    for module, names in moved.items():
        for name, file in names.items():
            monkeypatch.setattr(module, name, tmp_path / file)
    monkeypatch.setattr(tools.runs, "commit", lambda real=tools.runs.commit: "c0ffee")
    pilot.write_text(json.dumps(CHOSEN), encoding="utf-8")

    def training(command, **how):
        trained.append(command)
        return write_a_training(tmp_path, command, stop)

    monkeypatch.setattr(tools.runs.subprocess, "run", training)
    monkeypatch.setattr(tools.runs, "make_worlds", lambda plan, jobs: None)

    def run(*flags):
        """What the page holds afterwards."""
        monkeypatch.setattr("sys.argv", ["claims.py", *flags])
        tools.main.main()
        page = tmp_path / "evidence.md"
        return page.read_text(encoding="utf-8") if page.exists() else ""

    return run, runs, trained, stop


@pytest.fixture
def few_seeds(tools, monkeypatch, tmp_path):
    """Two seeds instead of ten: where no test of significance is looked at."""
    common = tools.planned["common"] | {"seeds": [101, 102]}
    real = tools.planned["real model"] | {"seeds": 2}
    text = json.dumps(tools.planned | {"common": common, "real model": real})
    (tmp_path / "claims.json").write_text(text, encoding="utf-8")
    monkeypatch.setattr(tools.plan, "PLAN", tmp_path / "claims.json")


def write_a_training(folder, command, stop):
    """What a run of train.py leaves: its lines."""
    out = folder / command[command.index("--out") + 1]
    out.mkdir(parents=True, exist_ok=True)
    seed = int(command[command.index("--seed") + 1])
    better = "--no-" not in " ".join(command) and "hapo" in command
    asked = int(re.findall(r"--steps (\d+)", " ".join(command))[-1])
    step = dict(all_wrong=1, groups=4, updates=2, response_length=9.0, seconds_update=1.0)
    step |= dict(step=stop.get(seed, asked), entropy=0.1, eval_length=9.0, eval_greedy=0.9)
    step["eval_accuracy"] = seed / 1000 + 0.3 * better
    rows = [{"step": 0, "eval_accuracy": 0.1, "eval_greedy": 0.1}, step]
    lines = "\n".join(map(json.dumps, rows))
    (out / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return types.SimpleNamespace(returncode=0, stderr="")


def names_in(runs):
    lines = runs.read_text(encoding="utf-8").splitlines() if runs.exists() else []
    return {json.loads(line)["name"] for line in lines}


def test_only_what_is_missing_runs_and_comes_out_the_same(laid_out, capsys):
    run, runs, trained, _ = laid_out
    run("--only", "1")
    names = {f"{arm}-{seed}" for arm in ("hapo", "dapo") for seed in range(101, 111)}
    before = runs.read_text(encoding="utf-8")
    assert names_in(runs) == names and len(trained) == 20
    assert set(json.loads((runs.parent / "times.json").read_text(encoding="utf-8"))) == names
    rates = {c[c.index("--lr") + 1] for c in trained}
    assert rates == {"0.0002"} and all("--difficulty" in c for c in trained)
    half = "".join(before.splitlines(True)[::2])  # every second line is lost
    runs.write_text(half, encoding="utf-8")
    page = run("--only", "1")
    assert len(trained) == 30 and runs.read_text(encoding="utf-8") == before
    # hapo is 0.3 better in all ten seeds: p = 2 / 1024, and the smallest effect is 0.01
    claim = next(line for line in page.splitlines() if line.startswith("| 1. HAPO beats DAPO"))
    assert "**holds**" in claim and "+30.0 [+30.0, +30.0]" in claim and claim.endswith("| 10 |")
    assert "| 8. BuPO beats GRPO | no runs yet" in page and "**Mixed**" not in page
    front, details = page.split("## How it was tested")  # words and pictures first, then tables
    titles = ("Two worlds: when B helps", "The field's rivals", "A real model")
    assert re.findall("^## (.*)", front, re.M) == [*titles, "What cannot be told"]
    shown = [
        f"![{name}.png](../assets/evidence/{name}.png)" for name in ("worlds", "field", "real")
    ]
    assert "\n| " not in front and re.findall(r"!\[.*", front) == shown
    assert all(f"## {title}: the numbers\n\n| claim |" in details for title in titles)
    run("--only", "8", "--dry-run")
    assert len(trained) == 30 and "20 runs missing" in capsys.readouterr().out


def test_cost_times_every_seed_with_the_arms_own_options(laid_out, tools, monkeypatch):
    run, runs, _, _ = laid_out
    run("--only", "1")
    asked = []

    def timing(command, **how):
        asked.append(command)
        line = 'a line of the opening\n{"dapo": 1.0, "hapo": 1.02}\n'
        return types.SimpleNamespace(returncode=0, stderr="", stdout=line)

    monkeypatch.setattr(tools.runs.subprocess, "run", timing)
    run("--cost")
    seeds = {int(c[-1].split()[-1]) for c in asked}
    assert seeds == set(range(101, 111)) and all("--prompts-per-step 16" in c[-1] for c in asked)
    page = run("--only", "1")  # runs nothing; the page has the new row
    row = next(line for line in page.splitlines() if "6 on the" in line)
    assert "**holds**" in row and "+0.020 [+0.020, +0.020]" in row and row.endswith("| 10 |")


def test_a_run_that_was_stopped_is_no_result(laid_out):
    run, runs, trained, stop = laid_out
    stop[101] = 24  # the first two of twenty; a training that is told to stop ends with 0
    with pytest.raises(UserError, match="101 was stopped at step 24 of 48"):
        run("--only", "1")
    ended = names_in(runs)  # one that was in flight may have ended
    assert not any(name.endswith("-101") for name in ended) and len(trained) < 20
    times = runs.parent / "times.json"
    assert not ended or set(json.loads(times.read_text(encoding="utf-8"))) == ended
    stop.clear()
    run("--only", "1")
    assert len(names_in(runs)) == 20


def test_other_results_are_refused_by_name(few_seeds, laid_out, tools, monkeypatch):
    run, runs, trained, _ = laid_out
    run("--only", "1")
    older = tools.runs.read_runs(runs)
    tools.runs.write_runs(runs, older | {"dapo-101": older["dapo-101"] | {"commit": "0123"}})
    page = run("--only", "1", "--mixed")
    assert "something else than now (other commit: dapo)" in page
    tools.runs.write_runs(runs, older)
    assert "**Mixed**" not in run("--only", "1")
    monkeypatch.setattr(tools.runs, "commit", lambda: "decaf")
    with pytest.raises(UserError, match=r"run hapo-101: made with other commit .*\(c0ffee\)"):
        run("--only", "1")
    assert "**Mixed**" in run("--only", "1", "--mixed") and len(trained) == 4
    assert "**Mixed**" not in run("--only", "1", "--anew") and len(trained) == 8
    assert {result["commit"] for result in tools.runs.read_runs(runs).values()} == {"decaf"}
    with pytest.raises(UserError, match="--only 99: no claim"):
        run("--only", "99")
    said = iter(["decaf"])  # and then the sources change while a run goes on
    runs.unlink()
    monkeypatch.setattr(tools.runs, "commit", lambda: next(said, "c0ffee"))
    with pytest.raises(UserError, match="the sources were changed while it ran"):
        run("--only", "1")
    assert not runs.exists()


def git_and_trainings(training, alike, asked, other):
    """Clean sources of another commit; trainings that end with other weights for `other` options in
    the older code. `asked`: what git was asked for."""

    def with_git(command, cwd, **how):
        if command[0] != "git":
            done, old = training(command, **how), cwd.name == "code-c0ffee"
            final = pathlib.Path(command[command.index("--out") + 1]) / "final"
            assert final.is_relative_to(cwd)
            final.mkdir()
            weights = b"other" if old and any(part in " ".join(command) for part in other) else b""
            (final / "model.safetensors").write_bytes(weights)
            return done
        asked.append(command[1:3])
        said = {"status": "", "log": "decaf\n"}.get(command[1], "the same code\n")
        if command[1] == "ls-tree" and not alike:
            said = f"{command[4]}\n"  # git ls-tree -r --name-only COMMIT
        return types.SimpleNamespace(returncode=0, stdout=said)

    return with_git


def test_results_count_for_a_commit_that_changes_no_number(few_seeds, laid_out, tools, monkeypatch):
    run, runs, trained, _ = laid_out
    run()
    assert len(trained) == 2 * 39
    training, alike, asked, other = tools.runs.subprocess.run, [], [], []
    with_git = git_and_trainings(training, alike, asked, other)
    monkeypatch.setattr(tools.runs.subprocess, "run", with_git)
    monkeypatch.setattr(tools.runs, "make_models", lambda plan, names: None)
    monkeypatch.setattr(tools.runs, "commit", tools.runs.commit.__defaults__[0])  # the real one
    with pytest.raises(UserError, match="made with other commit"):
        run()
    other.append("--comparison edge")  # as the older code calls it
    with pytest.raises(UserError, match="edge-1..: weights is not what it was at c0ffee"):
        run("--again")
    assert asked[-1] == ["worktree", "remove"]  # nothing is left of the older code
    assert not tools.runs.SAME.exists() and tools.runs.commit() == "decaf"
    alike.append("but for words")
    assert tools.runs.commit() == "c0ffee"
    alike.clear()
    other.clear()
    again = tools.main.claims_again.AGAIN
    begun = json.loads(again.read_text(encoding="utf-8"))["arms"]
    trained.clear()
    run("--again")  # goes on with the arms that were not seen to be the same
    arms = [c[c.index("--out") + 1].split("/")[-1] for c in trained]
    assert 0 < len(begun) < 39 and not set(arms) & set(begun) and not again.exists()
    assert len(arms) == 2 * (39 - len(begun)) == 2 * len(set(arms))
    tools.runs.SAME.unlink()
    stale = json.dumps({"codes": "c0ffee begun before", "arms": begun})
    again.write_text(stale, encoding="utf-8")
    trained.clear()
    run("--again")  # does not certify this code by another's runs
    assert len(trained) == 2 * 39
    last = {int(re.findall(r"--steps (\d+)", " ".join(c))[-1]) for c in trained}
    assert last == {8, 13, 25, 48}  # an arm of BuPO's: its first phase and a step of the second
    assert tools.runs.commit() == "c0ffee"
    assert "**Mixed**" not in run()  # nothing is refused, nothing is missing
    assert len(trained) == 2 * 39


def test_comments_and_docstrings_change_no_number(tools):
    before = 'def f(x):\n    """Doubles."""\n    return 2 * x  # twice\n'
    same = 'def f(x):\n    """x, two times."""\n    # as often\n    return 2 * x\n'
    other = before.replace("2 * x", "3 * x")
    code = tools.runs.without_words
    assert code(before) == code(same) != code(other)
    files = {"a.py": before, "b.py": same}
    commits = {"old": files, "new": files | {"a.py": same}, "odd": files | {"b.py": other}}

    def git(what, *args):
        if what == "ls-tree":
            return "\n".join(commits[args[2]])
        return commits[args[0].split(":")[0]][args[0].split(":")[1]]

    old, new, odd = (tools.runs.code_of(name, git) for name in commits)
    assert old == new != odd


def test_every_claim_names_arms_that_exist(tools):
    plan = tools.planned
    assert [c["id"] for c in plan["claims"]] == list(range(1, 15))
    assert len(plan["common"]["seeds"]) == 10
    assert not set(plan["common"]["seeds"]) & set(plan["pilot"]["seeds"])
    assert all(arm in plan["arms"] and seed > 100 for arm, seed in tools.plan.wanted(plan))
    known = {"short": 36, "long": 36, "real": 24, "bupo-watched": 25, "grpo-watched": 25}
    for arm in plan["arms"]:
        flags = tools.plan.options_of(plan, arm, CHOSEN).split()
        o = option_checks.parse([*flags, "--out", "/nonexistent/run"], "")
        assert o.steps == known.get(arm, known.get(arm.partition("-")[0], 48))
        if arm == "one-layer-whole":
            assert o.bupo_baseline == "one-layer" and o.bupo_steps == o.steps


def test_worlds_are_made_where_they_are_needed(tools, tmp_path, monkeypatch):
    """Only those that a missing run starts from, and once."""
    asked = []

    def make(command):
        asked.append(command)
        folder = tmp_path / "runs" / "worlds" / "short"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"")
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(tools.runs, "ROOT", tmp_path)
    monkeypatch.setattr(tools.runs, "one_thread", make)
    plan = tools.planned
    jobs = [(arm, tools.plan.options_of(plan, arm, CHOSEN), 101) for arm in ("grpo", "short-dapo")]
    for _ in range(2):
        tools.runs.make_worlds(plan, jobs)
    (command,) = asked
    assert command[1] == "scripts/pretrain_tiny.py" and "0.7" in command
    worked, bare = (tools.main.shlex.split(plan["models"][name]) for name in ("short", "long"))
    differ = {worked[i - 1] for i in range(1, len(worked)) if worked[i] != bare[i]}
    assert differ == {"--worked", "--slip", "--right"}  # the teacher, mirrored, and nothing else


def test_a_claim_s_differences_are_shown(tools, capsys):
    plan, found = tools.planned, {}
    for n, seed in enumerate(plan["common"]["seeds"]):
        for arm, value in (("short-dapo", 0.5), ("short-dapo+B", 0.52 + 0.002 * n)):
            found[arm, seed] = a_result(value, (0, 12, 24, 36))
    short = {"id": 15, "compare": [["short-dapo+B", "short-dapo"]], "metric": "final"}
    tools.main.show(plan | {"worlds": [short]}, ["15"], found, {})
    # mean 0.02 + 0.009; all ten above 0: p = 2 / 1024
    said = capsys.readouterr().out
    assert "10 seeds, +0.0290 [+0.0247, +0.0333], sign-flip p 0.0020, 10 above 0" in said


def test_options_name_the_rate_of_the_family_the_arm_or_the_real_model(tools):
    plan = tools.planned
    rate = lambda arm: tools.plan.options_of(plan, arm, CHOSEN).split("--lr ")[1].split()[0]
    assert [rate(arm) for arm in ("grpo", "bupo", "dapo+B", "real-grpo", "real-hapo")] == [
        "0.0001", "0.0001", "0.0002", "1e-05", "2e-05"]  # fmt: skip
    assert rate("dapo+B@0.0004") == "0.0004"
    plan = tools.plan.with_own_rates(plan, CHOSEN)
    pairs = {g["id"]: g["compare"] for g in plan["own"]}
    assert pairs == {"1 own": [["hapo@0.0004", "dapo"]]}  # the others' are their families'
    wanted = tools.plan.wanted(plan)
    assert sum(arm == "hapo@0.0004" for arm, _ in wanted) == 10
    assert sum(arm == "real-hapo" for arm, _ in wanted) == 8


def test_a_pilot_chooses_level_and_rates(laid_out, tools, monkeypatch):
    """Level 3 leaves no room, so 2; there GRPO is best at 0.0004, DAPO at 0.0002, HAPO at twice
    DAPO's."""
    run, runs, trained, _ = laid_out
    ends = "3 dapo 2 0.97, 2 dapo 2 0.7, 2 grpo 4 0.5, 2 hapo 4 0.8, 2 dapo+B 2 0.55, "
    ends = [end.split() for end in (ends + "2 dapo+C 2 0.55").split(", ")]
    ends = {(level, arm, f"0.000{rate}"): float(value) for level, arm, rate, value in ends}

    def measured(plan, jobs, path, made_of, real=None):
        known = tools.runs.read_runs(path)
        for name, options, _ in jobs:
            trained.append(name)
            split = name.split if "e-" in name else name.rsplit
            _, arm, level, rate, seed = split("-", 4)
            value = ends.get((level, arm, rate), 0.1)
            if (arm, rate) == ("dapo+C", "0.0004"):  # 0.56 on average, standard error 0.0447
                value = 0.66 if int(seed) % 2 else 0.46
            if (arm, rate) == ("dapo+B", "0.0004"):
                value = 0.58 if int(seed) < 3 else 0.34
            curve = [[step, value] for step in (0, 24, 48)]
            known[name] = {"options": options, "commit": made_of, "eval_accuracy": curve}
        tools.runs.write_runs(path, known)

    monkeypatch.setattr(tools.runs, "run_missing", measured)
    run("--pilot")
    chosen = tools.runs.read_json(tools.plan.PILOT)
    assert chosen["difficulty"] == 2 and chosen["rates"] == {"grpo": 4e-4, "dapo": 2e-4}
    assert chosen["own"]["hapo"] == 4e-4 and chosen["own"]["dapo"] == 2e-4
    # 0.55 against 0.58 in two seeds, (2 x 0.58 + 4 x 0.34) / 6 in six; 0.55 at the smaller rate is
    # within a standard error of 0.56
    assert chosen["own"]["dapo+B"] == chosen["own"]["dapo+C"] == 2e-4
    ends = chosen["final, half-way"]
    assert ends["2 hapo 0.0004"] == [0.8, 0.8, 0.0, 2]  # two seeds: it is clearly the best
    assert ends["2 dapo+C 0.0004"] == [0.56, 0.56, 0.0447, 6]
    assert ends["2 dapo+B 0.0004"] == [0.42, 0.42, 0.0506, 6]
    asked = len(trained)
    run("--pilot")  # nothing is run twice
    assert len(trained) == asked == len(set(trained))


def test_results_of_other_weights_are_refused(few_seeds, laid_out, tools):
    run, runs, trained, _ = laid_out
    for world in ("short", "long"):
        weights = runs.parent / "runs" / "worlds" / world / "model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.write_bytes(b"as they were made")
    run("--only", "15")
    assert len(trained) == 8
    # printf 'as they were made' | sha256sum
    made_from = {result["weights"] for result in tools.runs.read_runs(runs).values()}
    assert made_from == {"c30bb725f67b"}
    weights.unlink()  # results of a model that is not there stay results
    run("--only", "15", "--list")
    weights.write_bytes(b"made again, otherwise")  # as on another machine
    run("--only", "15")  # both runs of each pair are of the same weights
    assert len(trained) == 8
    results = tools.runs.read_runs(runs)
    del results["long-dapo-101"]
    tools.runs.write_runs(runs, results)
    with pytest.raises(UserError, match=r"a pair of runs long-dapo and long-dapo\+B started from"):
        run("--only", "15")
    assert len(trained) == 9
    page = run("--only", "15", "--mixed")
    assert "(other weights: long-dapo, long-dapo+B)" in page
    page = run("--only", "15", "--anew")  # the runs of that world, and no other
    assert len(trained) == 9 + 3 and "**Mixed**" not in page


def test_a_real_model_s_runs_start_where_the_user_says(laid_out, tools, tmp_path):
    run, runs, trained, _ = laid_out
    with pytest.raises(UserError, match="--only real B: needs --real DIR"):
        run("--only", "real B")
    run("--only", "real B", "--real", str(tmp_path / "smol"))
    assert len(trained) == 16 and all(str(tmp_path / "smol") in c for c in trained)
    result = tools.runs.read_runs(runs)["real-dapo+B-108"]
    assert " --lr 2e-05 " in result["options"] and "--model REAL" in result["options"]
    without = {key: value for key, value in CHOSEN.items() if key != "real"}
    tools.plan.PILOT.write_text(json.dumps(without), encoding="utf-8")
    with pytest.raises(UserError, match="its learning rates come first: --pilot --real"):
        run("--real", str(tmp_path / "smol"))


def test_the_page_s_parts(tools):
    text = "## One\n\nfirst\n\n## Two\nsecond\nand more\n"
    assert tools.page.sections(text) == {"One": "first\n", "Two": "second\nand more\n"}
    ends = {"3 dapo 0.0002": [0.6, 0.5, 0, 6], "3 dapo 0.0004": [0.7, 0.6, 0, 6]}
    ends |= {"3 dapo 0.0008": [0.8, 0.5, 0, 2], "3 hapo 0.0001": [0.5, 0.4, 0, 2]}
    pilot = {"difficulty": 3, "rates": {"dapo": 4e-4}, "own": {"hapo": 1e-4}}
    ends["2 dapo 0.001"] = [1, 1, 0, 2]
    table = tools.page.rates_table({}, pilot | {"final, half-way": ends})
    assert table.splitlines()[-4:] == [
        "| arm | 0.0001 | 0.0002 | 0.0004 | 0.0008 |",
        "|---|---|---|---|---|",
        "| dapo |  | 0.600 (6) | **0.700 (6)** | 0.800 (2) |",
        "| hapo | **0.500 (2)** |  |  |  |",
    ]


def test_notes_name_their_numbers(tools):
    ready = tools.page.ready_numbers({"short": {"right": "10.0", "B": "0"}}, {1: 0.025})
    own = lambda end: {"eval_accuracy": [[0, 0.2], [48, end]], "entropy": [[48, 0.125]]}
    run = lambda end: a_result(9.0) | own(end)
    ends = {"dapo": (0.5, 0.6, 0.7), "hapo": (0.6, 0.8, 0.6)}
    found = {(arm, 101 + i): run(x) for arm, own in ends.items() for i, x in enumerate(own)}
    arms = dict.fromkeys(("dapo", "hapo", "edge"), {})
    plan = {"arms": arms, "common": {"seeds": range(101, 104)}}
    said = lambda text: tools.page.with_numbers(text, plan, found, {}, ready)
    # differences 10, 20 and -10 points: mean 6.67, deviation 15.28, t(2) 4.3027 x 15.28 / sqrt(3)
    assert said("at {hapo - dapo}.") == "at +6.7 [−31.3, +44.6]."
    assert said("{hapo > dapo} seeds, p {Holm 1}") == "2 of 3 seeds, p 0.025"
    assert said("{short: right} tokens, {short: B}") == "10.0 tokens, 0"
    assert said("{hapo, final}, {dapo, entropy}; {edge, final}") == "0.67, 0.12; –"
    assert said("{hapo - start} {edge - dapo}") == "+46.7 [+18.0, +75.4] –"
    with pytest.raises(UserError, match=r"claims_notes.md: \{hapo - dopa\} names no arm"):
        said("{hapo - dopa}")


def test_the_notes_numbers_are_there(tools):
    """Every number that the notes name is one of the runs that lie beside them."""
    chosen, page = tools.runs.read_json(tools.plan.PILOT), tools.page
    named = tools.plan.with_own_rates(tools.planned, chosen)
    found, times, _ = tools.main.results(named, chosen, "any commit", True)
    text = page.NOTES.read_text(encoding="utf-8")
    before = page.before_training(tools.runs.read_json(page.MASSES))
    ps = {claim["id"]: 1.0 for kind in page.TITLES for claim in named.get(kind, [])}
    ready = page.ready_numbers(before, ps)
    filled = page.with_numbers(text, named, found, times, ready)
    assert "{" in text and "{" not in filled and " –" not in filled


def test_effects_on_accuracy_are_shown_in_points(tools):
    amount, bar = tools.page.amount, tools.page.bar
    final = {"metric": "final", "smallest": 0.01}
    assert (bar(final), amount(-0.0272, final)) == ("+1", "-2.7")
    assert bar({"metric": "final", "no_worse_by": 0.01}) == "above -1"
    entropy = {"metric": "entropy", "smallest": 0.005}
    assert (bar(entropy), amount(0.0031, entropy)) == ("+0.005", "+0.003")
    assert bar({"metric": "seconds", "at_most": 0.03}) == "below +0.03"


@pytest.mark.optional("matplotlib")
def test_every_comparison_is_in_its_tables_picture_or_among_the_others(
    tools, tmp_path, monkeypatch
):
    import claims_plots

    arms, seeds, pictures = tools.planned["arms"], (101, 102), tmp_path / "pictures"
    found = {(arm, seed): a_result(seed / 1000) for arm in arms for seed in seeds}
    drawn = claims_plots.draw(pictures, found, {"worlds": [], "field": [], "real": []})
    assert drawn == ["curves.png", "worlds.png", "field.png", "real.png"]
    assert {path.name for path in pictures.iterdir()} == set(drawn)

    def row(name, metric="final", **bar):
        claim = {"id": name, "claim": "", "metric": metric} | bar
        return claim, ("a", "b"), tools.paired.effect([0.1, 0.3]), 2, [(0.5, 0.4), (0.6, 0.3)]

    said = {}

    def keep(figure, path):
        first = [text.get_text() for text in figure.axes[0].get_yticklabels()]
        said[path.name] = [a.get_title() for a in figure.axes if a.get_title()] or first
        claims_plots.plt.close(figure)
        return path.name

    monkeypatch.setattr(claims_plots, "save", keep)
    monkeypatch.setattr(claims_plots, "curves", lambda found: None)
    tables = {
        "claims": [row(1, smallest=0.01), row(4, "entropy", smallest=0.005)],
        "own": [row("15 own", no_worse_by=0.01)],
        "controls": [row("chance")],
    }
    assert claims_plots.draw(tmp_path, {}, tables) == list(said)
    assert said == {
        "claims.png": ["1. a over b"],
        "own.png": ["15 own. a over b"],
        "others.png": ["4.", "chance."],
    }


def test_what_is_no_result_is_named_with_its_line(tools, tmp_path):
    path = tmp_path / "claims_runs.jsonl"
    for broken in ("", '{"name": ', '{"seed": 101}', "3"):
        path.write_text(f'{{"name": "dapo-101"}}\n{broken}\n', encoding="utf-8")
        with pytest.raises(UserError, match="claims_runs.jsonl:2: no result; delete the line"):
            tools.runs.read_runs(path)


def test_outside_a_repository_no_result_can_be_named(tools, tmp_path, monkeypatch):
    monkeypatch.setattr(tools.runs, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(UserError, match="git status: .*not a git repository"):
        tools.runs.commit()


def test_the_mass_table_by_hand(tools):
    # 0.5 up and 0.25 + 0.35 down: net -0.10; and what cancels to the digits shown is 0
    grpo = {"3": [0.5, -0.25], "5": [0.0, -0.35]}
    mass = {"GRPO's advantages": grpo, "B": {"3": [0.5, -0.504]}}
    known = {"short": {"right": 3.04, "wrong": 5, "mass": mass}}
    *_, head, _, row = tools.page.mass_table(tools.page.before_training(known)).splitlines()
    assert head == "| model | right | wrong | GRPO's advantages | B |"
    assert row == "| short | 3.0 | 5.0 | −0.10 | 0 |"
    assert tools.page.mass_table({}) == ""


def test_advantage_mass_by_length_by_hand(tools):
    from advantage_mass import by_length

    # three answers whose tokens' advantages sum to 2, -1 and -1: a mass of 4
    shares = by_length(torch.tensor([2.0, -1.0, -1.0]), torch.tensor([3, 3, 5]))
    assert shares == {3: [0.5, -0.25], 5: [0.0, -0.25]}
