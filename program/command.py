"""What every command line here does: mistakes end in one line and exit code 2, no traceback."""

import argparse
import os
import pathlib
import sys

from program.errors import BadInput, NonFinite


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are BadInput."""

    def error(self, message):
        raise BadInput(f"{message} (see --help)")


def run_main(main):
    """Run a program; what the user can mend ends in one line and exit code 2."""
    name = pathlib.Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an answer may hold what a terminal cannot show
            stream.reconfigure(errors="replace")
    try:
        return main()
    except BadInput as error:
        message = str(error)
    except NonFinite as error:
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
