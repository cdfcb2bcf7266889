"""Inject every fault the project claims to survive and print what happened.

    python experiments/faults.py

Each row is a run of train.py in a process of its own, with the fault planted from outside or by a
patch named in the row. "kept" is the newest checkpoint that is whole afterwards; "resumed" whether
a plain --resume then reaches the end.
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
from run.checkpoint import newest_whole

SMALL = (
    "--prompts-per-step 4 --num-generations 4 --updates-per-rollout 2 --eval-prompts 16 "
    "--device cpu --max-bad-steps 3"
).split()

NAN_LOSS = """
old, calls = train.losses.masked_mean, [0]
def new(*a):
    calls[0] += 1
    return old(*a) * (float('nan') if calls[0] {when} 4 else 1)
train.losses.masked_mean = new
"""
PATCHES = {
    "NaN in a reward": """
old = train.generate_and_grade
def new(step, *a):
    batch = old(step, *a)
    if step >= 3:
        batch.rewards[0] = float('nan')
    return batch
train.generate_and_grade = new
""",
    "NaN in a weight": """
from engine.engine import Engine
old, steps = Engine.optimizer_step, [0]
def new(engine, loss):
    result = old(engine, loss)
    steps[0] += 1
    if steps[0] >= 5:  # the first of step 3
        next(engine.policy.parameters()).data[5] = float('nan')
    return result
Engine.optimizer_step = new
""",
    "NaN in every gradient": NAN_LOSS.format(when=">"),
    "NaN in one gradient": NAN_LOSS.format(when="=="),
    "disk full while saving": """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
old = train.checkpoint.save
def new(run, step):
    if step == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
    old(run, step)
train.checkpoint.save = new
""",
    "SIGTERM in a step": """
import os, signal
old = train.train_step
def new(step, run):
    if step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return old(step, run)
train.train_step = new
""",
}
PROGRAM = """
import sys
sys.path.insert(0, {root!r})
import train
from common.command import run_main
{patch}
sys.argv[0] = 'train.py'
run_main(train.main)
"""


def run(out, *more, patch=""):
    program = PROGRAM.format(root=str(ROOT), patch=patch)
    command = [sys.executable, "-c", program, *SMALL, "--out", str(out), *map(str, more)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, encoding="utf-8"
    )


def last_line(result):
    """The line that tells: of the warnings, else the last one."""
    text = result.stderr.replace("\r", "\n") if result.returncode else result.stdout
    lines = [line for line in text.splitlines() if line.strip() and "it/s" not in line]
    words = ("passed over", "update skipped", "stopped after", "is almost never right")
    telling = [line for line in lines if any(word in line for word in words)]
    if not lines:
        return "(nothing)"
    line = telling[0] if telling and not result.returncode else lines[-1]
    return re.sub(r"/\S*/tmp\w+/", "", line).strip()


def report(name, result, out, resume=True):
    kept = newest_whole(out, lambda text: None)
    resumed = "-"
    if resume and (out / "config.json").exists():
        resumed = "yes" if run(out, "--resume").returncode == 0 else "NO"
    traceback = " TRACEBACK" if "Traceback" in result.stderr else ""
    print(
        f"{name:28s} exit {result.returncode}{traceback}  kept {kept.name if kept else '-':14s} "
        f"resumed {resumed}\n{'':30s}{last_line(result)}",
        flush=True,
    )


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


DAMAGE = {
    "truncated weights": ("model.safetensors", truncate),
    "one bit of the moments": ("optimizer.pt", flip_a_bit),
    "missing run.json": ("run.json", pathlib.Path.unlink),
    "missing checksums.json": ("checksums.json", pathlib.Path.unlink),
    "missing tokenizer": ("tokenizer.json", pathlib.Path.unlink),
}


def damaged_checkpoints(scratch):
    base = scratch / "base"
    assert run(base, "--steps", "4").returncode == 0
    for name, (file, harm) in DAMAGE.items():
        out = shutil.copytree(base, scratch / name.replace(" ", "-"))
        harm(out / "checkpoint-4" / file)
        report(name, run(out, "--resume", "--steps", "5"), out, resume=False)


def odd_data(scratch):
    tiny = ROOT / "assets" / "tiny-qwen3"
    one = shutil.copytree(tiny, scratch / "one-token")
    (one / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    digits = write(scratch / "one.jsonl", [(str(i % 10), str(i % 10)) for i in range(20)])
    out, more = scratch / "o1", ["--model", one, "--data", digits, "--max-new-tokens", 8]
    report("prompts of one token", run(out, "--steps", 3, *more), out)
    game = "Use {}, 2, 3 once each with + - * / to make 9. Reply with the expression only."
    never = write(scratch / "dead.jsonl", [(game.format(i), "987654") for i in range(20)])
    out, more = scratch / "dead", ["--data", never, "--max-new-tokens", 8, "--dynamic-sampling"]
    result = run(out, "--steps", 20, "--eval-every", 20, *more)
    report("all groups dead, 20 steps", result, out, resume=False)


def write(path, rows):
    lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def main():
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        damaged_checkpoints(scratch)
        for name, patch in PATCHES.items():
            out = scratch / name.replace(" ", "-")
            report(name, run(out, "--steps", "6", patch=patch), out)
        nowhere = pathlib.Path("/proc/run")
        report("output folder read-only", run(nowhere, "--steps", 2), nowhere, resume=False)
        odd_data(scratch)


if __name__ == "__main__":
    main()
