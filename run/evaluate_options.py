"""Read the command line of evaluate.py without torch, to report mistakes within a second."""

import argparse
import math
import pathlib

from common.command import OneLineParser
from common.errors import UserError
from common.hub import check_model_name
from problems.files import check_exists
from problems.prompts import FILE_INSTRUCTION
from tasks import BUILT_IN


def read_command_line(argv: list[str] | None, description: str) -> argparse.Namespace:
    """Return the options of evaluate.py; UserError for one that cannot work."""
    parser = OneLineParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="a Hugging Face folder or name")
    add(
        "--task",
        choices=sorted(BUILT_IN),
        help="its held-out problems; default: those of the run whose folder holds the model, else "
        "addition",
    )
    add("--difficulty", type=int, help="level of the built-in task")
    add("--data", metavar="FILE", help="questions instead, as in train.py; all its rows are used")
    for name, usual in dict(data_split="test", question_column="", answer_column="").items():
        add(f"--{name.replace('_', '-')}", default=usual, help="as in train.py")
    add(
        "--instruction",
        metavar="TEXT",
        help="line after every question, '' for none; default: that of the run whose folder holds "
        f"the model, else '{FILE_INSTRUCTION}' for files",
    )
    add("--samples", type=int, default=8, metavar="K", help="responses per question, 1 to 256")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--max-new-tokens", type=int, default=None, help="default: the run's or the task's")
    add("--limit", type=int, metavar="N", help="ask only the first N questions")
    add("--seed", type=int, default=0)
    add("--rows-at-once", type=int, default=512, help="responses decoded at a time")
    add("--threads", type=int, default=None, metavar="N", help="CPU threads")
    add("--no-self-check", action="store_true", help="as in train.py")
    add("--device", help="cpu, cuda, mps or xpu; default the accelerator if there is one")
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="default: the device's own")
    add("--out", default=None, metavar="FILE.json")
    args = parser.parse_args(argv)
    check_options(args)
    return args


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for an option that cannot work, or a file or folder that is not there."""
    for name in ("samples", "limit", "max_new_tokens", "rows_at_once"):
        value, high = getattr(args, name), 256 if name == "samples" else math.inf
        if value is not None and not 1 <= value <= high:
            limit = "" if high == math.inf else f" and at most {high}"
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1{limit}")
    check_model_name(args.model)
    if args.data:
        check_exists(args.data)
    out = pathlib.Path(args.out or "result.json")
    if out.is_dir() or out.parent.is_file():
        raise UserError(f"--out {args.out}: not a file that can be written; name one")
    if not 0 <= args.temperature <= 100:
        raise UserError(f"--temperature {args.temperature}: must lie between 0 (greedy) and 100")
    if args.temperature == 0 and args.samples > 1:
        raise UserError(
            f"--samples {args.samples}: greedy decoding (--temperature 0) has one response per "
            "question; use --samples 1"
        )
