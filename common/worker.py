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
    """The subprocess has ended without a reply."""


class SubprocessWorker:
    """A subprocess that runs a module's `serve`, with `arguments` (strings) on its command line.

    errors: the destination of its standard error, as for subprocess.Popen.
    """

    def __init__(self, module, *arguments, errors=subprocess.DEVNULL):
        code = f"import sys; sys.path[0] = sys.argv[1]; from {module} import serve; serve()"
        self.command = [sys.executable, "-c", code, str(ROOT), *arguments]
        self.errors, self.process = errors, None
        self.reader = futures.ThreadPoolExecutor(1)  # pipes have no time-out, futures do

    def ask(self, question, seconds):
        """Send a question (JSON) and return the reply.

        Raise Died if the process ends without a reply, and futures.TimeoutError if it takes more
        than `seconds`. After either, the next question starts a new process.
        """
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
    """Reply to each line of JSON on standard input with one line, until the input ends.

    open_it() returns the function that computes a reply. Everything else that prints, code in C
    included, is redirected to standard error, so that it cannot be taken for a reply. SIGINT and
    SIGTERM are ignored: the parent process handles them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    reply_to = open_it()
    for line in sys.stdin:
        reply = reply_to(json.loads(line))
        sys.stdout.flush()  # show what the function printed before its reply is read
        print(json.dumps(reply), file=replies, flush=True)
