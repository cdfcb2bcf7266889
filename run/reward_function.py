"""A reward function of the user's own: --reward-function FILE.py:NAME.

    def NAME(question, answer, text) -> float      `answer`: reference, `text`: response
    def NAME(question, answer, text, **row)        all columns of the row, or only those that the
                                                   parameters name

It runs in a separate process (common/worker.py). A call that hangs is killed after REWARD_SECONDS
and the process is restarted. What the function prints goes to standard error.
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

REWARD_SECONDS = 10.0  # an answer


def check_named(given):
    """Raise UserError unless `given` is FILE.py:NAME and the file is there."""
    file, _, name = given.rpartition(":")
    if not file or not pathlib.Path(file).is_file() or not name.isidentifier():
        raise UserError(
            f"--reward-function {given}: no such file; give FILE.py:NAME, a file and the name "
            "of a function (question, answer, text) -> float in it"
        )


class RewardFunction:
    """(problem, text) -> float; NaN where the function failed, which `say` names."""

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
        self.columns = found["columns"]  # that it asks for; None: all
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


# --------------------------------------------------------------------- what the process itself does


def serve():
    """The function's file and name stand behind the project's folder in the command."""
    serve_lines(lambda: replies_of(*sys.argv[2:]))


def replies_of(file, name):
    """None -> the columns that the function asks for; a question -> its reward."""
    try:
        function = load(file, name)
        columns = columns_of(function)
    except Exception as error:  # noqa: BLE001 - the file is the user's
        fault = {"error": f"{type(error).__name__}: {error}"}
        return lambda asked: fault
    return lambda asked: {"columns": columns} if asked is None else reward_of(function, *asked)


def load(file, name):
    """The function `name` of a file, which may import its neighbours."""
    sys.path.insert(0, str(pathlib.Path(file).resolve().parent))
    spec = importlib.util.spec_from_file_location("reward_of_the_user", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise AttributeError(f"{file} has no function {name}")
    return function


def columns_of(function):
    """The columns that a function asks for by name, behind question, answer and text; None: all."""
    parameters = list(inspect.signature(function).parameters.values())
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters[3:]]


def reward_of(function, question, answer, text, row):
    taken = {"question", "answer", "text"}  # columns of these names are there already
    row = {name: value for name, value in row.items() if name not in taken}
    try:
        value = float(function(question, answer, text, **row))
    except Exception as error:  # noqa: BLE001 - the function is the user's
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    return {"reward": value} if math.isfinite(value) else {"error": f"the reward is {value}"}
