"""Say what went wrong in a run: python scripts/diagnose.py RUN

It reads metrics.jsonl and, if it is there, config.json of a run, which may have ended long ago, and
prints the alarms that they show, each with its line of docs/troubleshooting.md.
"""

import pathlib
import re
import sys
import types

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import renamed  # noqa: E402
from common.command import OneLineParser, run_main  # noqa: E402
from common.errors import UserError  # noqa: E402
from run.alarms import Alarm, find_alarms, may_differ  # noqa: E402
from scripts.page import config_of, rows_of  # noqa: E402

TABLE = ROOT / "docs" / "troubleshooting.md"
SUMMARY = {  # metric: how it is called
    "correct": "share of correct responses",
    "reward": "reward",
    "entropy": "entropy",
    "response_length": "response length",
    "grad_norm": "gradient norm",
    "clipped_ratio": "share of responses cut",
}


def options_of(folder):
    """Return the options of a run that the alarms depend on; None where they are not known."""
    config = config_of(folder)
    names = ("reward_function", "overlong_buffer")
    return types.SimpleNamespace(**{name: config.get(name) for name in names})


def bad_steps(rows):
    """Return an alarm for the first step that NaN or infinite values made bad, in a list, or []."""
    for row in rows:
        if "skipped" in row:
            cause = "a value overflowed: the learning rate, the precision, or a reward function"
            remedy = "a lower --lr; --dtype float32; a reward function that returns finite numbers"
            return [Alarm("nan", row["step"], f"a bad step: {row['skipped']}", cause, remedy)]
    return []


def table_line(name):
    """Return the line of the troubleshooting table that links to a section, as plain text."""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("|") and f"(#{name})" in line:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            return "; ".join(re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", cell) for cell in cells)
    raise ValueError(f"{TABLE}: no line links to #{name}")


def summary(rows):
    """Return a line on the first and the last steps of a run."""
    parts = []
    for name, title in SUMMARY.items():
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            first, last = values[:3], values[-3:]
            start, end = sum(first) / len(first), sum(last) / len(last)
            parts.append(f"{title} {start:.3g} to {end:.3g}")
    return f"{len(rows)} steps, means of the first three to means of the last three: " + (
        ", ".join(parts)
    )


def main(argv=None):
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", help="folder of a run")
    folder = pathlib.Path(parser.parse_args(argv).run)
    rows = rows_of(folder / "metrics.jsonl", renamed.METRICS)
    alarms = bad_steps(rows) + find_alarms(rows, may_differ(options_of(folder)))
    steps = [row for row in rows if "reward" in row and "skipped" not in row]
    if not steps and not alarms:
        raise UserError(f"{folder / 'metrics.jsonl'}: no step yet")
    if steps:
        print(summary(steps))
    for alarm in sorted(alarms, key=lambda alarm: alarm.step):
        print(f"{alarm}\n    {table_line(alarm.name)}")
    if not alarms:
        print(
            "no alarm. A run can fail without one: compare its numbers with "
            "docs/troubleshooting.md, and read responses in samples.jsonl"
        )


if __name__ == "__main__":
    run_main(main)
