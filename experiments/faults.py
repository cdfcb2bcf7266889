"""Inject every fault the project claims to survive and print what happened: python experiments/faults.py

Each row is a run of train.py in a process of its own, with the fault planted from outside or by a patch named in the row. "kept"
is the newest checkpoint that is whole afterwards; "resumed" whether a plain --resume then reaches the end.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from run.checkpoint import newest_whole  # noqa: E402

SMALL = [
    "--prompts-per-step",
    "4",
    "--answers-per-prompt",
    "4",
    "--updates-per-rollout",
    "2",
    "--eval-prompts",
    "16",
    "--device",
    "cpu",
    "--max-bad-steps",
    "3",
]

PATCHES = {
    "NaN in a reward": "old = train.sample_round\ndef new(*a):\n    b = old(*a); b.rewards[0] = float('nan') if a[0] >= 3 else b.rewards[0]; return b\ntrain.sample_round = new",
    "NaN in a weight": "old = train.update\ndef new(run, *a):\n    r = old(run, *a)\n    if run.drawn >= 12: next(run.policy.parameters()).data[5] = float('nan')\n    return r\ntrain.update = new",
    "NaN in every gradient": "old = train.mean_loss\ncalls = [0]\ndef new(*a):\n    calls[0] += 1; return old(*a) * (float('nan') if calls[0] > 4 else 1)\ntrain.mean_loss = new",
    "NaN in one gradient": "old = train.mean_loss\ncalls = [0]\ndef new(*a):\n    calls[0] += 1; return old(*a) * (float('nan') if calls[0] == 4 else 1)\ntrain.mean_loss = new",
    "disk full while saving": "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nold = train.checkpoint.save\ndef new(run, step):\n    if step == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))\n    old(run, step)\ntrain.checkpoint.save = new",
    "SIGTERM in a step": "import os, signal\nold = train.train_step\ndef new(step, run):\n    if step == 3: os.kill(os.getpid(), signal.SIGTERM)\n    return old(step, run)\ntrain.train_step = new",
}


def run(out, *more, patch=""):
    program = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n{patch}\nfrom scale.options import run_main\nsys.argv[0] = 'train.py'\nrun_main(train.main)"
    return subprocess.run(
        [sys.executable, "-c", program, *SMALL, "--out", str(out), *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def last_line(result):
    lines = [
        line
        for line in (
            result.stderr.replace("\r", "\n") if result.returncode else result.stdout
        ).splitlines()
        if line.strip() and "it/s" not in line
    ]
    telling = [
        line
        for line in lines
        if any(
            word in line
            for word in ("passed over", "update skipped", "stopped after", "is almost never right")
        )
    ]
    return (
        re.sub(
            r"/\S*/tmp\w+/", "", telling[0] if telling and not result.returncode else lines[-1]
        ).strip()[:190]
        if lines
        else "(nothing)"
    )


def report(name, result, out, resume=True):
    kept = newest_whole(out, lambda text: None)
    again = run(out, "--resume") if resume and (out / "config.json").exists() else None
    traceback = " TRACEBACK" if "Traceback" in result.stderr else ""
    print(
        f"{name:28s} exit {result.returncode}{traceback}  kept {kept.name if kept else '-':14s} resumed {'yes' if again is not None and again.returncode == 0 else '-' if again is None else 'NO'}\n{'':30s}{last_line(result)}",
        flush=True,
    )


def main():
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        base = scratch / "base"
        assert run(base, "--steps", "4").returncode == 0
        for name, harm in {
            "truncated weights": lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:1000]
            ),
            "one bit of the moments": lambda f: (f / "optimizer.pt").write_bytes(
                (lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:])(
                    (f / "optimizer.pt").read_bytes()
                )
            ),
            "missing run.json": lambda f: (f / "run.json").unlink(),
            "missing checksums.json": lambda f: (f / "checksums.json").unlink(),
            "missing tokenizer": lambda f: (f / "tokenizer.json").unlink(),
        }.items():
            out = shutil.copytree(base, scratch / name.replace(" ", "-"))
            harm(out / "checkpoint-4")
            report(name, run(out, "--resume", "--steps", "5"), out, resume=False)
        for name, patch in PATCHES.items():
            out = scratch / name.replace(" ", "-")
            report(name, run(out, "--steps", "6", patch=patch), out)
        report(
            "output folder read-only",
            run("/proc/run", "--steps", "2"),
            pathlib.Path("/proc/run"),
            resume=False,
        )
        one = shutil.copytree(ROOT / "assets" / "tiny-qwen3", scratch / "one-token")
        (one / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
        (scratch / "one.jsonl").write_text(
            "".join(
                json.dumps({"question": str(i % 10), "answer": str(i % 10)}) + "\n"
                for i in range(20)
            )
        )
        report(
            "prompts of one token",
            run(
                scratch / "o1",
                "--steps",
                "3",
                "--model",
                str(one),
                "--data",
                str(scratch / "one.jsonl"),
                "--max-new-tokens",
                "8",
            ),
            scratch / "o1",
        )
        (scratch / "dead.jsonl").write_text(
            "".join(
                json.dumps(
                    {
                        "question": f"Use {i}, 2, 3 once each with + - * / to make 9. Reply with the expression only.",
                        "answer": "987654",
                    }
                )
                + "\n"
                for i in range(20)
            )
        )
        report(
            "all groups dead, 20 steps",
            run(
                scratch / "dead",
                "--steps",
                "20",
                "--data",
                str(scratch / "dead.jsonl"),
                "--max-new-tokens",
                "8",
                "--dynamic-sampling",
                "--eval-every",
                "20",
            ),
            scratch / "dead",
            resume=False,
        )


if __name__ == "__main__":
    main()
