"""LaTeX answers: math-verify, an optional library, in a process that is killed when time is up."""

import importlib.util
import re
import time
from concurrent import futures

from common.errors import UserError
from common.worker import Died, SubprocessWorker, serve_lines

LATEX_SECONDS = 5.0
LONGEST_ANSWER = 1_000  # characters
REMEMBERED = 50_000  # verdicts


def has_math_verify():
    return importlib.util.find_spec("math_verify") is not None


class _LatexChecker:
    """Run math-verify in a separate process and remember its verdicts.

    A response that hangs the process costs LATEX_SECONDS and a new process, once. If something else
    kills the process, the comparison is repeated once, within the same time.
    """

    def __init__(self):
        self.apart, self.failures, self.known = SubprocessWorker("problems.latex"), 0, {}

    def equal(self, stated, answer):
        if (stated, answer) not in self.known:
            if len(self.known) >= REMEMBERED:
                self.known.clear()
            self.known[stated, answer] = self._verdict(stated, answer)
        verdict = self.known[stated, answer]
        self.failures += verdict is None
        return bool(verdict)

    def _verdict(self, stated, answer):
        """math-verify's verdict; None where it failed or took too long."""
        left = LATEX_SECONDS
        for _ in range(2):
            if self.apart.process is None:
                self._start()
            started = time.monotonic()
            try:
                return self.apart.ask([stated, answer], left)
            except futures.TimeoutError:
                return None
            except Died:
                left = max(0.1, left - (time.monotonic() - started))
        return None

    def _start(self):
        try:
            ready = self.apart.ask(["1", "1"], 60)  # importing sympy takes seconds
        except (Died, futures.TimeoutError):
            ready = None
        if ready is not True:
            raise UserError("math-verify does not start; pip install --upgrade math-verify")


LATEX = _LatexChecker()


def latex_equal(stated, answer):
    """Return math-verify's verdict; False if it fails or runs out of time, which LATEX.failures
    counts."""
    return len(stated) <= LONGEST_ANSWER and LATEX.equal(stated, answer)


# --------------------------------------------------------------------- what the process itself does


def serve():
    """[answer, truth] in; true, false, or null for "cannot tell" out."""
    import logging

    logging.disable(logging.CRITICAL)
    serve_lines(lambda: _verdict)


def _verdict(pair):
    try:
        return _equal(*pair)
    except Exception:  # noqa: BLE001 - whatever fails there means "could not tell"
        return None


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
