"""Do the tests see faults? python experiments/mutations.py [PART OF A FILE OR TEST NAME]

Plants one fault at a time in a copy of the project and runs the tests that should fail.
mutations.diff is a list of small diffs, each under a line `file: arguments of pytest`. A fault that
survives is printed as such, and the program ends with 1. Two copies work side by side. Each test
run is a fork of a process that has imported torch and transformers: importing them again takes
longer than most of the tests (Linux and macOS).
"""

import os
import pathlib
import re
import shutil
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
FAULTS = pathlib.Path(__file__).with_name("mutations.diff")
SECONDS = 300  # a fault that makes its tests hang is caught by whoever waits for them
CAUGHT, SKIPPED, WORKERS = "caught", "skipped", 2


def read_faults(text):
    """[(file, what stands there, what replaces it, tests)]"""
    faults = []
    for head, body in re.findall(r"^(\S+: .*)\n((?:[-+].*\n)+)", text, re.M):
        file, tests = head.split(": ", 1)
        parts = [
            "\n".join(line[1:] for line in body.splitlines() if line[0] == sign) for sign in "-+"
        ]
        faults.append((file, *parts, tests))
    return faults


def plant(copy, file, piece, fault, tests):
    """'caught', 'SURVIVED', 'skipped' (a package is missing) or what else pytest said."""
    original = (copy / file).read_text(encoding="utf-8")
    if piece not in original:
        return "is not there; mend mutations.diff"
    (copy / file).write_text(original.replace(piece, fault, 1), encoding="utf-8")
    child = os.fork()
    if child == 0:
        run_tests(copy, tests)
    started, ended, status = time.monotonic(), 0, 0
    while not ended and time.monotonic() - started < SECONDS:
        time.sleep(0.02)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.killpg(child, 9)
        os.waitpid(child, 0)
    (copy / file).write_text(original, encoding="utf-8")
    if not ended:
        return f"{CAUGHT} (hung)"
    code = os.waitstatus_to_exitcode(status)
    return {0: "SURVIVED", 1: CAUGHT, 5: SKIPPED}.get(code, f"pytest ended with {code}")


def run_tests(copy, tests):
    """In a child: pytest as `python -m pytest` in the copy; ends the process."""
    import pytest

    os.setpgid(0, 0)
    os.chdir(copy)
    sys.path[0] = str(copy)
    sys.dont_write_bytecode = True  # two versions of a file may have one size and one second
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    output = os.open(copy / "pytest.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 70
    try:
        code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests.split()]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def work(copy, faults):
    """In a worker: plant these faults one after the other; 1 if one of them was not caught."""
    missed = 0
    for file, piece, fault, tests in faults:
        started = time.monotonic()
        verdict = plant(copy, file, piece, fault, tests)
        missed += not verdict.startswith((CAUGHT, SKIPPED))
        shown = fault.splitlines()[0].strip() if fault else "(nothing)"
        seconds = time.monotonic() - started
        print(f"{verdict:9s} {seconds:5.1f} s {file:22s} {shown[:66]}", flush=True)
    return missed


def main():
    import torch  # noqa: F401  imported before the forks, for all of them
    import transformers  # noqa: F401
    from transformers import Qwen3ForCausalLM  # noqa: F401

    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    faults = [
        f for f in read_faults(FAULTS.read_text(encoding="utf-8")) if wanted in f[0] + " " + f[3]
    ]
    unwanted = shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", ".pytest_cache")
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for n in range(WORKERS):
            copy = pathlib.Path(folder) / str(n)
            shutil.copytree(ROOT, copy, ignore=unwanted)
            workers.append(os.fork())
            if workers[-1] == 0:
                os._exit(min(255, work(copy, faults[n::WORKERS])))
        for worker in workers:
            missed += os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    print(f"{missed} of {len(faults)} faults were not caught")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
