"""Train a small Qwen on GSM8K; print its first and best held-out accuracy, and the cost.

    python experiments/benchmarks/qwen_gsm8k.py --data gsm8k/train.jsonl \
        --eval-data gsm8k/test.jsonl
    python experiments/benchmarks/qwen_gsm8k.py --seeds 3 --algo dapo --out runs/qwen-dapo

Seeds run one after the other on one GPU. Each is a run of train.py in a separate folder, with its
page and curves. To continue after an interruption, give the same command again. Options that this
program does not have are passed on to train.py. Others have published these accuracies of
Qwen2.5-0.5B-Instruct, for comparison: 49.6 % before training, 54.3 % after GRPO with LoRA, 56.7 %
after PPO, 58.7 % after PRIME. Their prompts and parsers differ, so compare only the gain over each
one's step 0. This program has not been run on a GPU yet.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import timing  # noqa: F401 - adds the project's root to sys.path
import torch

import train
from common.command import run_main
from common.errors import UserError

STEP = (
    "--prompts-per-step 32 --num-generations 8 --updates-per-rollout 2 --micro-tokens 16384 "
    "--gradient-checkpointing --max-new-tokens 512 --lr 1e-6 --weight-decay 0 --steps 200 "
    "--eval-prompts 1319 --eval-every 20 --save-every 20"
).split()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", default="runs/qwen-gsm8k")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # a seed; used internally
    return parser.parse_known_args()


def run_one(folder, options):
    """Run train.py to its end; add a line with this process's time and memory to lives.jsonl."""
    started = time.perf_counter()
    resumed = (folder / "config.json").is_file()
    train.main([*options, "--out", str(folder), *(["--resume"] if resumed else [])])
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    life = {"seconds": time.perf_counter() - started, "peak_bytes": peak}
    with open(folder / "lives.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(life) + "\n")


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summary(folder):
    """Return the results of a finished run: accuracies, time and memory."""
    metrics, lives = lines_of(folder / "metrics.jsonl"), lines_of(folder / "lives.jsonl")
    evaluated = [m for m in metrics if "eval_greedy" in m]
    best = max(evaluated, key=lambda m: m["eval_greedy"])
    parts = ("generate", "score", "update")
    spent = lambda last: sum(
        m.get(f"seconds_{part}", 0.0) for m in metrics if m["step"] <= last for part in parts
    )
    return {
        "run": str(folder),
        "before": evaluated[0]["eval_greedy"],
        "best": best["eval_greedy"],
        "best_sampled": best["eval_accuracy"],
        "at_step": best["step"],
        "training_seconds_to_best": round(spent(best["step"]), 1),
        "hours": sum(life["seconds"] for life in lives) / 3600,  # with evaluations, checkpoints
        "peak_gib": max(life["peak_bytes"] or 0 for life in lives) / 2**30,
    }


def main():
    a, more = arguments()
    if a.seeds < 1:
        raise UserError(f"--seeds {a.seeds}: must be at least 1")
    if a.one is not None:
        folder = pathlib.Path(a.out) / f"seed-{a.one}"
        return run_one(folder, ["--model", a.model, "--seed", str(a.one), *STEP, *more])
    for seed in range(a.seeds):
        folder = pathlib.Path(a.out) / f"seed-{seed}"
        if not (folder / "final").is_dir():
            again = [sys.executable, __file__, "--one", str(seed)]
            code = subprocess.run([*again, "--model", a.model, "--out", a.out, *more]).returncode
            if code or not (folder / "final").is_dir():  # interrupted: repeat the command
                return code
        print(json.dumps(summary(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
