"""Every setting of a run, the command line that argparse makes of them, and one line for each that cannot work."""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from dataclasses import dataclass

import torch

from sampling import NonFinite
from scale.load import check_device
from tasks import BUILT_IN, BadInput, default_cap


def opt(default, help, **more):
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Options:
    """Every setting of a run, saved with it as config.json. Symbols are the papers'."""

    # what is trained, and on what
    model: str = opt("assets/tiny-qwen3", "Hugging Face folder or hub name")
    task: str = opt("countdown", "built-in task", choices=sorted(BUILT_IN))
    difficulty: int = opt(None, "level of the built-in task; default its first")
    data: str = opt("", "JSONL or parquet file of questions instead of a built-in task")
    eval_data: str = opt("", "file of held-out questions; without it some rows of --data are kept apart")
    reward: str = opt("lenient", "which verdict is the reward", choices=["strict", "lenient"])
    out: str = opt("", "output folder; default runs/ALGO-TASK")
    resume: bool = opt(False, "continue the run in --out exactly where its newest whole checkpoint stands")
    overwrite: bool = opt(False, "delete the run that --out already holds")
    seed: int = opt(0, "every random draw of the run follows from it (the split of the questions is fixed)")
    steps: int = opt(120, "rollout batches")
    device: str = opt("", "cpu or cuda; default cuda where there is one")

    # the batch
    prompts_per_step: int = opt(32, "P, prompts a step")
    answers_per_prompt: int = opt(8, "G, answers a prompt")
    updates_per_rollout: int = opt(4, "optimiser steps on one batch of answers")
    micro_batch: int = opt(0, "sequences in one forward and backward pass; 0: all at once (never changes the result)")
    micro_tokens: int = opt(0, "instead of --micro-batch: tokens in one pass, padding included")
    max_new_tokens: int = opt(None, "length cap of an answer; default 16 countdown, 32 arithmetic, 512 files")
    temperature: float = opt(1.0, "T_base")
    dynamic_sampling: bool = opt(False, "replace groups whose rewards are all equal by new ones (DAPO)")
    max_rounds: int = opt(3, "rounds of dynamic sampling; then train on what there is")
    overlong_buffer: int = opt(0, "DAPO's soft punishment over the last so many tokens before the cap; 0: off")

    # the objective
    algo: str = opt("hapo", "grpo: clip 0.2/0.2, sequence mean; dapo: clip-higher 0.2/0.28, token mean; hapo: dapo and the four parts", choices=["grpo", "dapo", "hapo"])
    adaptive_temperature: bool = opt(True, "HAPO A: temperature by token entropy (Eq. 8)")
    token_group_average: bool = opt(True, "HAPO B: token-level group average (Eq. 9)")
    advantage_redistribution: bool = opt(True, "HAPO C: differential advantage redistribution (Eq. 10-11)")
    adaptive_clip: bool = opt(True, "HAPO D: asymmetric adaptive clipping (Eq. 12-13)")
    released: bool = opt(False, "behave as HAPO's released code where it departs from the paper")
    rho: float = opt(0.8, "rho, quantile of the entropy pivot")
    tau: float = opt(None, "tau, strength of the adaptive temperature; default 0.05 bounded, 0.1 zscore")
    temperature_form: str = opt("bounded", "form of Eq. 8", choices=["bounded", "zscore"])
    clip_low: float = opt(0.2, "eps_low")
    clip_high: float = opt(None, "eps_high; default 0.2 grpo, 0.28 dapo and hapo")
    dual_clip: float = opt(0.0, "c > 1: a token with A < 0 costs at most -c A; 0: off (HAPO's runs: 10)")
    loss_mean: str = opt("", "default: sequence for grpo, token otherwise", choices=["token", "sequence", "fixed"])
    kl: float = opt(0.0, "coefficient of the k3 KL to the initial model (phase 2); 0: no reference model is held")
    comparison: str = opt("none", "another use of entropy, for comparison", choices=["none", "forking", "archer", "entropy-advantage", "edge"])

    # BuPO
    bupo_layer: str = opt("", "align this layer's policy first: 1 ... L, or auto for the boundary layer")
    bupo_steps: int = opt(30, "s_inter, steps of the first phase")
    bupo_norm: bool = opt(False, "final norm on the internal policy too")
    bupo_arm: str = opt("align", "align: BuPO; comparison arms: freeze layers 1 ... l in the first phase, or layer-lr: upper layers learn at 0.1 x lr", choices=["align", "freeze", "layer-lr"])
    diagnose_every: int = opt(0, "log similarity, KL and entropy change of the layers every so many steps; 0: never")

    # the optimiser
    lr: float = opt(1e-4, "AdamW; 1e-6 is the papers' for 1.5B to 14B")
    weight_decay: float = opt(0.1, "AdamW")
    warmup_steps: int = opt(10, "linear warm-up")
    grad_clip: float = opt(1.0, "largest gradient norm")
    gradient_checkpointing: bool = opt(False, "recompute layers in the backward pass: less memory, a third more time")
    offload: bool = opt(False, "with torchrun: weights, gradients and moments in main memory")
    estimate: bool = opt(False, "print what the run would need in memory and stop; loads no weights")

    # looking at it
    eval_prompts: int = opt(512, "held-out answers an evaluation")
    eval_every: int = opt(30, "steps; step 0 and the last are always evaluated")
    save_every: int = opt(1, "steps between checkpoints: what a killed run may lose (raise it for large models)")
    keep: int = opt(2, "checkpoints that are kept")
    max_bad_steps: int = opt(5, "stop after so many steps in a row with NaN or infinity")

    @property
    def answers_per_step(self):
        return self.prompts_per_step * self.answers_per_prompt

    @property
    def answers_per_update(self):
        return self.answers_per_step // self.updates_per_rollout


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


def parse(argv, description):
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
    held = pathlib.Path(o.out) / "config.json"
    taken = held.exists() and not o.estimate
    if taken and "prompts_per_step" not in held.read_text(errors="replace"):
        raise BadInput(f"--out {o.out}: holds something that is not a run (its config.json is another program's); name another folder")
    if taken and o.resume:
        return complete(resumed_options(held, given, o))
    o = complete(o)  # a setting that cannot work is named before the folder is
    if taken and not o.overwrite:
        raise BadInput(f"--out {o.out}: already holds a run; --resume continues it, --overwrite deletes it, or name another folder")
    return o


MAY_CHANGE = {"steps", "device", "micro_batch", "micro_tokens", "gradient_checkpointing", "offload", "eval_every", "save_every", "keep", "max_bad_steps", "resume", "overwrite", "out", "diagnose_every", "model"}


def resumed_options(held, given, o):
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
