"""The runs of claims.py: making those that are missing, their file, and the code they are of."""

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

import torch

from common.errors import UserError

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
RUNS, TIMES = HERE / "claims_runs.jsonl", HERE / "claims_times.json"
MASSES = HERE / "claims_mass.json"
SAME = HERE / "claims_same.json"  # {commit: the commit whose numbers it gives}
# what a run's numbers come from: a commit that touches no code of it is the same commit here
SOURCES = (
    "train.py losses.py hapo.py bupo.py sampling.py internals.py tasks.py evaluate.py "
    "common engine problems run assets/tiny-qwen3"
).split()
CURVES = (
    "eval_accuracy eval_greedy eval_length reward entropy response_length clip_low clip_high"
).split()


# -------------------------------------------------------------------------------------- the code


def git(*command):
    """What git says of the project; UserError where it says nothing."""
    done = subprocess.run(
        ["git", *command], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    if done.returncode:
        raise UserError(f"git {command[0]}: {done.stderr.strip()}; a result names its commit")
    return done.stdout


def last_commit():
    """The last commit that touched the sources; UserError where they are not committed."""
    if git("status", "--porcelain", "--", *SOURCES).strip():
        raise UserError(
            "the sources have changes that are not committed; a result names its commit"
        )
    return git("log", "-1", "--format=%H", "--", *SOURCES).strip()


def commit():
    """The last commit of the sources, or, where it changes no number, the one it is the same as:
    one that results name, or that --again has found so."""
    now = last_commit()
    same = read_json(SAME)
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


# ------------------------------------------------------------------------------------- their file


def read_runs(path):
    """{name: result} of a file of runs."""
    runs, lines = {}, path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for n, line in enumerate(lines, 1):
        try:
            run = json.loads(line)
            runs[run.pop("name")] = run
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
            raise UserError(f"{path.name}:{n}: no result; delete the line and run again") from None
    return runs


def write_runs(path, runs):
    """A line a run, sorted by name."""
    lines = [json.dumps({"name": name} | runs[name]) + "\n" for name in sorted(runs)]
    replace(path, "".join(lines))


def late(run, key):
    """Mean of a curve over the last third of the steps."""
    last = run["eval_accuracy"][-1][0]
    return statistics.mean(value for step, value in run[key] if step > 2 * last / 3)


def read_json(path, otherwise=None):
    """What a file of results holds; `otherwise`, or nothing, where there is none yet."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return otherwise or {}


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


def differs(result, **now):
    """{what: value} of what a result was made with, where it is not what it is now."""
    return {what: result.get(what) for what, value in now.items() if result.get(what) != value}


def same_as_now(result, options, made_of, real=None):
    now = {"options": options, "commit": made_of} | weights_of(options, real)
    return result is not None and not differs(result, **now)


def keep(path, runs, name, seconds):
    """A finished run among the others, and its time."""
    write_runs(path, runs)
    if path == RUNS:
        times = read_json(TIMES) | {name: max(0.001, round(seconds, 3))}
        replace(TIMES, json.dumps(times, indent=0, sort_keys=True) + "\n")


# ----------------------------------------------------------------------------------- making them


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
            print(f"making {folder} (minutes)", flush=True)
            command = [sys.executable, "scripts/pretrain_tiny.py", "--out", str(folder)]
            done = one_thread([*command, *options.split()])
            if done.returncode:
                raise UserError(f"{shlex.join(command)}: {done.stderr.strip()[-300:]}")


def one_thread(command, code=None):
    """Run a program of this project, or of the one in another folder, on one thread that does not
    spin while it waits."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.run(
        command, cwd=code or ROOT, env=env, capture_output=True, text=True, encoding="utf-8"
    )


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
        raise UserError(f"run {name} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    lines = [
        json.loads(line)
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    asked = int(re.findall(r"--steps (\d+)", options)[-1])  # the last one is the one that counts
    if lines[-1]["step"] != asked:  # a run that is told to stop ends with 0 all the same
        raise UserError(f"run {name} was stopped at step {lines[-1]['step']} of {asked}")
    if commit() != made_of:
        raise UserError(f"run {name}: the sources were changed while it ran")
    shutil.rmtree(out)
    made_with = {"options": options, "commit": made_of, "machine": machine(), "seed": seed}
    return {**made_with, **started_from, **curves(lines)}, time.time() - started


def machine():
    """What rounding hangs on, besides the code: PyTorch's version, and the widest instructions that
    it finds in the processor."""
    return f"PyTorch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


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
