"""The statistics of experiments/claims.py, by hand; and that it runs what is missing, no more."""

import json
import pathlib
import re
import types

import pytest
from conftest import ROOT

from common.errors import UserError


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import claims
    import claims_pilot
    import claims_plan
    import claims_runs
    import paired

    return types.SimpleNamespace(
        main=claims, pilot=claims_pilot, plan=claims_plan, runs=claims_runs, paired=paired
    )


def test_an_effect_by_hand(tools):
    # mean 2.5, deviation sqrt(5 / 3) = 1.2910, t of 3 degrees 3.182: half width 2.0540;
    # of 16 sign patterns only + + + + and - - - - reach a sum of 10
    paired = tools.paired
    e = paired.effect([1.0, 2.0, 3.0, 4.0])
    assert e == pytest.approx((2.5, 0.4460, 4.5540, 2 / 16), abs=1e-4)


def test_sign_flips_by_hand(tools):
    paired = tools.paired
    assert paired.sign_flip([1, 1, -1]) == 1  # sums of 1 and of 3: none is smaller than 1
    assert paired.sign_flip([3, 1]) == 0.5  # 4 and -4 of 4, 2, -2, -4
    assert paired.sign_flip([0.1] * 10) == 2 / 1024
    assert paired.sign_flip([0.1] * 8) == 2 / 256


def test_holm_by_hand(tools):
    # .01 x 3, .03 x 2, and .04 x 1 = .04 raised to the .06 before it
    paired = tools.paired
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.holm([0.9, 0.8]) == [1.0, 1.0]


def test_probability_of_improvement_by_hand(tools):
    paired = tools.paired
    # 1 = 1 counts half, 1 < 3, 2 > 1, 2 < 3
    assert paired.probability_of_improvement([1, 2], [1, 3]) == 1.5 / 4


def test_verdicts_by_hand(tools):
    paired = tools.paired
    effect = lambda mean, half: paired.Effect(mean, mean - half, mean + half, 0.0)
    assert paired.verdict(effect(0.05, 0.01), 0.01, 0.01) == "holds"
    assert paired.verdict(effect(0.05, 0.06), 0.20, 0.01) == "not decided"
    assert paired.verdict(effect(0.005, 0.001), 0.01, 0.01) == "contradicted"  # too small to matter
    assert paired.verdict(effect(-0.05, 0.02), 0.01, 0.01) == "contradicted"
    assert paired.verdict(effect(-0.05, 0.08), 0.30, 0.01) == "not decided"


def test_verdicts_of_a_table_by_hand(tools):
    from claims_page import judge, said, steps_to, whole

    paired = tools.paired
    effect = lambda mean, half: paired.Effect(mean, mean - half, mean + half, 0.0)
    claim, pair = {"smallest": 0.01}, ["hapo", "dapo"]
    assert judge(claim, pair, effect(-0.05, 0.02), 0.01) == ("contradicted", True)
    assert judge(claim, pair, effect(-0.05, 0.02), 0.06) == ("contradicted", False)
    assert judge(claim, pair, effect(-0.01, 0.015), 0.04) == ("contradicted", False)
    assert judge({"at_most": 0.03}, pair, effect(0.01, 0.01), 1.0) == ("holds", False)
    assert judge({"at_most": 0.03}, pair, effect(0.01, 0.03), 1.0) == ("not decided", False)
    assert judge({"at_most": 0.03}, pair, effect(0.06, 0.02), 1.0) == ("contradicted", False)
    no_worse = {"no_worse_by": 0.01}
    assert judge(no_worse, pair, effect(0.0, 0.005), 1.0) == ("holds", False)
    assert judge(no_worse, pair, effect(0.0, 0.02), 1.0) == ("not decided", False)
    assert judge(no_worse, pair, effect(-0.04, 0.02), 1.0) == ("contradicted", False)
    assert judge({}, pair, effect(0.1, 0.01), 0.002) == ("a difference", False)
    assert judge({}, pair, effect(0.1, 0.2), 0.4) == ("no difference", False)
    chance = ["random", "start"]  # a policy that a random reward ruins has learned nothing
    assert judge({}, chance, effect(-0.2, 0.01), 0.002)[0] == "nothing learned, much lost"
    assert judge({}, chance, effect(0.2, 0.01), 0.002)[0] == "something learned"
    assert judge({}, chance, effect(0.0, 0.01), 0.9)[0] == "nothing learned"
    assert whole(["holds", "not decided", "contradicted"]) == "contradicted"
    assert whole(["holds", "not decided"]) == "not decided" and whole(["holds"] * 2) == "holds"
    assert said("contradicted", True) == "contradicted: the reverse"
    # from 0.2 at step 12 to 0.6 at step 24: 0.5 after three quarters of the way
    assert steps_to([[0, 0.1], [12, 0.2], [24, 0.6], [36, 0.9]], 0.5) == pytest.approx(21)
    assert steps_to([[0, 0.1], [12, 0.2]], 0.5) is None


def test_a_claim_s_p_is_its_largest_by_holm_over_the_claims(tools):
    from claims_page import corrected_ps

    several = {1: 2, 2: 1, 3: 1, 4: 2}
    claims = [{"id": n, "smallest": 0.01, "compare": [None] * k} for n, k in several.items()]
    claims += [{"id": 6, "at_most": 0.03, "compare": [None]}]
    effect = lambda p: tools.paired.Effect(0.0, 0.0, 0.0, p)
    rows = [(claims[0], None, effect(p), 10, None) for p in (0.002, 0.01)]
    rows += [(claims[1], None, effect(0.004), 10, None), (claims[3], None, effect(0.001), 10, None)]
    # four claims, one without runs, one with half of them: .004 x 4, .01 x 3, 1, 1
    assert corrected_ps(claims, rows) == pytest.approx({2: 0.016, 1: 0.03, 3: 1.0, 4: 1.0})


def test_a_claim_of_which_runs_are_missing_has_no_verdict(tools):
    from claims_page import table

    claim = {"id": 15, "claim": "B helps here, hurts there", "metric": "final", "smallest": 0.01}
    claim |= {"direction": 1, "compare": [["short-B", "short"], ["long", "long-B"]]}
    plan = {"common": {"seeds": [101, 102, 103]}, "arms": {}}
    curves = "eval_accuracy eval_greedy entropy response_length pass_at_8 eval_length".split()
    end = lambda value: (
        dict.fromkeys(curves, [[0, value], [48, value]]) | {"tokens": 1, "updates": 1}
    )
    found = {("short", s): end(0.5) for s in (101, 102, 103)}
    found |= {("short-B", s): end(0.6 + s / 1e4) for s in (101, 102, 103)}
    assert "| **runs missing** |" in table(plan, found, {}, [claim])[0][2]
    found |= {("short-B", s): end(0.3 + s / 1e4) for s in (101, 102, 103)}
    assert "| **contradicted** |" in table(plan, found, {}, [claim])[0][2]


def test_similarity_between_two_steps(tools):
    from claims_page import similarity

    run = {"similarity": [[1, 0.5], [6, 0.7], [24, 0.4], [25, 0.3]]}
    assert similarity(run, "similarity, step 1 to 24") == (0.5, 0.4)
    assert similarity(run, "similarity") == (0.5, 0.3)
    assert similarity({"similarity": []}, "similarity") is None


def test_seconds_of_whole_runs_and_of_steps_on_the_same_answers(tools):
    from claims_page import comparison

    plan = {"common": {"seeds": [101, 102]}, "arms": {"hapo": {}, "dapo": {}}}
    found = {(arm, seed): {} for arm in plan["arms"] for seed in (101, 102)}
    times = {"hapo-101": 80.0, "dapo-101": 100.0, "hapo-102": 90.0}  # one was not timed
    times |= {"hapo-101, same answers": 1.1, "dapo-101, same answers": 1.0}
    claim = lambda metric: {"metric": metric, "at_most": 0.03}
    whole = comparison(plan, found, times, claim("seconds"), ["hapo", "dapo"])
    assert whole == ([pytest.approx(-0.2)], [(80.0, 100.0)])
    same = comparison(plan, found, times, claim("seconds, same answers"), ["hapo", "dapo"])
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

    `stop` maps a seed to the step at which its training stops too early."""
    runs, pilot = tmp_path / "claims_runs.jsonl", tmp_path / "claims_pilot.json"
    trained, stop = [], {}
    monkeypatch.setattr(tools.runs, "ROOT", tmp_path)
    monkeypatch.setattr(tools.runs, "RUNS", runs)
    monkeypatch.setattr(tools.runs, "TIMES", tmp_path / "claims_times.json")
    monkeypatch.setattr(tools.main.claims_again, "AGAIN", tmp_path / "again.json")
    monkeypatch.setattr(tools.main, "COST", tmp_path / "claims_cost.json")
    monkeypatch.setattr(tools.plan, "PILOT", pilot)
    monkeypatch.setattr(tools.runs, "SAME", tmp_path / "claims_same.json")
    monkeypatch.setattr(tools.runs, "commit", lambda real=tools.runs.commit: "c0ffee")
    monkeypatch.setattr(tools.main.claims_page, "PAGE", tmp_path / "evidence.md")
    monkeypatch.setattr(tools.main.claims_page, "PLOTS", tmp_path / "plots")
    pilot.write_text(json.dumps(CHOSEN), encoding="utf-8")

    def training(command, **how):
        trained.append(command)
        return write_a_training(tmp_path, command, stop)

    monkeypatch.setattr(tools.runs.subprocess, "run", training)
    monkeypatch.setattr(tools.runs, "make_worlds", lambda plan, jobs: None)

    def run(*flags):
        monkeypatch.setattr("sys.argv", ["claims.py", *flags])
        tools.main.main()

    return run, runs, trained, stop


def write_a_training(folder, command, stop):
    """What a run of train.py leaves: its lines."""
    out = folder / command[command.index("--out") + 1]
    out.mkdir(parents=True, exist_ok=True)
    seed = int(command[command.index("--seed") + 1])
    step = {
        "all_wrong": 1,
        "groups": 4,
        "updates": 2,
        "response_length": 9.0,
        "seconds_update": 1.0,
    }
    better = "--no-" not in " ".join(command) and "hapo" in command
    right = seed / 1000 + 0.3 * better
    asked = int(re.findall(r"--steps (\d+)", " ".join(command))[-1])
    rows = [{"step": 0, "eval_accuracy": 0.1, "eval_greedy": 0.1}]
    rows.append(
        {
            "step": stop.get(seed, asked),
            "eval_accuracy": right,
            "eval_greedy": 0.9,
            "entropy": 0.1,
            "eval_length": 9.0,
        }
    )
    rows[1] |= step
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (out / "metrics.jsonl").write_text(text, encoding="utf-8")
    return type("Done", (), {"returncode": 0, "stderr": ""})()


def names_in(runs):
    lines = runs.read_text(encoding="utf-8").splitlines() if runs.exists() else []
    return {json.loads(line)["name"] for line in lines}


def test_only_what_is_missing_runs_and_comes_out_the_same(laid_out, capsys):
    run, runs, trained, _ = laid_out
    run("--only", "1")
    names = {f"{arm}-{seed}" for arm in ("hapo", "dapo") for seed in range(101, 111)}
    before = runs.read_text(encoding="utf-8")
    assert names_in(runs) == names and len(trained) == 20
    assert set(json.loads((runs.parent / "claims_times.json").read_text(encoding="utf-8"))) == names
    rates = {c[c.index("--lr") + 1] for c in trained}
    assert rates == {"0.0002"} and all("--difficulty" in c for c in trained)
    runs.write_text(
        "".join(before.splitlines(True)[::2]), encoding="utf-8"
    )  # every second line is lost
    run("--only", "1")
    assert len(trained) == 30 and runs.read_text(encoding="utf-8") == before
    # hapo is 0.3 better in all ten seeds: p = 2 / 1024, and the smallest effect is 0.01
    page = (runs.parent / "evidence.md").read_text(encoding="utf-8")
    claim = next(line for line in page.splitlines() if line.startswith("| 1. HAPO beats DAPO"))
    assert "**holds**" in claim and "+30.0 [+30.0, +30.0]" in claim and claim.endswith("| 10 |")
    assert "| 8. BuPO beats GRPO | no runs yet" in page and "**Mixed**" not in page
    front, details = page.split("## How it was tested")  # words and pictures first, then tables
    titles = ("Two worlds: when B helps", "The field's rivals", "A real model")
    assert re.findall("^## (.*)", front, re.M) == [*titles, "What cannot be told"]
    assert "\n| " not in front
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
        return type("Done", (), {"returncode": 0, "stderr": "", "stdout": line})()

    monkeypatch.setattr(tools.runs.subprocess, "run", timing)
    run("--cost")
    seeds = {int(c[-1].split()[-1]) for c in asked}
    assert seeds == set(range(101, 111)) and all("--prompts-per-step 16" in c[-1] for c in asked)
    run("--only", "1")  # runs nothing; the page has the new row
    row = next(
        x
        for x in (runs.parent / "evidence.md").read_text(encoding="utf-8").splitlines()
        if "6 on the" in x
    )
    assert "**holds**" in row and "+0.020 [+0.020, +0.020]" in row and row.endswith("| 10 |")


def test_a_run_that_was_stopped_is_no_result(laid_out):
    run, runs, trained, stop = laid_out
    stop[101] = 24  # the first two of twenty; a training that is told to stop ends with 0
    with pytest.raises(UserError, match="101 was stopped at step 24 of 48"):
        run("--only", "1")
    ended = names_in(runs)  # one that was in flight may have ended
    assert not any(name.endswith("-101") for name in ended) and len(trained) < 20
    times = runs.parent / "claims_times.json"
    assert not ended or set(json.loads(times.read_text(encoding="utf-8"))) == ended
    stop.clear()
    run("--only", "1")
    assert len(names_in(runs)) == 20


def test_other_results_are_refused_by_name(laid_out, tools, monkeypatch):
    run, runs, trained, _ = laid_out
    run("--only", "1")
    monkeypatch.setattr(tools.runs, "commit", lambda: "decaf")
    with pytest.raises(
        UserError, match=r"run hapo-101: made with other commit than now \(c0ffee\)"
    ):
        run("--only", "1")
    run("--only", "1", "--mixed")
    page = runs.parent / "evidence.md"
    assert "**Mixed**" in page.read_text(encoding="utf-8") and len(trained) == 20
    run("--only", "1", "--anew")
    assert len(trained) == 40 and "**Mixed**" not in page.read_text(encoding="utf-8")
    assert {result["commit"] for result in tools.runs.read_runs(runs).values()} == {"decaf"}
    with pytest.raises(UserError, match="--only 99: no claim"):
        run("--only", "99")


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
        return type("Done", (), {"stdout": said, "returncode": 0})()

    return with_git


def test_results_count_for_a_commit_that_changes_no_number(laid_out, tools, monkeypatch):
    run, runs, trained, _ = laid_out
    run()
    assert len(trained) == 390
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
    run()  # nothing is refused, nothing is missing
    assert len(trained) == 2 * 39
    assert "**Mixed**" not in (runs.parent / "evidence.md").read_text(encoding="utf-8")


def test_comments_and_docstrings_change_no_number(tools):
    before = 'def f(x):\n    """Doubles."""\n    return 2 * x  # twice\n'
    same = 'def f(x):\n    """x, two times."""\n    # as often\n    return 2 * x\n'
    other = before.replace("2 * x", "3 * x")
    assert tools.runs.without_words(before) == tools.runs.without_words(same)
    assert tools.runs.without_words(before) != tools.runs.without_words(other)
    files = {"a.py": before, "b.py": same}
    commits = {"old": files, "new": files | {"a.py": same}, "odd": files | {"b.py": other}}

    def git(what, *args):
        if what == "ls-tree":
            return "\n".join(commits[args[2]])
        return commits[args[0].split(":")[0]][args[0].split(":")[1]]

    assert (
        tools.runs.code_of("old", git)
        == tools.runs.code_of("new", git)
        != tools.runs.code_of("odd", git)
    )


def test_a_run_s_measures(tools):
    run = {"eval_accuracy": [[0, 0.1], [12, 0.2], [24, 0.4], [36, 0.6], [48, 0.8]]}
    assert tools.pilot.final(run) == pytest.approx(0.7)  # steps 36 and 48, later than 32
    assert tools.main.claims_page.half_way(run) == 0.4
    run |= {key: run["eval_accuracy"] for key in ("eval_greedy", "eval_length", "pass_at_8")}
    run |= {"entropy": [[1, 0.5], [32, 0.1], [48, 0.6]], "response_length": [[1, 5.0], [48, 9.0]]}
    seen = tools.main.claims_page.measures(run | {"tokens": 1500, "updates": 96})
    assert seen["entropy"] == 0.6 and seen["entropy, all steps"] == pytest.approx(0.4)
    assert seen["length"] == 9.0 and seen["length, all steps"] == 7.0 and seen["start"] == 0.1


def test_every_claim_names_arms_that_exist(tools):
    plan = json.loads(tools.plan.PLAN.read_text(encoding="utf-8"))
    assert [c["id"] for c in plan["claims"]] == list(range(1, 15))
    assert len(plan["common"]["seeds"]) == 10
    assert not set(plan["common"]["seeds"]) & set(plan["pilot"]["seeds"])
    from run import option_checks

    for arm, seed in tools.plan.wanted(plan):
        assert arm in plan["arms"] and seed > 100
    for arm in plan["arms"]:
        flags = tools.plan.options_of(plan, arm, CHOSEN).split()
        steps = option_checks.parse([*flags, "--out", "/nonexistent/run"], "").steps
        known = {"short": 36, "long": 36, "real": 24, "bupo-watched": 25, "grpo-watched": 25}
        assert steps == known.get(arm, known.get(arm.partition("-")[0], 48))


def test_worlds_are_made_where_they_are_needed(tools, tmp_path, monkeypatch):
    """Only those that a missing run starts from, and once."""
    asked = []

    def make(command):
        asked.append(command)
        folder = tmp_path / "runs" / "worlds" / "short"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(tools.runs, "ROOT", tmp_path)
    monkeypatch.setattr(tools.runs, "one_thread", make)
    plan = json.loads(tools.plan.PLAN.read_text(encoding="utf-8"))
    jobs = [(arm, tools.plan.options_of(plan, arm, CHOSEN), 101) for arm in ("grpo", "short-dapo")]
    for _ in range(2):
        tools.runs.make_worlds(plan, jobs)
    (command,) = asked
    assert command[1] == "scripts/pretrain_tiny.py" and "0.7" in command
    worked, bare = (tools.main.shlex.split(plan["models"][name]) for name in ("short", "long"))
    differ = {worked[i - 1] for i in range(1, len(worked)) if worked[i] != bare[i]}
    assert differ == {"--worked", "--slip", "--right"}  # the teacher, mirrored, and nothing else


def test_a_claim_s_differences_are_shown(tools, capsys):
    plan = json.loads(tools.plan.PLAN.read_text(encoding="utf-8"))
    found, curves = {}, "eval_accuracy eval_greedy entropy response_length pass_at_8 eval_length"
    for n, seed in enumerate(plan["common"]["seeds"]):
        for arm, value in (("short-dapo", 0.5), ("short-dapo+B", 0.52 + 0.002 * n)):
            curve = [[step, value] for step in (0, 12, 24, 36)]
            found[arm, seed] = dict.fromkeys(curves.split(), curve) | {"tokens": 1, "updates": 1}
    short = {"id": 15, "compare": [["short-dapo+B", "short-dapo"]], "metric": "final"}
    tools.main.show(plan | {"worlds": [short]}, ["15"], found, {})
    # mean 0.02 + 0.009; all ten above 0: p = 2 / 1024
    said = capsys.readouterr().out
    assert "10 seeds, +0.0290 [+0.0247, +0.0333], sign-flip p 0.0020, 10 above 0" in said


def test_options_name_the_rate_of_the_family_the_arm_or_the_real_model(tools):
    plan = json.loads(tools.plan.PLAN.read_text(encoding="utf-8"))
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
    ends = {
        ("3", "dapo", "0.0002"): 0.97,
        ("2", "dapo", "0.0002"): 0.7,
        ("2", "grpo", "0.0004"): 0.5,
    }
    ends["2", "hapo", "0.0004"] = 0.8
    ends["2", "dapo+B", "0.0002"] = ends["2", "dapo+C", "0.0002"] = 0.55

    def measured(plan, jobs, path, made_of, real=None):
        known = tools.runs.read_runs(path)
        for name, options, _ in jobs:
            trained.append(name)
            _, arm, level, rate, seed = (
                name.rsplit("-", 4) if "e-" not in name else name.split("-", 4)
            )
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
    chosen = json.loads(tools.plan.PILOT.read_text(encoding="utf-8"))
    assert chosen["difficulty"] == 2 and chosen["rates"] == {"grpo": 4e-4, "dapo": 2e-4}
    assert chosen["own"]["hapo"] == 4e-4 and chosen["own"]["dapo"] == 2e-4
    # two seeds where one rate is clearly the best, six where another is near
    assert chosen["final, half-way"]["2 hapo 0.0004"] == [0.8, 0.8, 0.0, 2]
    assert (
        chosen["own"]["dapo+B"] == 2e-4
    )  # 0.55 against 0.58 in two seeds, (2 x 0.58 + 4 x 0.34) / 6
    # 0.55 at the smaller rate is within a standard error of 0.56
    assert chosen["own"]["dapo+C"] == 2e-4
    assert chosen["final, half-way"]["2 dapo+C 0.0004"] == [0.56, 0.56, 0.0447, 6]
    assert chosen["final, half-way"]["2 dapo+B 0.0004"] == [0.42, 0.42, 0.0506, 6]
    asked = len(trained)
    run("--pilot")  # nothing is run twice
    assert len(trained) == asked == len(set(trained))


def test_results_of_other_weights_are_refused(laid_out, tools):
    run, runs, trained, _ = laid_out
    for world in ("short", "long"):
        (runs.parent / "runs" / "worlds" / world).mkdir(parents=True)
        weights = runs.parent / "runs" / "worlds" / world / "model.safetensors"
        weights.write_bytes(b"as they were made")
    run("--only", "15")
    assert len(trained) == 40
    # printf 'as they were made' | sha256sum
    made_from = {result["weights"] for result in tools.runs.read_runs(runs).values()}
    assert made_from == {"c30bb725f67b"}
    weights.unlink()  # results of a model that is not there stay results
    run("--only", "15", "--list")
    weights.write_bytes(b"made again, otherwise")  # as on another machine
    run("--only", "15")  # both runs of each pair are of the same weights
    assert len(trained) == 40
    results = tools.runs.read_runs(runs)
    del results["long-dapo-101"]
    tools.runs.write_runs(runs, results)
    with pytest.raises(UserError, match=r"a pair of runs long-dapo and long-dapo\+B started from"):
        run("--only", "15")
    assert len(trained) == 41
    run("--only", "15", "--mixed")
    page = (runs.parent / "evidence.md").read_text(encoding="utf-8")
    assert "(other weights: long-dapo, long-dapo+B)" in page
    run("--only", "15", "--anew")  # the runs of that world, and no other
    assert len(trained) == 41 + 19
    assert "**Mixed**" not in (runs.parent / "evidence.md").read_text(encoding="utf-8")


def test_a_real_model_s_runs_start_where_the_user_says(laid_out, tools, tmp_path):
    run, runs, trained, _ = laid_out
    with pytest.raises(UserError, match="--only real B: needs --real DIR"):
        run("--only", "real B")
    run("--only", "real B", "--real", str(tmp_path / "smol"))
    assert len(trained) == 16 and all(str(tmp_path / "smol") in c for c in trained)
    result = tools.runs.read_runs(runs)["real-dapo+B-108"]
    assert " --lr 2e-05 " in result["options"] and "--model REAL" in result["options"]
    tools.plan.PILOT.write_text(
        json.dumps(CHOSEN | {"real": None}).replace('"real"', '"other"'), encoding="utf-8"
    )
    with pytest.raises(UserError, match="its learning rates come first: --pilot --real"):
        run("--real", str(tmp_path / "smol"))


def test_the_page_says_which_results_are_older(laid_out, tools, monkeypatch):
    run, runs, _, _ = laid_out
    run("--only", "1")
    older = tools.runs.read_runs(runs)
    older["dapo-101"] |= {"commit": "0123456789"}
    tools.runs.write_runs(runs, older)
    run("--only", "1", "--mixed")
    page = (runs.parent / "evidence.md").read_text(encoding="utf-8")
    assert "something else than now (other commit: dapo)" in page


def test_the_page_s_parts(tools):
    from claims_page import rates_table, sections

    text = "## One\n\nfirst\n\n## Two\nsecond\nand more\n"
    assert sections(text) == {"One": "first\n", "Two": "second\nand more\n"}
    ends = {"3 dapo 0.0002": [0.6, 0.5, 0, 6], "3 dapo 0.0004": [0.7, 0.6, 0, 6]}
    ends |= {"3 dapo 0.0008": [0.8, 0.5, 0, 2], "3 hapo 0.0001": [0.5, 0.4, 0, 2]}
    pilot = {"difficulty": 3, "rates": {"dapo": 4e-4}, "own": {"hapo": 1e-4}}
    ends["2 dapo 0.001"] = [1, 1, 0, 2]
    table = rates_table({}, pilot | {"final, half-way": ends})
    assert table.splitlines()[-4:] == [
        "| arm | 0.0001 | 0.0002 | 0.0004 | 0.0008 |",
        "|---|---|---|---|---|",
        "| dapo |  | 0.600 (6) | **0.700 (6)** | 0.800 (2) |",
        "| hapo | **0.500 (2)** |  |  |  |",
    ]


def test_notes_name_their_numbers(tools):
    from claims_page import ready_numbers, with_numbers

    ready = ready_numbers({"short": {"right": "10.0", "B": "0"}}, {1: 0.025})
    run = lambda end: {
        "eval_accuracy": [[0, 0.2], [48, end]],
        "eval_greedy": [[48, 0.9]],
        "eval_length": [[48, 9.0]],
        "entropy": [[48, 0.125]],
        "response_length": [[48, 9.0]],
        "pass_at_8": [[48, 1.0]],
        "tokens": 1000,
        "updates": 96,
    }
    ends = {"dapo": (0.5, 0.6, 0.7), "hapo": (0.6, 0.8, 0.6)}
    found = {(arm, 101 + i): run(x) for arm, own in ends.items() for i, x in enumerate(own)}
    plan = {
        "arms": dict.fromkeys(("dapo", "hapo", "edge"), {}),
        "common": {"seeds": range(101, 104)},
    }
    said = lambda text: with_numbers(text, plan, found, {}, ready)
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
    plan, chosen = (
        json.loads(path.read_text(encoding="utf-8")) for path in (tools.plan.PLAN, tools.plan.PILOT)
    )
    named = tools.plan.with_own_rates(plan, chosen)
    made_of = {run["commit"] for run in tools.runs.read_runs(tools.runs.RUNS).values()}
    found, times, _ = tools.main.results(named, chosen, made_of.pop(), True)
    page = tools.main.claims_page
    text = page.NOTES.read_text(encoding="utf-8")
    before = page.before_training(tools.runs.read_json(page.MASSES))
    ps = {claim["id"]: 1.0 for kind in page.TITLES for claim in named.get(kind, [])}
    ready = page.ready_numbers(before, ps)
    filled = page.with_numbers(text, named, found, times, ready)
    assert "{" in text and "{" not in filled and " –" not in filled


def test_effects_on_accuracy_are_shown_in_points(tools):
    from claims_page import amount, bar

    final = {"metric": "final", "smallest": 0.01}
    assert (bar(final), amount(-0.0272, final)) == ("+1", "-2.7")
    assert bar({"metric": "final", "no_worse_by": 0.01}) == "above -1"
    entropy = {"metric": "entropy", "smallest": 0.005}
    assert (bar(entropy), amount(0.0031, entropy)) == ("+0.005", "+0.003")
    assert bar({"metric": "seconds", "at_most": 0.03}) == "below +0.03"


def test_every_comparison_is_in_its_tables_picture_or_among_the_others(
    tools, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    import claims_plots

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


def test_one_layer_for_the_whole_run_is_that(tools):
    from run import option_checks

    plan = json.loads(tools.plan.PLAN.read_text(encoding="utf-8"))
    flags = tools.plan.options_of(plan, "one-layer-whole", CHOSEN).split()
    o = option_checks.parse([*flags, "--out", "/nonexistent/run"], "")
    assert o.bupo_baseline == "one-layer" and o.bupo_steps == o.steps


def test_a_run_during_which_the_sources_change_is_no_result(laid_out, tools, monkeypatch):
    run, runs, _, _ = laid_out
    said = iter(["c0ffee"])
    monkeypatch.setattr(tools.runs, "commit", lambda: next(said, "decaf"))
    with pytest.raises(UserError, match="the sources were changed while it ran"):
        run("--only", "1")
    assert not runs.exists()


def test_the_mass_table_by_hand(tools):
    from claims_page import before_training, mass_table

    # 0.5 up and 0.25 + 0.35 down: net -0.10; and what cancels to the digits shown is 0
    grpo = {"3": [0.5, -0.25], "5": [0.0, -0.35]}
    known = {
        "right": 3.04,
        "wrong": 5,
        "mass": {"GRPO's advantages": grpo, "B": {"3": [0.5, -0.504]}},
    }
    *_, head, _, row = mass_table(before_training({"short": known})).splitlines()
    assert head == "| model | right | wrong | GRPO's advantages | B |"
    assert row == "| short | 3.0 | 5.0 | −0.10 | 0 |"
    assert mass_table({}) == ""


def test_advantage_mass_by_length_by_hand(tools):
    import torch
    from advantage_mass import by_length

    # three answers whose tokens' advantages sum to 2, -1 and -1: a mass of 4
    shares = by_length(torch.tensor([2.0, -1.0, -1.0]), torch.tensor([3, 3, 5]))
    assert shares == {3: [0.5, -0.25], 5: [0.0, -0.25]}
