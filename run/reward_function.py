"""Call a reward function that the user wrote: --reward-function FILE.py:NAME.

    def NAME(question, answer, text) -> float      answer: reference answer; text: response
    def NAME(question, answer, text, **row)        with all columns of the data row, or only those
                                                   that further parameters name

The function runs in a separate process (common/worker.py). A call that takes longer than
REWARD_SECONDS is killed, and the process is restarted. What the function prints goes to standard
error.
"""

import hashlib
import importlib.util
import inspect
import math
import pathlib
import sys
from concurrent import futures

from common.errors import UserError
from common.worker import Died, SubprocessWorker, serve_lines

REWARD_SECONDS = 10.0  # per response


def check_named(given):
    """Raise UserError unless `given` is FILE.py:NAME and the file is there."""
    file, _, name = given.rpartition(":")
    if not file or not pathlib.Path(file).is_file() or not name.isidentifier():
        raise UserError(
            f"--reward-function {given}: no such file; give FILE.py:NAME, a file and the name "
            "of a function (question, answer, text) -> float in it"
        )


class RewardFunction:
    """A function (problem, response) -> float: NaN if the user's function failed.

    `say` prints each failure. UserError if the function cannot be loaded.
    """

    def __init__(self, given, say=print):
        self.given, self.say = given, say
        check_named(given)
        file, _, name = given.rpartition(":")
        self.apart = SubprocessWorker("run.reward_function", file, name, errors=None)
        try:
            found = self.apart.ask(None, 60)
        except (Died, futures.TimeoutError):
            found = {"error": "its process ended, or took longer than a minute to start"}
        if "error" in found:
            raise UserError(f"--reward-function {given}: {found['error']}")
        self.columns = found["columns"]  # columns that the function takes; None: all
        self.sum = hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()

    def __call__(self, problem, text):
        row = problem.row
        if self.columns is not None:
            row = {name: row[name] for name in self.columns if name in row}
        try:
            reply = self.apart.ask([problem.question, problem.answer, text, row], REWARD_SECONDS)
        except Died:
            reply = {"error": "its process died"}
        except futures.TimeoutError:
            reply = {"error": f"no reward within {REWARD_SECONDS:g} s"}
        if "error" in reply:
            fault = f"--reward-function {self.given}: {reply['error']}"
            self.say(f"warning: {fault}; for the response {text[:80]!r}")
        return reply.get("reward", math.nan)


# ------------------------------------------------------------------------ run by the subprocess


def serve():
    """Run the subprocess; its command line has the project's folder, the file and the name."""
    serve_lines(lambda: replies_of(*sys.argv[2:]))


def replies_of(file, name):
    """Return the function that computes replies: None -> columns; arguments -> reward.

    If the user's function cannot be loaded, every reply is the error.
    """
    try:
        function = load(file, name)
        columns = columns_of(function)
    except Exception as error:  # noqa: BLE001 - the file is the user's
        fault = {"error": f"{type(error).__name__}: {error}"}
        return lambda asked: fault
    return lambda asked: {"columns": columns} if asked is None else reward_of(function, *asked)


def load(file, name):
    """Return the function `name` of a file; the file may import other files of its folder."""
    sys.path.insert(0, str(pathlib.Path(file).resolve().parent))
    spec = importlib.util.spec_from_file_location("reward_of_the_user", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise AttributeError(f"{file} has no function {name}")
    return function


def columns_of(function):
    """Return the names of a function's parameters after question, answer and text.

    Return None if it has a parameter **row, which takes all columns.
    """
    parameters = list(inspect.signature(function).parameters.values())
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters[3:]]


def reward_of(function, question, answer, text, row):
    taken = {"question", "answer", "text"}  # passed by position: drop columns of these names
    row = {name: value for name, value in row.items() if name not in taken}
    try:
        value = float(function(question, answer, text, **row))
    except Exception as error:  # noqa: BLE001 - the function is the user's
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    return {"reward": value} if math.isfinite(value) else {"error": f"the reward is {value}"}
