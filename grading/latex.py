"""LaTeX answers: math-verify, an optional library, in a process that is killed when time is up."""

import multiprocessing

from program.errors import BadInput

LATEX_SECONDS = 5.0
LONGEST_ANSWER = 1_000  # characters


def has_math_verify():
    try:
        import math_verify  # noqa: F401
    except ImportError:
        return False
    return True


class _LatexChecker:
    """math-verify in a process of its own: an answer that hangs it costs LATEX_SECONDS and a new
    process, no more."""

    def __init__(self):
        self.process, self.failures = None, 0

    def equal(self, answer, truth):
        if self.process is None or not self.process.is_alive():
            self._start()
        try:
            self.pipe.send((answer, truth))
            if self.pipe.poll(LATEX_SECONDS):
                verdict = self.pipe.recv()
                self.failures += verdict is None
                return bool(verdict)
        except (EOFError, OSError):
            pass  # the process died on this answer: counted below like a time-out
        self.failures += 1
        self.process.kill()
        self.process.join()
        return False

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self.pipe, far_end = context.Pipe()
        self.process = context.Process(target=_latex_worker, args=(far_end,), daemon=True)
        self.process.start()
        try:  # importing sympy takes seconds; that is not the answer's fault
            if not self.pipe.poll(60) or self.pipe.recv() != "ready":
                raise EOFError
        except EOFError:
            raise BadInput(
                "math-verify did not start within 60 seconds; pip install --upgrade math-verify"
            ) from None


def _latex_worker(pipe):
    import logging

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    pipe.send("ready")
    while True:
        try:
            answer, truth = pipe.recv()
        except EOFError:
            return  # the parent is gone
        try:  # its own time-outs use signals and print; the parent's kill replaces them
            gold, found = (
                parse(f"${text}$", parsing_timeout=None, raise_on_error=True)
                for text in (truth, answer)
            )
            # a truth it cannot read is a failure too
            right = verify(gold, found, timeout_seconds=None, raise_on_error=True) if gold else None
            pipe.send(right)
        except Exception:  # noqa: BLE001 - whatever fails there means "could not tell"
            pipe.send(None)


LATEX = _LatexChecker()


def latex_equal(answer, truth):
    """math-verify's verdict, False when it fails or runs out of time (LATEX.failures counts)."""
    return LATEX.equal(answer[:LONGEST_ANSWER], truth)
