"""Run a command line. A user's mistake ends in one line and exit code 2, without a traceback."""

import argparse
import os
import pathlib
import platform
import re
import sys
from importlib import metadata

from common.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser that raises UserError for a mistake and has the option --version."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_argument("--version", action="version", version=versions())

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def versions():
    """Return the versions of the project, Python, torch and transformers as text.

    Neither library is imported.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    own = re.search(r'^version = "(.+)"', text, re.MULTILINE).group(1)
    said = [f"HAPO and BuPO {own}", f"Python {platform.python_version()}"]
    for name in ("torch", "transformers"):
        try:
            said.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            said.append(f"{name} is not installed")
    return ", ".join(said)


def refuse_old_names(argv, names):
    """Raise UserError if argv has an option that was renamed. names: {old field: new field}."""
    for argument in argv:
        flag = argument.partition("=")[0]
        old = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and old in names:
            new = names[old].replace("_", "-")
            raise UserError(f"{flag}: this option is called --{new} now")


def run_main(main, *arguments):
    """Return main(*arguments). An error that the user can fix ends in one line and exit code 2."""
    name = pathlib.Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a response may hold what a terminal cannot show
            stream.reconfigure(errors="replace")
    try:
        return main(*arguments)
    except UserError as error:
        message = str(error)
    except FloatingPointError as error:  # sampling.NonFinite
        message = (
            f"{error}: the model's weights are damaged or overflow; try the folder they came from"
        )
    except OSError as error:
        message = (
            f"{error.strerror or error}: {error.filename or ''}; "
            "what was saved before is intact, --resume goes on from it"
        )
    if os.environ.get("RANK", "0") == "0":  # every process of a sharded run has the same error
        print(f"{name}: {message}", file=sys.stderr, flush=True)
    if "WORLD_SIZE" in os.environ:
        os._exit(2)  # gloo's threads can abort an interpreter that is shutting down
    sys.exit(2)
