"""Read the command line of internals.py without torch, to report mistakes within a second."""

import pathlib

from common.command import OneLineParser
from common.errors import UserError
from common.hub import check_model_name
from problems.files import check_exists
from tasks import BUILT_IN

DESCRIPTION = "Every layer of a model as a policy: its entropy on responses, as table and figures."


def read_command_line(argv=None):
    """Return the options of internals.py. Raise UserError for one that cannot work."""
    parser = OneLineParser(description=DESCRIPTION, allow_abbrev=False)

    def option(name, help=None, **more):
        parser.add_argument(f"--{name}", help=help, **more)

    option("model", "a Hugging Face folder or name, or a run's folder", required=True)
    text = "held-out problems of a built-in task; default: as in evaluate.py"
    option("task", text, choices=sorted(BUILT_IN))
    option("difficulty", type=int)
    option("data", "questions from a JSONL or parquet file instead", metavar="FILE")
    option("instruction", "line behind every question; as in evaluate.py", metavar="TEXT")
    text = "finished answers (JSONL with question and answer) instead of sampling"
    option("answers", text, metavar="FILE")
    option("samples", "answers that are looked at", type=int, default=32, metavar="N")
    option("max-new-tokens", type=int, default=64)
    text = "a second model on the same answers, before and after training for example"
    option("compare", text, metavar="RUN_OR_DIR")
    option("seed", type=int, default=0)
    option("device", "cpu, cuda, mps or xpu; default the accelerator if there is one")
    text = "internals.json, entropy_flow.png, entropy_change.png"
    option("out", text, default="runs/internals", metavar="DIR")
    option("threads", "CPU threads", type=int, default=None, metavar="N")
    args = parser.parse_args(argv)
    for name in ("samples", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    check_model_name(args.model)
    if args.compare:
        check_model_name(args.compare, "--compare")
    if args.data:
        check_exists(args.data)
    if args.answers and not pathlib.Path(args.answers).is_file():
        raise UserError(f"--answers {args.answers}: no such file")
    return args
