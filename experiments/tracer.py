"""How much code does a reader meet who follows one training step? python experiments/tracer.py

Runs one step of the default run with --plain and prints every function of ours that it enters, with
its length in lines, file by file: `train_step`, from the prompts to the updated weights. Not
counted: packages, the standard library, and the one-line lambdas of run/build.py, which a reader
of the step meets as names. More options go to train.py:

    python experiments/tracer.py --no-plain --algo grpo
"""

import ast
import collections
import inspect
import pathlib
import sys
import tempfile
import textwrap

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train
from engine.engine import SingleProcess
from run.option_checks import parse
from run.setup import open_run


def entered(function):
    """The code objects of ours that run while function() does, in the order in which they begin;
    comprehensions and lambdas count with the function they stand in."""
    seen = {}

    def profile(frame, event, arg):
        code = frame.f_code
        ours = code.co_filename.startswith(str(ROOT)) and ".venv" not in code.co_filename
        if event == "call" and ours and not code.co_name.startswith("<"):
            seen[code] = None

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return seen


def lines_to_read(code):
    """The numbers of a function's lines of code and comments, its docstring left out."""
    text, first = inspect.getsourcelines(code)
    node = ast.parse(textwrap.dedent("".join(text))).body[0]
    body = getattr(node, "body", [])
    docstring = set()
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        docstring = set(range(body[0].lineno, body[0].end_lineno + 1))
    return [first + n - 1 for n, line in enumerate(text, 1) if line.strip() and n not in docstring]


def main():
    with tempfile.TemporaryDirectory() as folder:
        options = ["--plain", "--device", "cpu", "--out", folder, *sys.argv[1:]]
        run, _ = open_run(parse(options, ""), SingleProcess("cpu"))
        train.train_step(1, run)  # the second step samples with the statistics of the first
        codes = entered(lambda: train.train_step(2, run))
    by_file, lines = collections.defaultdict(list), set()
    for code in codes:
        name = getattr(code, "co_qualname", code.co_name)
        where = str(pathlib.Path(code.co_filename).relative_to(ROOT))
        read = lines_to_read(code)
        by_file[where].append((len(read), name))
        lines |= {(where, n) for n in read}  # nested ones once
    print()
    for where, functions in by_file.items():
        print(f"{where:24s}{sum(n for n, _ in functions):4d} lines in {len(functions)} functions")
        print("    " + ", ".join(f"{name} {n}" for n, name in functions))
    print(f"{len(by_file)} files, {len(codes)} functions, {len(lines)} lines")


if __name__ == "__main__":
    main()
