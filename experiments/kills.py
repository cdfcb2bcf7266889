"""kill -9 a run at random moments, resume it each time, and compare its end with a run that was never killed.

    python experiments/kills.py [--kills 30] [--steps 100] [--seed 0] [-- more options of train.py]

Prints where every life ended, and at last whether weights and metrics are the same, bit for bit.
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
    return subprocess.Popen(
        [sys.executable, "train.py", "--out", str(out), *options],
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def metrics(out):
    return [
        {k: v for k, v in json.loads(line).items() if k not in TIMES}
        for line in open(out / "metrics.jsonl")
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--longest", type=float, default=15.0, help="seconds a life may last")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("more", nargs="*", help="options for train.py")
    args = parser.parse_args()
    rng, options = random.Random(args.seed), ["--steps", str(args.steps), *args.more]
    with tempfile.TemporaryDirectory() as folder, open(pathlib.Path(folder) / "log", "w") as log:
        whole, killed = pathlib.Path(folder) / "whole", pathlib.Path(folder) / "killed"
        if start(whole, options, log).wait():
            sys.exit(f"the run without kills failed: {open(log.name).read()[-2000:]}")
        deaths = 0
        while deaths < args.kills:
            process = start(killed, [*options, "--resume"], log)
            time.sleep(rng.uniform(0.0, args.longest))
            if process.poll() is not None:
                print(
                    f"the run ended by itself after {deaths} kills; raise --steps or lower --longest"
                )
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            deaths += 1
            saved = (
                sorted(int(p.name.split("-")[1]) for p in killed.glob("checkpoint-*"))
                if killed.exists()
                else []
            )
            lines = (
                len(open(killed / "metrics.jsonl").readlines())
                if (killed / "metrics.jsonl").exists()
                else 0
            )
            unfinished = (
                " (killed while saving)"
                if killed.exists() and list(killed.glob(".checkpoint-*"))
                else ""
            )
            print(
                f"kill {deaths:2d}: checkpoints {saved}, {lines} lines of metrics{unfinished}",
                flush=True,
            )
        if start(killed, [*options, "--resume"], log).wait():
            sys.exit(f"the last resume failed: {open(log.name).read()[-2000:]}")
        same = filecmp.cmp(
            whole / "final" / "model.safetensors",
            killed / "final" / "model.safetensors",
            shallow=False,
        )
        print(
            f"{deaths} kills: final weights {'are the same, bit for bit' if same else 'DIFFER'}; metrics {'are the same' if metrics(whole) == metrics(killed) else 'DIFFER'}"
        )
        sys.exit(0 if same and metrics(whole) == metrics(killed) else 1)


if __name__ == "__main__":
    main()
