"""LaTeX answers: math-verify, an optional library, in a process that is killed when time is up."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys
from concurrent import futures

from program.errors import BadInput

LATEX_SECONDS = 5.0
LONGEST_ANSWER = 1_000  # characters
ROOT = pathlib.Path(__file__).resolve().parent.parent
START = "import sys; sys.path[0] = sys.argv[1]; from grading.latex import serve; serve()"


def has_math_verify():
    return importlib.util.find_spec("math_verify") is not None


class _LatexChecker:
    """math-verify in a process of its own: an answer that hangs it costs LATEX_SECONDS and a new
    process. It has a session of its own, so that no Ctrl-C reaches it; killed all the same, it is
    asked again, once."""

    def __init__(self):
        self.process, self.failures = None, 0
        self.reader = futures.ThreadPoolExecutor(1)  # a pipe has no time-out, a future has

    def equal(self, answer, truth):
        verdict = None
        try:
            for _ in range(2):
                if reply := self._ask([answer, truth], LATEX_SECONDS):
                    verdict = json.loads(reply)
                    break
                self._stop()
        except futures.TimeoutError:
            self._stop()
        except BaseException:  # this reply must not be taken for the next question's
            self._stop()
            raise
        self.failures += verdict is None
        return bool(verdict)

    def _ask(self, question, seconds):
        """The reply, a line of JSON; empty if the process has ended."""
        if self.process is None:
            self._start()
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except OSError:
            return ""
        return self.reader.submit(self.process.stdout.readline).result(seconds)

    def _start(self):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        command = [sys.executable, "-c", START, str(ROOT)]
        self.process = subprocess.Popen(command, encoding="utf-8", start_new_session=True, **pipes)
        if self._ask(["1", "1"], 60) != "true\n":  # importing sympy takes seconds
            raise BadInput("math-verify does not start; pip install --upgrade math-verify")

    def _stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = None


LATEX = _LatexChecker()


def latex_equal(answer, truth):
    """math-verify's verdict, False when it fails or runs out of time (LATEX.failures counts)."""
    return LATEX.equal(answer[:LONGEST_ANSWER], truth)


# --------------------------------------------------------------------- what the process itself does


def serve():
    """A line of JSON in, [answer, truth]; a line out: true, false, or null for "cannot tell"."""
    import logging
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    replies, sys.stdout = sys.stdout, sys.stderr  # a library that prints does not answer
    for line in sys.stdin:
        try:
            verdict = _equal(*json.loads(line))
        except Exception:  # noqa: BLE001 - whatever fails there means "could not tell"
            verdict = None
        print(json.dumps(verdict), file=replies, flush=True)


def _equal(answer, truth):
    from math_verify import parse, verify

    # its own time-outs use signals and print; the parent's kill replaces them
    texts = (_UPRIGHT.sub(r"\1", text) for text in (truth, answer))
    gold, found = (parse(f"${x}$", parsing_timeout=None, raise_on_error=True) for x in texts)
    if not gold:
        return None  # a truth it cannot read is a failure too
    right = verify(gold, found, timeout_seconds=None, raise_on_error=True)
    return right and _as_near(gold[0], found[0])


_UPRIGHT = re.compile(r"\\(?:mathrm|text|textrm|mathit|operatorname) ?\{ ?([a-z]) ?\}")


def _as_near(gold, found):
    """verify rounds numbers to so many decimals, which makes one of all that are tiny: fractions
    must be equal, other numbers to five digits."""
    if not (getattr(gold, "is_number", False) and getattr(found, "is_number", False)):
        return True
    gold, found = gold.doit(), found.doit()
    if gold == found or (gold.is_Rational and found.is_Rational):
        return bool(gold == found)
    return bool(abs((gold - found).evalf(30)) <= 1e-5 * abs(gold.evalf(30)))
