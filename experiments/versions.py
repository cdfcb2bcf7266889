"""Which versions of torch and transformers work? python experiments/versions.py --folder DIR

Builds one environment per version of torch in DIR (about 5 GB each where torch brings CUDA), puts
each version of transformers into it in turn, and there runs the mathematics' tests, two steps of
GRPO, DAPO and HAPO, and one step of either phase of BuPO. Prints one row per pair of versions: the
tests' last line, and the largest relative difference of the steps' metrics from the first pair's.
Ends with 1 if anything failed. `newest` is whatever the package index has today.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
TORCH = ["newest", "2.14.1", "2.13.0", "2.11.0"]
TRANSFORMERS = ["newest", "5.12.0", "5.0.0"]
STEPS = (
    "--steps 2 --prompts-per-step 8 --num-generations 4 --updates-per-rollout 2 --threads 1 "
    "--eval-prompts 16 --warmup-steps 1 --save-every 2 --device cpu"
).split()
RUNS = {
    "grpo": ["--algo", "grpo"],
    "dapo": ["--algo", "dapo"],
    "hapo": ["--algo", "hapo"],
    "bupo": ["--bupo-layer", "2", "--bupo-steps", "1"],  # step 1 in its phase 1, step 2 in phase 2
}
TIMES = ("seconds", "tokens_per_second")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", nargs="+", default=TORCH, metavar="VERSION")
    parser.add_argument("--transformers", nargs="+", default=TRANSFORMERS, metavar="VERSION")
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="for the environments")
    options = parser.parse_args()
    print("| torch | transformers | python | `-m mathematics` | steps | difference |")
    print("|---|---|---|---|---|---|", flush=True)
    failed, first = False, None
    for torch in options.torch:
        python = build(options.folder / f"torch-{torch}")
        install(python, "torch", torch)
        install(python, "numpy pytest")
        for transformers in options.transformers:
            install(python, "transformers", transformers)
            tests, passed = mathematics(python)
            steps, error = first_steps(python)
            first = first or steps
            difference = error or shown_difference(steps, first)
            cells = [*versions(python), tests, error or f"{len(RUNS)} runs", difference]
            print("| " + " | ".join(cells) + " |", flush=True)
            failed |= not passed or error is not None
    sys.exit(failed)


def build(folder):
    """Return the interpreter of a new or existing virtual environment."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
    return python


def install(python, names, version=None):
    """Install some packages, or one in a named version; `newest` upgrades it."""
    wanted = names.split()
    if version is not None:
        wanted = ["--upgrade", *wanted] if version == "newest" else [f"{names}=={version}"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)


def versions(python):
    """Return the versions of torch, transformers and Python in an environment."""
    program = (
        "import platform, torch, transformers\n"
        "print(torch.__version__, transformers.__version__, platform.python_version())"
    )
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.split()


def mathematics(python):
    """Return pytest's last line, and whether all tests passed."""
    command = [python, "-m", "pytest", "-q", "-m", "mathematics", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        sys.stderr.write(done.stdout[-4000:] + done.stderr[-4000:])
    return lines[-1] if lines else "pytest printed nothing", done.returncode == 0


def first_steps(python):
    """Return {run: metrics by step, times left out}, and the error of a run that failed."""
    found = {}
    for name, options in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / name
            command = [python, "train.py", *STEPS, *options, "--out", str(out)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                sys.stderr.write(done.stderr[-4000:])
                return found, f"{name} failed"
            text = (out / "metrics.jsonl").read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.splitlines()]
            found[name] = [
                {key: value for key, value in row.items() if not key.startswith(TIMES)}
                for row in rows
            ]
    return found, None


def shown_difference(steps, first):
    """Return 'none' if all metrics are the same, else the largest relative difference, named."""
    largest, where = 0.0, "none"
    for name, rows in steps.items():
        for row, other in zip(rows, first[name], strict=True):
            for key in row.keys() | other.keys():
                ours, theirs = row.get(key), other.get(key)
                if ours == theirs:
                    continue
                if not isinstance(ours, (int, float)) or not isinstance(theirs, (int, float)):
                    return f"{name}, {key}: {ours} against {theirs}"
                relative = abs(ours - theirs) / max(abs(ours), abs(theirs))
                if relative > largest:
                    largest, where = relative, f"{relative:.1e} ({name}, {key})"
    return where


if __name__ == "__main__":
    main()
