"""claims.py --again: does the code as it is give the numbers of the code that made the results?

A short run of every arm with both, side by side on this machine, so that the results may be of
another machine. If weights and metrics are the same, bit for bit, results of the older commit count
for this one too (claims_same.json).
"""

import concurrent.futures
import contextlib
import hashlib
import json
import re
import shlex
import shutil
import sys

import claims_runs
from claims_plan import options_of

from common import renamed
from common.errors import UserError

AGAIN = claims_runs.ROOT / "runs" / "claims" / "again.json"  # the arms that are the same so far
SHORT = 8  # steps, two updates each; a first phase is run to its end and a step beyond it
REAL = "--dtype float32 --steps 2"  # bfloat16 takes hours on a processor that has none
# what a step says of its time
TIMES = ("seconds_generate", "seconds_score", "seconds_update", "tokens_per_second")


def run_again(plan, chosen, jobs, real=None):
    """[(arm, seed)] of a plan: an arm is run with one of its seeds, another one for every arm. The
    real model's arms, many minutes each, are run where --real says where it lies."""
    runs, seeds, now = claims_runs.read_runs(claims_runs.RUNS), {}, claims_runs.last_commit()
    for arm, seed in jobs:
        seeds.setdefault(arm, []).append(seed)
    made_of = {runs[f"{arm}-{seed}"]["commit"] for arm, seed in jobs if f"{arm}-{seed}" in runs}
    if len(made_of) != 1:
        raise UserError(f"the results are of {len(made_of)} commits: {', '.join(sorted(made_of))}")
    (before,) = made_of
    short = [
        (f"{arm}-{own[i % len(own)]}", short_options(plan, arm, chosen, real), own[i % len(own)])
        for i, (arm, own) in enumerate(seeds.items())
    ]
    same, both_codes = claims_runs.read_json(AGAIN), f"{before} {now}"
    if same.get("codes") != both_codes:  # nothing yet, or of other code
        same = {"codes": both_codes, "arms": []}
    short = [job for job in short if job[0] not in same["arms"]]
    claims_runs.make_models(plan, plan["models"])
    with code_at(before) as old, concurrent.futures.ThreadPoolExecutor(2) as pool:
        both = lambda job: [short_run(code, *job) for code in (old, claims_runs.ROOT)]
        waiting = {pool.submit(both, job): job[0] for job in short}
        try:
            for n, future in enumerate(concurrent.futures.as_completed(waiting), 1):
                (was, is_now), name = future.result(), waiting[future]
                for what in was.keys() | is_now.keys():
                    if was.get(what) != is_now.get(what):
                        raise UserError(f"{name}: {what} is not what it was at {before[:7]}")
                same["arms"].append(name)
                claims_runs.replace(AGAIN, json.dumps(same) + "\n")
                print(f"{n}/{len(short)}  {name}  the same", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    if claims_runs.last_commit() != now:
        raise UserError("the sources were changed while they ran")
    known = claims_runs.read_json(claims_runs.SAME) | {now: before}
    claims_runs.replace(claims_runs.SAME, json.dumps(known, indent=0) + "\n")
    AGAIN.unlink()
    print(f"short runs of {len(same['arms'])} arms came out the same, bit for bit")


def short_options(plan, arm, chosen, real):
    """An arm's options for a few steps, its models where any folder finds them."""
    options = options_of(plan, arm, chosen).replace("REAL", str(real))
    options = options.replace("runs/worlds/", f"{claims_runs.ROOT}/runs/worlds/")
    last = lambda flag: int((re.findall(rf"{flag} (\d+)", options) or [0])[-1])
    options += f" {REAL}" if "real" in plan["arms"][arm] else ""
    steps = min(last("--steps"), max(SHORT, last("--bupo-steps") + 1))
    return f"{options} --steps {steps} --eval-every {steps} --save-every {steps} --eval-prompts 64"


@contextlib.contextmanager
def code_at(commit):
    """A folder that holds the project as it was at a commit, while it is needed."""
    folder = claims_runs.ROOT / "runs" / "claims" / f"code-{commit[:7]}"
    shutil.rmtree(folder, ignore_errors=True)
    claims_runs.git("worktree", "prune")
    claims_runs.git("worktree", "add", "--detach", str(folder), commit)
    try:
        yield folder
    finally:
        claims_runs.git("worktree", "remove", "--force", str(folder))


def flag(name):
    return name.replace("_", "-")


def short_run(code, name, options, seed):
    """{what: value} that a run with the project in some folder leaves: the hash of its last
    weights, and its metrics but for times, a list each."""
    out = code / "runs" / "again" / name
    if not (code / "common" / "renamed.py").exists():  # code from before some options were renamed
        for old, new in renamed.OPTIONS.items():
            options = re.sub(rf"--{flag(new)}(?= |$)", f"--{flag(old)}", options)
    command = [sys.executable, "train.py", *shlex.split(options), "--seed", str(seed)]
    done = claims_runs.one_thread([*command, "--out", str(out), "--overwrite"], code)
    if done.returncode:
        raise UserError(f"run {name} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    weights = (out / "final" / "model.safetensors").read_bytes()
    left = {"weights": hashlib.sha256(weights).hexdigest()}
    for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        for key, value in renamed.with_new_names(json.loads(line), renamed.METRICS).items():
            if key not in TIMES:
                left.setdefault(key, []).append(value)
    shutil.rmtree(out)
    return left
