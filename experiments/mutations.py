"""Do the tests see faults? python experiments/mutations.py [PART OF A FILE OR TEST NAME]

Plants one fault at a time in a copy of the project and runs the tests that should fail. FAULTS is a
list of small diffs, each under a line `file: arguments of pytest`. A fault that survives is printed
as such, and the program ends with 1. Two copies work side by side.
"""

import concurrent.futures
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
FAULTS = pathlib.Path(__file__).with_name("mutations.diff")


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
    """'caught', 'SURVIVED' or what else pytest said."""
    original = (copy / file).read_text(encoding="utf-8")
    if piece not in original:
        return "is not there; mend mutations.diff"
    (copy / file).write_text(original.replace(piece, fault, 1), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *tests.split()], cwd=copy, capture_output=True, text=True, encoding="utf-8"
    )
    (copy / file).write_text(original, encoding="utf-8")
    return {0: "SURVIVED", 1: "caught"}.get(done.returncode, f"pytest ended with {done.returncode}")


def main():
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    faults = [
        f for f in read_faults(FAULTS.read_text(encoding="utf-8")) if wanted in f[0] + " " + f[3]
    ]
    unwanted = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".pytest_cache")
    with tempfile.TemporaryDirectory() as folder:
        copies = [pathlib.Path(folder) / name for name in ("a", "b")]
        for copy in copies:
            shutil.copytree(ROOT, copy, ignore=unwanted)

        def work(n):
            lines = []
            for file, piece, fault, tests in faults[n :: len(copies)]:
                verdict = plant(copies[n], file, piece, fault, tests)
                lines.append(verdict)
                shown = fault.splitlines()[0].strip() if fault else "(nothing)"
                print(f"{verdict:9s} {file:22s} {shown[:66]}", flush=True)
            return lines

        with concurrent.futures.ThreadPoolExecutor(len(copies)) as pool:
            verdicts = [v for part in pool.map(work, range(len(copies))) for v in part]
    print(f"{verdicts.count('caught')} of {len(faults)} faults were caught")
    sys.exit(verdicts.count("caught") < len(faults))


if __name__ == "__main__":
    main()
