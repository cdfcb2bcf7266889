"""Write the model card of final/: README.md, with the metadata that model hubs read.

The card contains no path of this machine, so final/ can be published unchanged.
"""

import dataclasses
import json
import pathlib
import shlex
from importlib import metadata

from run import checkpoint
from run.option_checks import with_defaults
from run.options import MAY_CHANGE, Options, flag_of

# Defaults of other options depend on these. SHOWN may change on a resume, but belong in the card.
DECIDE_DEFAULTS = (
    "algo baseline data device doctor estimate offload split_master task temperature_form".split()
)
SHOWN = {"data", "eval_data", "model", "steps"}
NAMES = {"hapo": "HAPO", "dapo": "DAPO", "grpo": "GRPO", "bupo": "BuPO"}
PAPERS = {"hapo": "2509.16591", "dapo": "2503.14476", "grpo": "2402.03300", "bupo": "2512.19673"}


def write_card(run, folder):
    """Write folder/README.md from the run's options and its metrics.jsonl."""
    lines = (run.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    text = card(run.options, [json.loads(line) for line in lines])
    checkpoint.write_file(folder / "README.md", text)


def card(options, metrics):
    """Return the text of a model card; metrics: the rows of metrics.jsonl."""
    base = public_name(options.model)
    method = " and ".join(NAMES[m] for m in methods_of(options))
    task = f"the built-in task {options.task}, level {options.difficulty}"
    if options.data:
        task = public_name(options.data)
    measured = [row for row in metrics if "eval_accuracy" in row]
    rows = [
        f"| {row['step']} | {row['eval_accuracy']:.3f} | {row['eval_greedy']:.3f} | "
        f"{row['eval_length']:.1f} |"
        for row in measured[:1] + measured[1:][-1:]
    ]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    return "\n".join(
        [
            "---",
            *metadata_of(options),
            "---",
            "",
            f"# {base}, trained with {method}",
            "",
            f"Base model: {base}. Data: {task}. Method: {method}, {options.steps} steps of "
            f"{options.responses_per_step} responses, learning rate {options.lr:g}, seed "
            f"{options.seed}. The base model's license applies.",
            "",
            f"Held-out accuracy ({options.verdict} verdict, at most {options.max_new_tokens} "
            "tokens):",
            "",
            "| step | sampled at temperature 1 | greedy | tokens of a response |",
            "|---|---|---|---|",
            *rows,
            "",
            "Options that this command leaves out have their default values. Files are named "
            "without their folders.",
            "",
            "```bash",
            command(given(options)),
            "```",
            "",
            f"Trained with {versions}.",
            "",
        ]
    )


def methods_of(options):
    """Return the names of a run's methods, as keys of PAPERS."""
    return [options.algo, *(["bupo"] if options.bupo_layer else [])]


def metadata_of(options):
    """Return the metadata lines between the two ---, which hubs read."""
    methods = methods_of(options)
    header = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["reinforcement-learning", *methods, *(f"arxiv:{PAPERS[m]}" for m in methods)],
    }
    if not is_local(options.model):
        header["base_model"] = options.model
    if options.data and not is_local(options.data):
        header["datasets"] = [options.data.partition(":")[0]]
    return [f"{key}: {json.dumps(value)}" for key, value in header.items()]  # JSON is YAML, too


def given(options):
    """Return {name: value} of the options that are not the default and change the result.

    Paths have only their last part.
    """
    decide = {name: getattr(options, name) for name in DECIDE_DEFAULTS}
    usual = with_defaults(dataclasses.replace(Options(), **decide))
    usual = dataclasses.asdict(usual) | {"algo": Options.algo, "task": Options.task, "data": ""}
    usual |= {"baseline": Options.baseline, "temperature_form": Options.temperature_form}
    changed = {k: v for k, v in dataclasses.asdict(options).items() if v != usual[k]}
    shown = {k: v for k, v in changed.items() if k in SHOWN or k not in MAY_CHANGE}
    for name in ("data", "eval_data", "model", "reward_function"):
        if name in shown:
            shown[name] = public_name(shown[name])
    return shown


def command(settings):
    """Return the command line of train.py for these options, {name: value}."""
    words = ["python train.py"]
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(flag_of(name) if value else flag_of(f"no_{name}"))
        else:
            words.append(f"{flag_of(name)} {shlex.quote(str(value))}")
    return " ".join(words)


def is_local(name):
    """Return whether a name is a local path, not a name on the hub."""
    path = pathlib.Path(name)
    return path.exists() or path.is_absolute() or len(path.parts) != 2


def public_name(name):
    """Return a hub name unchanged, and only the last part of a path."""
    return pathlib.Path(name).name if is_local(name) else name
