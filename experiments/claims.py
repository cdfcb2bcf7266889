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
    --again          after a change that should alter no number: a short run of every arm with the
                     code of the results and with the code as it is; if all are the same bit for
                     bit, the results count for this commit too
    --cost           time claim 6 on the same answers, seed by seed; the machine should be idle

A run leaves one line; one that is killed leaves nothing and is run again. On the same machine a
line that is deleted and made again is the same, bit for bit: how long runs took stands apart.
"""

import argparse
import json
import pathlib
import shlex
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import claims_again  # noqa: E402
import claims_page  # noqa: E402
import claims_pilot  # noqa: E402
import claims_plan  # noqa: E402
import claims_runs  # noqa: E402
from claims_plan import groups_of, options_of, wanted  # noqa: E402
from claims_runs import differs, read_json, read_runs, replace, same_as_now  # noqa: E402
from paired import effect  # noqa: E402

from common.command import run_main  # noqa: E402
from common.errors import UserError  # noqa: E402

COST = claims_runs.HERE / "claims_cost.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group()
    for flag in ("--list", "--dry-run", "--pilot", "--cost", "--again"):
        mode.add_argument(flag, action="store_true")
    for flag in ("--mixed", "--anew"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--real")
    a, plan = parser.parse_args(), read_json(claims_plan.PLAN)
    chosen = read_json(claims_plan.PILOT)
    if not chosen and (a.real or not a.pilot):
        raise UserError(
            f"{claims_plan.PILOT} is missing: experiments/claims.py --pilot comes first"
        )
    if a.pilot:
        return claims_pilot.pilot(plan, a.real)
    made_of = claims_runs.commit()
    plan = claims_plan.with_own_rates(plan, chosen)
    if a.cost:
        return time_steps(plan, chosen)
    if a.again:
        jobs = runnable(plan, chosen, None, a.real)
        return claims_again.run_again(plan, chosen, jobs, a.real)
    there, jobs = read_runs(claims_runs.RUNS), []
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
    claims_runs.make_worlds(plan, jobs)
    mixed = a.mixed or a.anew
    results(plan, chosen, made_of, mixed)  # better refused now than after hours
    claims_runs.run_missing(plan, jobs, claims_runs.RUNS, made_of, a.real)
    found, times, other = results(plan, chosen, made_of, mixed)
    if a.only:
        show(plan, a.only, found, times)
    print(f"the page: {claims_page.write(plan, chosen, found, times, other)}")


def hours(jobs):
    """How long runs take, two at a time: as long as their arm did on the median, or all arms."""
    times, own = read_json(claims_runs.TIMES, {"": 140}), {}
    for name, seconds in times.items():
        own.setdefault(name.rpartition("-")[0], []).append(seconds)
    usual = statistics.median(times.values())
    each = [statistics.median(own.get(name.rpartition("-")[0], [usual])) for name, _, _ in jobs]
    return sum(each) / 2 / 3600


def runnable(plan, chosen, only, real):
    """What is wanted, less the real model's runs where no folder holds it."""
    jobs, arms = wanted(plan, only), plan["arms"]
    if real and "real" not in chosen:
        raise UserError(f"--real {real}: its learning rates come first: --pilot --real {real}")
    if only and not real and any("real" in arms[arm] for arm, _ in jobs):
        raise UserError(f"--only {' '.join(only)}: needs --real DIR, {plan['real model']['what']}")
    return [(arm, seed) for arm, seed in jobs if real or "real" not in arms[arm]]


def results(plan, chosen, made_of, mixed):
    """What is there: {(arm, seed): result}, times, and, if `mixed`, {what: arms} of results that
    were made with something else than now. If not, they are refused."""
    found, times, other, runs = {}, {}, {}, read_runs(claims_runs.RUNS)
    for arm, seed in wanted(plan):
        name = f"{arm}-{seed}"
        if name not in runs:
            continue
        found[arm, seed] = runs[name]
        now = {"options": options_of(plan, arm, chosen), "commit": made_of}
        for what, value in differs(runs[name], **now).items():
            other.setdefault(what, set()).add(arm)
            if not mixed:
                raise UserError(
                    f"{claims_runs.RUNS.name}, run {name}: made with other {what} than now "
                    f"({value}); run it again with --anew, or use it with --mixed"
                )
    for a, b in unlike_pairs(plan, found):  # a world's model, made again on another machine
        other.setdefault("weights", set()).update((a, b))
        if not mixed:
            raise UserError(
                f"{claims_runs.RUNS.name}: of a pair of runs {a} and {b} started from different "
                "weights; run both again with --anew, or use them with --mixed"
            )
    for path in (claims_runs.TIMES, COST):
        times |= read_json(path)
    if times.pop("commit", None) != made_of and not mixed:  # the steps timed by --cost
        times = {key: value for key, value in times.items() if "," not in key}
    return found, times, other


def unlike_pairs(plan, found):
    """Pairs of arms that are compared, of which two runs of a seed started from other weights."""
    for group in groups_of(plan):
        for ours, theirs in group["compare"]:
            for seed in plan["common"]["seeds"]:
                pair = [found.get((arm, seed)) for arm in (ours, theirs)]
                if all(pair) and pair[0].get("weights") != pair[1].get("weights"):
                    yield ours, theirs


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


def time_steps(plan, chosen):
    """Seconds of a whole step of DAPO and of HAPO on the same answers, for every seed, into COST:
    medians of 25 steps taken in turn, in one process, with the answers of the policy half-way."""
    seconds = {}
    for seed in plan["common"]["seeds"]:
        options = options_of(plan, "hapo", chosen)
        half = str(plan["common"]["steps"] // 2)
        command = [sys.executable, "experiments/benchmarks/hapo_cost.py", "--json", "--after", half]
        command += ["--rounds", "25", "--options", f"{options} --seed {seed}"]
        done = claims_runs.one_thread(command)
        if done.returncode:
            raise UserError(f"{shlex.join(command)}: {done.stderr.strip()[-300:]}")
        for arm, median in json.loads(done.stdout.splitlines()[-1]).items():
            seconds[f"{arm}-{seed}, same answers"] = round(median, 4)
        print(f"seed {seed}: {done.stdout.splitlines()[-1]}", flush=True)
    replace(COST, json.dumps({"commit": claims_runs.commit(), **seconds}, indent=0) + "\n")


if __name__ == "__main__":
    run_main(main)
