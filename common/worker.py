"""Run a function of this project in a separate process, which is killed after a time limit.

The process runs in a separate session, so Ctrl-C does not reach it. Requests and replies are lines
of JSON.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
from concurrent import futures

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Died(Exception):
    """The process has ended without a reply."""


class SubprocessWorker:
    """`serve` of a module, called with some texts. `errors`: where its standard error goes."""

    def __init__(self, module, *arguments, errors=subprocess.DEVNULL):
        code = f"import sys; sys.path[0] = sys.argv[1]; from {module} import serve; serve()"
        self.command = [sys.executable, "-c", code, str(ROOT), *arguments]
        self.errors, self.process = errors, None
        self.reader = futures.ThreadPoolExecutor(1)  # a pipe has no time-out, a future has

    def ask(self, question, seconds):
        """The reply; Died where there is none, futures.TimeoutError where it takes too long. After
        either, the next question starts a new process."""
        try:
            return json.loads(self._ask(question, seconds))
        except BaseException:  # this reply must not be taken for the next question's
            self.stop()
            raise

    def _ask(self, question, seconds):
        if self.process is None:
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)
            apart = dict(encoding="utf-8", start_new_session=True)
            self.process = subprocess.Popen(self.command, **pipes, **apart)
        try:
            self.process.stdin.write(json.dumps(question, default=str) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise Died from None
        reply = self.reader.submit(self.process.stdout.readline).result(seconds)
        if not reply:
            raise Died
        return reply

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = None


def serve_lines(open_it):
    """What such a process does: a line of JSON in, one out, until nothing more comes. `open_it` ()
    returns the function that replies. Whatever prints meanwhile, code in C included, prints to
    standard error and answers nothing; signals are the parent's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    reply_to = open_it()
    for line in sys.stdin:
        reply = reply_to(json.loads(line))
        sys.stdout.flush()  # what it has printed comes before what it says
        print(json.dumps(reply), file=replies, flush=True)
