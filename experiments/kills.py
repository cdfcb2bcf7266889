"""kill -9 a run at random moments, resume it, and compare its end with a run that was never killed.

    python experiments/kills.py [--kills 30] [--steps 100] [--seed 0] [-- more options of train.py]

The run is resumed after each kill. Prints where every life ended, and at last whether weights and
metrics are the same, bit for bit.
"""

import argparse
import filecmp
import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TIMES = ("seconds_generate", "seconds_score", "seconds_update", "tokens_per_second")


def start(out, options, log):
    command = [sys.executable, "train.py", "--out", str(out), *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def finish(out, options, log, name):
    """Run to the end, or leave with what it has printed last."""
    if start(out, options, log).wait():
        sys.exit(f"{name} failed: {open(log.name, encoding='utf-8').read()[-2000:]}")


def metrics(out):
    rows = [json.loads(line) for line in open(out / "metrics.jsonl", encoding="utf-8")]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def what_is_left(out):
    """A killed run's folder, in words."""
    saved = sorted(int(p.name.split("-")[1]) for p in out.glob("checkpoint-*"))
    lines = 0
    if (out / "metrics.jsonl").exists():
        lines = len(open(out / "metrics.jsonl", encoding="utf-8").readlines())
    unfinished = " (killed while saving)" if list(out.glob(".checkpoint-*")) else ""
    return f"checkpoints {saved}, {lines} lines of metrics{unfinished}"


def kill_and_resume(out, options, log, args):
    """Start or resume the run and kill it, again and again; returns the number of kills."""
    rng = random.Random(args.seed)
    for deaths in range(args.kills):
        process = start(out, options, log)
        time.sleep(rng.uniform(0.0, args.longest))
        if process.poll() is not None:
            advice = "raise --steps or lower --longest"
            print(f"the run ended by itself after {deaths} kills; {advice}")
            return deaths
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"kill {deaths + 1:2d}: {what_is_left(out)}", flush=True)
    return args.kills


def compare(whole, killed, deaths):
    """Print whether both runs ended the same; returns it."""
    weights = [out / "final" / "model.safetensors" for out in (whole, killed)]
    same_weights = filecmp.cmp(*weights, shallow=False)
    same_metrics = metrics(whole) == metrics(killed)
    print(
        f"{deaths} kills: final weights {'are the same, bit for bit' if same_weights else 'DIFFER'}"
        f"; metrics {'are the same' if same_metrics else 'DIFFER'}"
    )
    return same_weights and same_metrics


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--longest", type=float, default=15.0, help="seconds a life may last")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("more", nargs="*", help="options for train.py")
    args = parser.parse_args()
    options = ["--steps", str(args.steps), *args.more]
    with (
        tempfile.TemporaryDirectory() as folder,
        open(pathlib.Path(folder) / "log", "w", encoding="utf-8") as log,
    ):
        whole, killed = pathlib.Path(folder) / "whole", pathlib.Path(folder) / "killed"
        finish(whole, options, log, "the run without kills")
        deaths = kill_and_resume(killed, [*options, "--resume"], log, args)
        finish(killed, [*options, "--resume"], log, "the last resume")
        sys.exit(0 if compare(whole, killed, deaths) else 1)


if __name__ == "__main__":
    main()
