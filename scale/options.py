"""The command line: argparse made from the dataclass of options, and one line for every setting that cannot work."""

import argparse
import dataclasses
import json
import os
import pathlib
import sys

import torch

from sampling import NonFinite
from scale.load import check_device
from tasks import BUILT_IN, BadInput, default_cap


def run_main(main):
    """Run a program; what the user can mend ends in one line and exit code 2, without a traceback."""
    name = pathlib.Path(sys.argv[0]).name
    try:
        return main()
    except BadInput as error:
        message = str(error)
    except NonFinite as error:
        message = f"{error}: the model's weights are damaged or overflow; try the folder they came from"
    except OSError as error:
        message = f"{error.strerror or error}: {error.filename or ''}; what was saved before is intact, --resume goes on from it"
    if os.environ.get("RANK", "0") == "0":  # every process of a sharded run meets the same mistake
        print(f"{name}: {message}", file=sys.stderr, flush=True)
    if "WORLD_SIZE" in os.environ:
        os._exit(2)  # as in World.close: gloo's threads can abort an interpreter that is shutting down
    sys.exit(2)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message} (see --help)")


def parse(Options, argv, description):
    """Options from the command line, from a resumed run's config.json where one is there, and from each other."""
    parser = OneLineParser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Options):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"] + ("" if f.default in ("", 0, None) and f.type is not bool else f" (default {f.default})")
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(flag, type=f.type, choices=f.metadata.get("choices"), help=text)
    given = vars(parser.parse_args(argv))
    o = Options(**given)
    o = dataclasses.replace(o, out=o.out or f"runs/{o.algo}-{pathlib.Path(o.data).stem if o.data else o.task}")
    if o.estimate:
        return complete(o)
    held = pathlib.Path(o.out) / "config.json"
    if held.exists() and "prompts_per_step" not in held.read_text(errors="replace"):
        raise BadInput(f"--out {o.out}: holds something that is not a run (its config.json is another program's); name another folder")
    if held.exists() and o.resume:
        return complete(resumed_options(Options, held, given, o))
    if held.exists() and not o.overwrite:
        raise BadInput(f"--out {o.out}: already holds a run; --resume continues it, --overwrite deletes it, or name another folder")
    return complete(o)


MAY_CHANGE = {"steps", "device", "micro_batch", "micro_tokens", "gradient_checkpointing", "offload", "eval_every", "save_every", "keep", "max_bad_steps", "resume", "overwrite", "out", "diagnose_every", "model"}


def resumed_options(Options, held, given, o):
    """A resumed run's own options; those given again must agree, except where changing them changes no result."""
    try:
        stored = json.loads(held.read_text())
    except ValueError as error:
        raise BadInput(f"{held}: not a run's config.json ({error})") from None
    for key, value in given.items():
        if key not in MAY_CHANGE and stored.get(key) != value:
            raise BadInput(f"--{key.replace('_', '-')} {value}: the run in {o.out} was started with {stored.get(key)}; leave the option out, or start a new run in another --out")
    known = {f.name for f in dataclasses.fields(Options)}
    return Options(**{k: v for k, v in stored.items() if k in known} | {k: v for k, v in given.items() if k in MAY_CHANGE} | {"resume": True, "overwrite": False})


def complete(o):
    """Fill in the defaults that depend on other options, and refuse what cannot work: one line each."""
    defaults = dict(
        device="cuda" if torch.cuda.is_available() else "cpu", loss_mean="sequence" if o.algo == "grpo" else "token", max_new_tokens=default_cap(o.task, o.data),
        difficulty=None if o.data else BUILT_IN[o.task][1][0],
        clip_high=0.2 if o.algo == "grpo" else 0.28, tau=0.1 if o.temperature_form == "zscore" else 0.05,
    )
    o = dataclasses.replace(o, **{name: value for name, value in defaults.items() if getattr(o, name) in (None, "")})
    at_least = dict(steps=1, prompts_per_step=1, updates_per_rollout=1, max_new_tokens=1, max_rounds=1, eval_prompts=1, eval_every=1, save_every=1, keep=1, max_bad_steps=1, micro_batch=0, micro_tokens=0, warmup_steps=0, diagnose_every=0, bupo_steps=1, overlong_buffer=0, seed=0)
    within = dict(rho=(0, 1), tau=(0, 0.9), clip_low=(0, 1), clip_high=(0, 10), temperature=(0.05, 10), lr=(0, 1), weight_decay=(0, 10), grad_clip=(1e-8, 1e8), kl=(0, 100))
    flag = lambda name: f"--{name.replace('_', '-')} {getattr(o, name)}"
    for name, low in at_least.items():
        if getattr(o, name) < low:
            raise BadInput(f"{flag(name)}: must be at least {low}")
    for name, (low, high) in within.items():
        if not low <= getattr(o, name) <= high:
            raise BadInput(f"{flag(name)}: must lie between {low:g} and {high:g}")
    if o.answers_per_prompt < 2:
        raise BadInput(f"{flag('answers_per_prompt')}: {o.algo} compares the answers to one prompt, so it needs at least 2")
    if o.prompts_per_step % o.updates_per_rollout:
        raise BadInput(f"{flag('prompts_per_step')}: must be a multiple of --updates-per-rollout {o.updates_per_rollout}, so that every update holds whole groups")
    if o.micro_batch and o.answers_per_update % o.micro_batch:
        raise BadInput(f"{flag('micro_batch')}: must divide the {o.answers_per_update} answers of an update ({o.prompts_per_step} x {o.answers_per_prompt} / {o.updates_per_rollout})")
    if o.micro_batch and o.micro_tokens:
        raise BadInput(f"{flag('micro_tokens')}: give --micro-batch or --micro-tokens, not both")
    if o.dual_clip and not o.dual_clip > 1:
        raise BadInput(f"{flag('dual_clip')}: must be larger than 1, or 0 for none")
    if o.overlong_buffer > o.max_new_tokens:
        raise BadInput(f"{flag('overlong_buffer')}: longer than --max-new-tokens {o.max_new_tokens}")
    if o.eval_data and not o.data:
        raise BadInput(f"{flag('eval_data')}: goes with --data; built-in tasks hold out problems of their own")
    if o.bupo_layer and o.bupo_layer != "auto" and not o.bupo_layer.isdecimal():
        raise BadInput(f"{flag('bupo_layer')}: must be auto or a layer from 1 to the model's last")
    if o.bupo_layer and o.bupo_steps >= o.steps:
        raise BadInput(f"{flag('bupo_steps')}: the first phase must be shorter than the run (--steps {o.steps})")
    if o.diagnose_every and not o.bupo_layer:
        raise BadInput(f"{flag('diagnose_every')}: needs --bupo-layer, the layer to compare the others with")
    check_device(o.device)
    return o
