"""Send a run's metrics to an experiment tracker: python scripts/follow.py RUN --to tensorboard

This script reads the run's metrics.jsonl and sends each number to tensorboard, trackio or wandb,
until the run is over. With --once it sends the lines that exist and stops. It is independent of
training: it may start later, end earlier, and run on another machine. If a resumed run goes back to
an earlier step, the script continues from that step.
"""

import json
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import renamed  # noqa: E402
from common.command import OneLineParser, run_main  # noqa: E402
from common.errors import UserError  # noqa: E402

SECONDS = 2.0  # between two reads of the file


def to_tensorboard(folder, options):
    """Return a function (step, {name: number}) that writes to TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(step, numbers):
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def to_trackio(folder, options):
    import trackio

    return _logged(trackio, folder, options)


def to_wandb(folder, options):
    import wandb

    return _logged(wandb, folder, options)


def _logged(library, folder, options):
    library.init(project="hapo", name=folder.name, config=options)
    return lambda step, numbers: library.log(numbers, step=step)


TOOLS = {"tensorboard": to_tensorboard, "trackio": to_trackio, "wandb": to_wandb}


def numbers_of(row):
    """Return the numbers of a line of metrics.jsonl, {name: number}.

    The items of a list are numbered from 1: name/1, name/2, ...
    """
    found = {}
    for name, value in row.items():
        values = {name: value}
        if isinstance(value, list):
            values = {f"{name}/{place}": x for place, x in enumerate(value, 1)}
        for key, x in values.items():
            if isinstance(x, (int, float)) and not isinstance(x, bool) and key != "step":
                found[key] = x
    return found


def follow(folder, write, once=False, look=time.sleep):
    """Send every complete line of metrics.jsonl, old and new, until the run is over.

    Return the number of lines.
    """
    path, known = folder / "metrics.jsonl", 0
    steps = json.loads((folder / "config.json").read_text(encoding="utf-8"))["steps"]
    while True:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        for line in lines[min(known, len(lines)) :]:
            row = renamed.with_new_names(json.loads(line), renamed.METRICS)
            write(row["step"], numbers_of(row))
        known = len(lines)
        last = json.loads(lines[-1])["step"] if lines else -1
        if once or last >= steps:
            return known
        look(SECONDS)


def main(argv=None):
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--to", required=True, choices=TOOLS)
    parser.add_argument("--once", action="store_true", help="do not wait for more")
    args = parser.parse_args(argv)
    folder = pathlib.Path(args.run)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds no run; name the folder of a run of train.py")
    options = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        write = TOOLS[args.to](folder, options)
    except ImportError:
        raise UserError(f"--to {args.to}: is not installed; pip install {args.to}") from None
    print(f"{follow(folder, write, args.once)} lines of {folder / 'metrics.jsonl'} handed on")


if __name__ == "__main__":
    run_main(main)
