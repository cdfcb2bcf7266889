"""Run a command line: a user's mistake ends in one line and exit code 2, without a traceback."""

import argparse
import os
import pathlib
import sys

from common.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are UserErrors."""

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def refuse_old_names(argv, names):
    """Raise UserError for an option that has another name now; names: {old: new} of fields."""
    for argument in argv:
        flag = argument.partition("=")[0]
        old = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and old in names:
            new = names[old].replace("_", "-")
            raise UserError(f"{flag}: this option is called --{new} now")


def run_main(main):
    """Run a program; what the user can mend ends in one line and exit code 2."""
    name = pathlib.Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an answer may hold what a terminal cannot show
            stream.reconfigure(errors="replace")
    try:
        return main()
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
    if os.environ.get("RANK", "0") == "0":  # every process of a sharded run meets the same mistake
        print(f"{name}: {message}", file=sys.stderr, flush=True)
    if "WORLD_SIZE" in os.environ:
        os._exit(2)  # gloo's threads can abort an interpreter that is shutting down
    sys.exit(2)
