"""The papers' claims, tested again on the shipped model: python experiments/claims.py

Runs what is missing, two at a time with one thread each, and then makes docs/evidence.md and its
plots from experiments/claims_runs.jsonl, a line a run. Which arms, claims and seeds there are
stands in claims.json; learning rates and level in claims_pilot.json, which `--pilot` makes on other
seeds.

    --list           what is there and what is missing
    --dry-run        the same with the time it would take
    --only CLAIM ... what these claims need, and their differences
    --real DIR       also the runs of a real model, SmolLM2-135M-Instruct, that lies there
    --mixed          also use results of another commit or of other options; the page says so
    --anew           run those again
    --pilot          choose level and learning rates; with --real the real model's
    --again          after a change that should alter no number: make one run of every arm again;
                     if all are the same bit for bit, the results count for this commit too
    --cost           time claim 6 on the same answers, seed by seed; the machine should be idle

A run leaves one line; one that is killed leaves nothing and is run again. On the same machine a
line that is deleted and made again is the same, bit for bit: how long runs took stands apart.
"""

import argparse
import ast
import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import claims_page  # noqa: E402
from paired import effect  # noqa: E402

from program.command import run_main  # noqa: E402
from program.errors import BadInput  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
PLAN, PILOT, RUNS = HERE / "claims.json", HERE / "claims_pilot.json", HERE / "claims_runs.jsonl"
TIMES, COST = HERE / "claims_times.json", HERE / "claims_cost.json"
AGAIN = ROOT / "runs" / "claims" / "again.jsonl"  # what --again has made so far
SAME = HERE / "claims_same.json"  # {commit: the commit whose numbers it gives}
# what a run's numbers come from: a commit that touches no code of it is the same commit here
SOURCES = (
    "train.py losses.py hapo.py bupo.py sampling.py internals.py tasks.py evaluate.py "
    "fast grading program questions run scale assets/tiny-qwen3"
).split()
CURVES = (
    "eval_accuracy eval_greedy eval_length reward entropy response_length clip_low clip_high"
).split()


def git(*command):
    """What git says of the project; BadInput where it says nothing."""
    done = subprocess.run(
        ["git", *command], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    if done.returncode:
        raise BadInput(f"git {command[0]}: {done.stderr.strip()}; a result names its commit")
    return done.stdout


def last_commit():
    """The last commit that touched the sources; BadInput where they are not committed."""
    if git("status", "--porcelain", "--", *SOURCES).strip():
        raise BadInput("the sources have changes that are not committed; a result names its commit")
    return git("log", "-1", "--format=%H", "--", *SOURCES).strip()


def commit():
    """The last commit of the sources, or, where it changes no number, the one it is the same as:
    one that results name, or that --again has found so."""
    now = last_commit()
    same = json.loads(SAME.read_text(encoding="utf-8")) if SAME.exists() else {}
    same = dict.fromkeys(run["commit"] for run in read_runs(RUNS).values()) | same
    for known in (now, *reversed(same)):
        if known in same and (known == now or same_code(known, now)):
            return same[known] or known
    return now


def same_code(known, now):
    """Whether two commits differ in words alone; a shallow clone may lack the older one."""
    here = subprocess.run(["git", "cat-file", "-e", known], cwd=ROOT, capture_output=True)
    return here.returncode == 0 and code_of(known, git) == code_of(now, git)


def code_of(made_of, git):
    """{file: its code} of the sources at a commit: a comment or a docstring changes no number."""
    code = {}
    for path in git("ls-tree", "-r", "--name-only", made_of, "--", *SOURCES).split():
        text = git("show", f"{made_of}:{path}") if path.endswith(".py") else None
        code[path] = git("rev-parse", f"{made_of}:{path}") if text is None else without_words(text)
    return code


def without_words(text):
    """A module's syntax tree as text, its docstrings taken out."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(getattr(body[0], "value", None), ast.Constant):
                del body[0]
    return ast.dump(tree)


def options_of(plan, arm, chosen):
    """train.py's options of an arm, without seed and folder. An arm's name may end with a learning
    rate of its own: dapo@0.0001."""
    arm, _, own = arm.partition("@")
    a = plan["arms"][arm]
    rate = own or inherited(a, chosen)
    parts = [plan["common"]["options"], f"--steps {plan['common']['steps']}"]
    parts += [f"--difficulty {chosen['difficulty']} --algo {a['base']} --lr {rate}", a["options"]]
    parts += [plan["real model"]["options"]] if "real" in a else []
    return " ".join(part for part in parts if part)


def inherited(arm, chosen):
    """The learning rate of an arm's family, or the one that the plan gives it."""
    rates = chosen["real" if "real" in arm else "rates"]
    return arm.get("rate") or rates["grpo" if arm["base"] == "grpo" else "dapo"]


def with_own_rates(plan, chosen):
    """The plan, and the claims of its pilot's "own" once more with every arm at the learning rate
    that is best for it; one whose best is its family's runs no more often than before."""
    groups = []
    for claim in tuned_claims(plan) if "own" in chosen else []:
        pairs = [[at_its_own(plan, arm, chosen) for arm in pair] for pair in claim["compare"]]
        said = f"{claim['claim']}, each arm at its own learning rate"
        groups.append(claim | {"id": f"{claim['id']} own", "claim": said, "compare": pairs})
    arms = {arm for group in groups for pair in group["compare"] for arm in pair}
    named = {arm: plan["arms"][arm.partition("@")[0]] for arm in sorted(arms)}
    return plan | {"own": groups, "arms": plan["arms"] | named}


def tuned_claims(plan):
    """Those whose arms each get a learning rate of their own."""
    return [c for c in plan["claims"] + plan["worlds"] if c["id"] in plan["pilot"]["own"]["claims"]]


def at_its_own(plan, arm, chosen):
    rate = chosen["own"].get(arm)
    if rate is None:
        raise BadInput(f"{PILOT.name} has no learning rate for {arm}: run --pilot again")
    return arm if rate == inherited(plan["arms"][arm], chosen) else f"{arm}@{rate}"


def wanted(plan, only=None):
    """[(arm, seed)] of all claims, or of some."""
    groups = groups_of(plan, only)
    arms = dict.fromkeys(a for g in groups for pair in g["compare"] for a in pair if a != "start")
    seeds, real = plan["common"]["seeds"], plan["real model"]["seeds"]
    return [
        (arm, seed + plan["arms"][arm].get("seed_offset", 0))
        for n, seed in enumerate(seeds)
        for arm in arms
        if n < real or "real" not in plan["arms"][arm]
    ]


def groups_of(plan, only=None):
    """Everything that is compared, or those of some names."""
    groups = [group for kind in claims_page.TITLES for group in plan.get(kind, [])]
    if only is not None:
        known = {str(group["id"]): group for group in groups}
        for name in only:
            if name not in known:
                raise BadInput(f"--only {name}: no claim of that number or name in {PLAN}")
        groups = [known[name] for name in only]
    return groups


def make_worlds(plan, jobs):
    """The models of runs/worlds that some runs start from, where they are not there yet: minutes
    each, the same on the same machine."""
    needed = [
        name for name in plan["models"]
        if any(f"--model runs/worlds/{name} " in f"{options} " for _, options, _ in jobs)
    ]  # fmt: skip
    make_models(plan, needed)


def make_models(plan, names):
    for name in names:
        folder, options = ROOT / "runs" / "worlds" / name, plan["models"][name]
        if not (folder / "model.safetensors").is_file():
            print(f"making {folder}", flush=True)
            command = [sys.executable, "scripts/pretrain_tiny.py", "--out", str(folder)]
            done = one_thread([*command, *options.split()])
            if done.returncode:
                raise BadInput(f"{shlex.join(command)}: {done.stderr.strip()[-300:]}")


def show(plan, only, found, times):
    """The paired differences of some claims, in the claimed direction, as lines."""
    for group in groups_of(plan, only):
        for pair in group["compare"]:
            differences, _ = claims_page.comparison(plan, found, times, group, pair)
            ours, theirs = pair[:: group.get("direction", 1)]
            said = f"{ours} - {theirs}, {group['metric']}: {len(differences)} seeds"
            if len(differences) > 1:
                e = effect(differences)
                signs = sum(d > 0 for d in differences)
                said += f", {e.mean:+.4f} [{e.low:+.4f}, {e.high:+.4f}], sign-flip p {e.p:.4f}"
                said += f", {signs} above 0"
            print(said)


def one_thread(command):
    """Run a program of this project on one thread that does not spin while it waits."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, encoding="utf-8"
    )


def read_runs(path):
    """{name: result} of a file of runs."""
    runs, lines = {}, path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for n, line in enumerate(lines, 1):
        try:
            run = json.loads(line)
            runs[run.pop("name")] = run
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
            raise BadInput(f"{path.name}:{n}: no result; delete the line and run again") from None
    return runs


def write_runs(path, runs):
    """A line a run, sorted by name."""
    lines = [json.dumps({"name": name} | runs[name]) + "\n" for name in sorted(runs)]
    replace(path, "".join(lines))


def replace(path, text):
    """Write a file so that a reader finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def weights_of(options, real):
    """The start of the hash of weights that are not among the sources, where they are there."""
    model = re.findall(r"--model (\S+)", options)[-1]  # the last one is the one that counts
    weights = (ROOT / (real or model if model == "REAL" else model)) / "model.safetensors"
    if model in SOURCES or not weights.is_file():
        return {}
    return {"weights": hashlib.sha256(weights.read_bytes()).hexdigest()[:12]}


def run_one(name, options, seed, made_of, real):
    """Train in a process of its own: (result, seconds)."""
    out = ROOT / "runs" / "claims" / name
    started_from = weights_of(options, real)
    given = [real if part == "REAL" else part for part in shlex.split(options)]
    command = [sys.executable, "train.py", *given, "--seed", str(seed)]
    command += ["--out", str(out), "--overwrite"]
    started = time.time()
    done = one_thread(command)
    if done.returncode:
        raise BadInput(f"run {name} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    lines = [
        json.loads(line)
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    asked = int(re.findall(r"--steps (\d+)", options)[-1])  # the last one is the one that counts
    if lines[-1]["step"] != asked:  # a run that is told to stop ends with 0 all the same
        raise BadInput(f"run {name} was stopped at step {lines[-1]['step']} of {asked}")
    if commit() != made_of:
        raise BadInput(f"run {name}: the sources were changed while it ran")
    shutil.rmtree(out)
    result = {"options": options, "commit": made_of, "seed": seed, **started_from, **curves(lines)}
    return result, time.time() - started


def curves(lines):
    """What is kept of metrics.jsonl."""
    kept = {}
    for key in CURVES:
        kept[key] = [[m["step"], round(m[key], 6)] for m in lines if key in m]
    kept["pass_at_8"] = [  # of the groups that were trained on
        [m["step"], round(1 - m["all_wrong"] / m["groups"], 6)] for m in lines if "groups" in m
    ]
    watched = [m for m in lines if "diagnose_cosine" in m]
    kept["similarity"] = [[m["step"], round(m["diagnose_cosine"][-1], 6)] for m in watched]
    steps = [m for m in lines if "seconds_update" in m]
    kept["updates"] = sum(m["updates"] for m in steps)
    kept["tokens"] = int(sum(m["response_length"] * 8 * m["groups"] for m in steps))
    return kept


def differs(result, options, made_of, real=None):
    """{what: value} of what a result was made with, where it is not what it is now."""
    now = {"options": options, "commit": made_of} | weights_of(options, real)
    return {what: result.get(what) for what, value in now.items() if result.get(what) != value}


def same_as_now(result, options, made_of, real=None):
    return result is not None and not differs(result, options, made_of, real)


def run_missing(plan, jobs, path, made_of, real=None):
    """Run [(name, options, seed)], two at a time, into a file of runs; note how long each took."""
    make_worlds(plan, jobs)
    runs = read_runs(path)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = {pool.submit(run_one, *job, made_of, real): job[0] for job in jobs}
        try:
            for n, future in enumerate(concurrent.futures.as_completed(waiting), 1):
                name, (result, seconds) = waiting.pop(future), future.result()
                runs[name] = result
                keep(path, runs, name, seconds)
                print(f"{n}/{len(jobs)}  {name}  {seconds:.0f} s", flush=True)
        finally:  # after a failure or Ctrl-C nothing new starts; what is in flight may still end
            pool.shutdown(cancel_futures=True)
            for future, name in waiting.items():
                if not future.cancelled() and not future.exception():
                    runs[name], seconds = future.result()
                    keep(path, runs, name, seconds)


def keep(path, runs, name, seconds):
    """A finished run among the others, and its time."""
    write_runs(path, runs)
    if path == RUNS:
        times = json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.exists() else {}
        times[name] = max(0.001, round(seconds, 3))
        replace(TIMES, json.dumps(times, indent=0, sort_keys=True) + "\n")


# ------------------------------------------------------------------------------------------- pilot


def pilot(plan, real=None):
    """Level and learning rates, chosen on seeds of their own; writes claims_pilot.json. With `real`
    the learning rates of the real model that lies there."""
    made_of = commit()
    if real:
        p, chosen = plan["real model"]["pilot"], json.loads(PILOT.read_text(encoding="utf-8"))
        tried = {f"real-{base}": p["learning_rates"] for base in p["baselines"]}
        rates, table = choose(plan, tried, chosen, p, made_of, real)
        chosen["real"] = {base: rates[f"real-{base}"] for base in p["baselines"]}
        chosen["final, half-way"] |= table
    else:
        chosen = level_and_rates(plan, made_of)
    replace(PILOT, json.dumps(chosen, indent=1) + "\n")
    print(json.dumps(chosen, indent=1))


def level_and_rates(plan, made_of):
    """The first level that fits, a learning rate for each family and for each arm of its own."""
    p, table = plan["pilot"], {}
    for level in p["difficulties"]:
        tried = dict.fromkeys(p["baselines"], p["learning_rates"])
        rates, ends = choose(plan, tried, {"difficulty": level}, p, made_of)
        table |= ends
        if fits(level, table, rates):
            break
    else:
        raise BadInput(f"no level of {p['difficulties']} leaves room for a comparison: {table}")
    chosen = {"difficulty": level, "rates": rates, "commit": made_of}
    before = json.loads(PILOT.read_text(encoding="utf-8")) if PILOT.exists() else {}
    if "real" in before:  # has a pilot of its own
        chosen["real"] = before["real"]
        table |= {k: v for k, v in before["final, half-way"].items() if " real-" in k}
    arms = dict.fromkeys(
        arm for claim in tuned_claims(plan) for pair in claim["compare"] for arm in pair
    )
    factors = p["own"]["factors"]
    tried = {arm: [f * inherited(plan["arms"][arm], chosen) for f in factors] for arm in arms}
    own, ends = choose(plan, tried, chosen, p, made_of)
    return chosen | {"own": own, "final, half-way": table | ends}


def choose(plan, tried, chosen, p, made_of, real=None):
    """Of {arm: learning rates} one for each arm, and the table of try_out: the smallest that ends
    within a standard error of the best. Those near the best get more seeds before that is asked:
    two seeds tell a collapse, and little else."""
    table = try_out(plan, tried, chosen, p["seeds"], made_of, real)
    end = lambda arm, rate: table[key_of(chosen["difficulty"], arm, rate)][0]
    near = {}
    for arm, rates in tried.items():
        bar = max(end(arm, rate) for rate in rates) - p["near"]
        near[arm] = [rate for rate in rates if end(arm, rate) >= bar]
    several = {arm: rates for arm, rates in near.items() if len(rates) > 1}
    table |= try_out(plan, several, chosen, p["seeds"] + p["more seeds"], made_of, real)
    chosen_rates = {}
    for arm, rates in near.items():
        best = max(rates, key=lambda rate: end(arm, rate))
        bar = end(arm, best) - table[key_of(chosen["difficulty"], arm, best)][2]
        chosen_rates[arm] = min(rate for rate in rates if end(arm, rate) >= bar)
    return chosen_rates, table


def try_out(plan, tried, chosen, seeds, made_of, real=None):
    """Runs of {arm: learning rates}: {level, arm and rate: [final, half-way, the first's standard
    error, seeds]}, means."""
    level, jobs = chosen["difficulty"], {}
    for arm, rates in tried.items():
        for rate in rates:
            options = options_of(plan, f"{arm}@{rate}", chosen)
            jobs[key_of(level, arm, rate)] = [
                (f"pilot-{arm}-{level}-{rate}-{seed}", options, seed) for seed in seeds
            ]
    runs, every = read_runs(RUNS), [job for several in jobs.values() for job in several]
    missing = [job for job in every if not same_as_now(runs.get(job[0]), job[1], made_of, real)]
    run_missing(plan, missing, RUNS, made_of, real)
    runs, measures = read_runs(RUNS), (final, claims_page.half_way)
    return {
        key: [mean_of([runs[name] for name, _, _ in several], measure) for measure in measures]
        + [standard_error([final(runs[name]) for name, _, _ in several]), len(several)]
        for key, several in jobs.items()
    }


def key_of(level, arm, rate):
    return f"{level} {arm} {rate}"


def fits(level, table, rates):
    """Whether the best baseline ends between 60 and 95 %, and GRPO has room half-way."""
    ends = {base: table[key_of(level, base, rate)] for base, rate in rates.items()}
    return 0.6 <= max(end for end, *_ in ends.values()) <= 0.95 and ends["grpo"][1] <= 0.95


def standard_error(values):
    """Of a mean; of a single value none is known: 0."""
    return round(statistics.stdev(values) / len(values) ** 0.5, 4) if len(values) > 1 else 0.0


def mean_of(runs, measure):
    return round(sum(map(measure, runs)) / len(runs), 4)


def final(run):
    """Held-out accuracy, mean of the evaluations in the last third."""
    return claims_page.late(run, "eval_accuracy")


# -------------------------------------------------------------------------------------------- cost


def time_steps(plan, chosen):
    """Seconds of a whole step of DAPO and of HAPO on the same answers, for every seed, into COST:
    medians of 25 steps taken in turn, in one process, with the answers of the policy half-way."""
    seconds = {}
    for seed in plan["common"]["seeds"]:
        options = options_of(plan, "hapo", chosen)
        half = str(plan["common"]["steps"] // 2)
        command = [sys.executable, "benchmarks/hapo_cost.py", "--json", "--after", half]
        command += ["--rounds", "25", "--options", f"{options} --seed {seed}"]
        done = one_thread(command)
        if done.returncode:
            raise BadInput(f"{shlex.join(command)}: {done.stderr.strip()[-300:]}")
        for arm, median in json.loads(done.stdout.splitlines()[-1]).items():
            seconds[f"{arm}-{seed}, same answers"] = round(median, 4)
        print(f"seed {seed}: {done.stdout.splitlines()[-1]}", flush=True)
    replace(COST, json.dumps({"commit": commit(), **seconds}, indent=0) + "\n")


# ------------------------------------------------------------------------------------------- change


def run_again(plan, chosen, now, real=None):
    """One run of every arm with the code as it is, against the results; notes in SAME that they are
    the same, bit for bit, or raises BadInput with the first that is not."""
    jobs, seeds = [], {}
    for arm, seed in runnable(plan, chosen, None, real):
        seeds.setdefault(arm, []).append(seed)
    for i, arm in enumerate(seeds):
        seed = seeds[arm][i % len(seeds[arm])]  # another one for every arm
        jobs.append((f"{arm}-{seed}", options_of(plan, arm, chosen), seed))
    runs, begun = read_runs(RUNS), read_runs(AGAIN)
    if not real and any(name.startswith("real-") for name in runs):
        raise BadInput(f"--again: needs --real DIR, too, {plan['real model']['what']}")
    missing = [name for name, _, _ in jobs if name not in runs]
    if missing:
        raise BadInput(f"no result to compare with of {', '.join(missing)}: run claims.py first")
    before = {name: runs[name] for name, _, _ in jobs}
    made_of = {result["commit"] for result in before.values()}
    if len(made_of) > 1:
        raise BadInput(f"the results are of several commits: {', '.join(sorted(made_of))}")
    if any(result["commit"] != now for result in begun.values()):
        AGAIN.unlink()  # begun with other code
        begun = {}
    run_missing(plan, [job for job in jobs if job[0] not in begun], AGAIN, now, real)
    again = read_runs(AGAIN)
    for name, result in before.items():
        for key in result.keys() - {"commit"}:
            if again[name][key] != result[key]:
                raise BadInput(f"{name}: {key} is not what it was; the results are of other code")
    same = json.loads(SAME.read_text(encoding="utf-8")) if SAME.exists() else {}
    replace(SAME, json.dumps(same | {now: made_of.pop()}, indent=0) + "\n")
    AGAIN.unlink()
    print(f"a run of each of {len(jobs)} arms came out the same, bit for bit")


# -------------------------------------------------------------------------------------------- main


def runnable(plan, chosen, only, real):
    """What is wanted, less the real model's runs where no folder holds it."""
    jobs, arms = wanted(plan, only), plan["arms"]
    if real and "real" not in chosen:
        raise BadInput(f"--real {real}: its learning rates come first: --pilot --real {real}")
    if only and not real and any("real" in arms[arm] for arm, _ in jobs):
        raise BadInput(f"--only {' '.join(only)}: needs --real DIR, {plan['real model']['what']}")
    return [(arm, seed) for arm, seed in jobs if real or "real" not in arms[arm]]


def results(plan, chosen, made_of, mixed, real):
    """What is there: {(arm, seed): result}, times, and, if `mixed`, {what: arms} of results that
    were made with something else than now. If not, they are refused."""
    found, times, other, runs = {}, {}, {}, read_runs(RUNS)
    for arm, seed in wanted(plan):
        name = f"{arm}-{seed}"
        if name not in runs:
            continue
        found[arm, seed] = runs[name]
        for what, value in differs(
            runs[name], options_of(plan, arm, chosen), made_of, real
        ).items():
            other.setdefault(what, set()).add(arm)
            if not mixed:
                raise BadInput(
                    f"{RUNS.name}, run {name}: made with other {what} than now ({value}); run it "
                    "again with --anew, or use it with --mixed"
                )
    for path in (TIMES, COST):
        times |= json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if times.pop("commit", None) != made_of and not mixed:  # the steps timed by --cost
        times = {key: value for key, value in times.items() if "," not in key}
    return found, times, other


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group()
    for flag in ("--list", "--dry-run", "--pilot", "--cost", "--again"):
        mode.add_argument(flag, action="store_true")
    for flag in ("--mixed", "--anew"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--real")
    a, plan = parser.parse_args(), json.loads(PLAN.read_text(encoding="utf-8"))
    if not PILOT.exists() and (a.real or not a.pilot):
        raise BadInput(f"{PILOT.name} is missing: python experiments/claims.py --pilot comes first")
    if a.pilot:
        return pilot(plan, a.real)
    chosen, made_of = json.loads(PILOT.read_text(encoding="utf-8")), commit()
    plan = with_own_rates(plan, chosen)
    if a.cost:
        return time_steps(plan, chosen)
    if a.again:
        return run_again(plan, chosen, made_of, a.real)
    there, jobs = read_runs(RUNS), []
    for arm, seed in runnable(plan, chosen, a.only, a.real):
        name, options = f"{arm}-{seed}", options_of(plan, arm, chosen)
        enough = same_as_now(there.get(name), options, made_of, a.real) if a.anew else name in there
        if not enough:
            jobs.append((name, options, seed))
        if a.list:
            print(f"{'there  ' if enough else 'missing'}  {name}")
    if a.list or a.dry_run:
        print(f"{len(jobs)} runs missing, about {hours(jobs):.1f} hours, two at a time")
        return
    make_worlds(plan, jobs)
    mixed = a.mixed or a.anew
    results(plan, chosen, made_of, mixed, a.real)  # better refused now than after hours
    run_missing(plan, jobs, RUNS, made_of, a.real)
    found, times, other = results(plan, chosen, made_of, mixed, a.real)
    if a.only:
        show(plan, a.only, found, times)
    print(f"the page: {claims_page.write(plan, chosen, found, times, other)}")


def hours(jobs):
    """How long runs take, two at a time: as long as their arm did on the median, or all arms."""
    times = json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.exists() else {"": 140}
    own = {}
    for name, seconds in times.items():
        own.setdefault(name.rpartition("-")[0], []).append(seconds)
    usual = statistics.median(times.values())
    each = [statistics.median(own.get(name.rpartition("-")[0], [usual])) for name, _, _ in jobs]
    return sum(each) / 2 / 3600


if __name__ == "__main__":
    run_main(main)
