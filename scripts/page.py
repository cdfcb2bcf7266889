"""Write the page of a run: python scripts/page.py RUN [--compare RUN] [--out FILE]

The page is one HTML file that opens in any browser, offline. It has a slider over the steps, one
group of responses per step with each token shaded by one of its values (entropy, advantage, ...),
and the curves. A click on a token shows HAPO's formulas with its numbers, which the page computes,
also under other settings than the run's. It is written at the end of every run from metrics.jsonl
and samples.jsonl. The templates are in scripts/pages/; docs/explorer.html is the page of the
default run: python scripts/page.py runs/hapo-addition --out docs/explorer.html
"""

import json
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import renamed  # noqa: E402
from common.command import OneLineParser, run_main  # noqa: E402
from common.errors import UserError  # noqa: E402

LARGEST = 2_900_000  # bytes of a page; steps are left out until it fits
TOKENS = (
    "entropy temperature sampler_logp h advantage ratio clipped old_logp new_logp clip_low "
    "clip_high"
).split()
RESPONSES = "tokens reward finished update_tokens update_responses".split()
STATISTICS = "pivot sigma h_max h_min layer".split()  # of a step, from metrics.jsonl
SETTINGS = (
    "algo advantage clip_low clip_high dual_clip loss_mean max_new_tokens temperature tau rho "
    "temperature_form released adaptive_temperature token_group_average advantage_redistribution "
    "adaptive_clip dynamic_sampling baseline kl sampler_correction"
).split()  # options that the page's formulas depend on
DEFAULTS = {"tau": 0.05, "rho": 0.8, "temperature": 1.0}  # of runs that do not have the option
CURVES = ("reward entropy response_length grad_norm eval_accuracy eval_greedy eval_reward").split()


def rows_of(path, names):
    """Return the objects of a run's JSONL file. names: {old name: new name} of their keys.

    UserError if there is no such file, or a line is not an object with a step.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; name the folder of a run of train.py")
    rows, text = [], path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"{path}, line {number}: not JSON; is the run still writing?") from None
        if not isinstance(row, dict) or "step" not in row:
            raise UserError(f"{path}, line {number}: not a line of a run; it has no step")
        rows.append(renamed.with_new_names(row, names))
    return rows


def config_of(folder):
    """Return the options in a run's config.json, {} without one. UserError if it is damaged."""
    path = pathlib.Path(folder) / "config.json"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "{}"
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not the options of a run; it is damaged")
    return config


def read_run(folder):
    """Return (data of a run's page, the run's options).

    The data are the run's name and description, its curves, and one group of responses per step.
    UserError if the run has no step yet.
    """
    folder = pathlib.Path(folder)
    metrics = rows_of(folder / "metrics.jsonl", renamed.METRICS)
    samples = rows_of(folder / "samples.jsonl", renamed.SAMPLES)
    if not samples:
        raise UserError(f"{folder / 'samples.jsonl'}: empty; the run has made no step yet")
    if "advantage" not in samples[0]:
        raise UserError(
            f"{folder / 'samples.jsonl'}: of an older version of this code, without a whole group "
            "a step; make the run again"
        )
    options = config_of(folder)
    if not options:
        raise UserError(f"{folder / 'config.json'}: no such file; the page needs a run's options")
    measured, steps = {row["step"]: row for row in metrics}, {}
    for row in samples:
        step = row["step"]
        group = steps.setdefault(
            step,
            {
                "step": step,
                "question": row["question"],
                "reference_answer": row["reference_answer"],
                "stats": statistics(measured.get(step, {})),
                "before": statistics(measured[step - 1]) if step - 1 in measured else None,
                "responses": [],
            },
        )
        response = {name: short(row[name], 9) for name in TOKENS if name in row}  # as recorded
        response |= {name: row[name] for name in RESPONSES if name in row}
        chance = options["reward"] == "random"
        response["correct"] = row["reward"] > 0 if chance else row[options["reward"]]
        group["responses"].append(response)
    curves = {key: [[r["step"], short(r.get(key))] for r in metrics] for key in CURVES}
    curves["zero_std"] = [
        [r["step"], r["zero_std_groups"] / r["groups"]] for r in metrics if "groups" in r
    ]
    what = f"{options['algo']} on {options['data'] or options['task']}, {options['model']}"
    return {
        "name": folder.name,
        "what": what,
        "settings": {name: setting(options, name) for name in SETTINGS},
        "steps": list(steps.values()),
        "curves": curves,
    }, options


def setting(options, name):
    """Return an option of a run, or its default where the run has none."""
    value = options.get(name)
    return DEFAULTS.get(name) if value is None else value


def statistics(metrics):
    """Return what the page needs of a step's metrics: HAPO's statistics, quantiles of log H."""
    found = {name: metrics.get(name) for name in STATISTICS}
    return found | {"quantiles": metrics.get("log_entropy_quantiles")}


def short(value, digits=4):
    """Return numbers rounded to some digits, with None for NaN and infinity; others unchanged."""
    if isinstance(value, list):
        return [short(x, digits) for x in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.{digits}g}") if abs(value) < float("inf") else None


def in_script(data):
    """Return data as JSON that is safe in a <script>: it cannot end the element or a line."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def fill(template, data):
    """Return a template of scripts/pages/ with the shared CSS and JavaScript and the data in it."""
    folder = ROOT / "scripts" / "pages"
    page = (folder / template).read_text(encoding="utf-8")
    for name in ("shared.css", "shared.js", "hapo.js", "panel.js"):
        page = page.replace(f"/*{name}*/", (folder / name).read_text(encoding="utf-8"))
    return page.replace("/*data*/", in_script(data))


def keep_common(runs, folders):
    """Keep only the steps at which two runs show responses to the same question, in place.

    UserError if there are none.
    """
    asked = [{(s["step"], s["question"]) for s in run["steps"]} for run in runs]
    common = asked[0] & asked[1]
    if not common:
        raise UserError(
            f"--compare {folders[1]}: no step shows the same question as in {folders[0]}; compare "
            "runs of the same seed and the same --prompts-per-step"
        )
    for run in runs:
        run["steps"] = [s for s in run["steps"] if (s["step"], s["question"]) in common]


def write_page(folders, out=None):
    """Write the page of one run, or of two runs side by side, and return its path."""
    runs, options = zip(*(read_run(folder) for folder in folders))
    asked = [(o["task"], o["data"], o["difficulty"]) for o in options]
    if len(set(asked)) > 1:
        raise UserError(
            f"--compare {folders[1]}: another task or file than {folders[0]}; answers to different "
            "questions cannot stand side by side"
        )
    steps = len(runs[0]["steps"])
    if len(runs) > 1:
        keep_common(runs, folders)
    common = len(runs[0]["steps"])
    name = "page.html" if len(runs) == 1 else f"page-beside-{runs[1]['name']}.html"
    out = pathlib.Path(out or pathlib.Path(folders[0]) / name)
    lessons = os.path.relpath(ROOT / "lessons", out.resolve().parent).replace(os.sep, "/")
    data = {"runs": runs, "all": steps, "common": common, "lessons": lessons}
    page = fill("run.html", data)
    while len(page) > LARGEST and len(runs[0]["steps"]) > 2:
        for run in runs:  # every second step, the last one kept
            run["steps"] = run["steps"][::-1][::2][::-1]
        page = fill("run.html", data)
    out.write_text(page, encoding="utf-8")
    return out


def main(argv=None):
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--compare", metavar="RUN", help="a second run, beside the first")
    parser.add_argument(
        "--out", metavar="FILE", help="default RUN/page.html, or RUN/page-beside-NAME.html"
    )
    args = parser.parse_args(argv)
    folders = [args.run] + ([args.compare] if args.compare else [])
    path = write_page(folders, args.out)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")


if __name__ == "__main__":
    run_main(main)
