"""Fill in the defaults that depend on other options, and reject options that cannot work."""

import dataclasses
import os

from common.devices import check_device, default_device, default_dtype
from common.errors import UserError
from problems.prompts import default_instruction
from run import schedules
from run.options import Options, flag_of, read_command_line
from tasks import BUILT_IN, default_cap


def parse(argv, description):
    """Return complete Options from a command line and, on a resume, the run's config.json."""
    return complete(read_command_line(argv, description))


def with_defaults(options):
    """Return options with the defaults that depend on other options and on the machine."""
    grpo = options.algo == "grpo"
    defaults = dict(
        device=default_device(),
        loss_mean="sequence" if grpo or options.baseline == "gspo" else "token",
        max_new_tokens=default_cap(options.task, options.data),
        difficulty=None if options.data else next(iter(BUILT_IN[options.task].levels)),
        clip_high=0.2 if grpo else 0.28,
        tau=0.1 if options.temperature_form == "zscore" else 0.05,
    )
    if options.instruction is None:  # '' is a valid setting: no instruction
        options = dataclasses.replace(options, instruction=default_instruction(options.data))
    missing = {k: v for k, v in defaults.items() if getattr(options, k) in (None, "")}
    options = dataclasses.replace(options, **missing)
    check_device(options.device)
    if not options.dtype and not options.estimate:  # an estimate is for a GPU on any machine
        dtype = "bfloat16" if options.keeps_masters else default_dtype(options.device)
        options = dataclasses.replace(options, dtype=dtype)
    return options


def complete(options):
    """Return options with all defaults. Raise UserError for an option that cannot work."""
    options = with_defaults(options)
    faults = [
        *impossible(options),
        *without_effect(options),
        *with_a_baseline(options),
        *without_data(options),
    ]
    for wrong, name, why in faults:
        if wrong:
            raise UserError(f"{flag_of(name)} {getattr(options, name)}: {why}")
    return options


def impossible(options):
    """Yield (whether the fault is present, option, message) for options that cannot be combined."""
    o = options
    P, G, updates = o.prompts_per_step, o.num_generations, o.updates_per_rollout
    layer = o.bupo_layer and o.bupo_layer != "auto"
    token_average = o.algo == "hapo" and o.token_group_average
    yield o.doctor and o.resume, "doctor", "checks a new run; leave --resume out"
    few = f"{o.algo} compares the responses to one prompt, so it needs at least 2"
    yield G < 2, "num_generations", few
    yield (
        P % updates,
        "prompts_per_step",
        f"must be a multiple of --updates-per-rollout {updates}, so that every update holds whole "
        "groups",
    )
    yield (
        o.micro_batch and o.responses_per_update % o.micro_batch,
        "micro_batch",
        f"must divide the {o.responses_per_update} responses of an update ({P} x {G} / {updates})",
    )
    both = o.micro_batch and o.micro_tokens
    yield both, "micro_tokens", "give --micro-batch or --micro-tokens, not both"
    yield o.dual_clip and not o.dual_clip > 1, "dual_clip", "must be larger than 1, or 0 for none"
    longer = o.overlong_buffer > o.max_new_tokens
    yield longer, "overlong_buffer", f"longer than --max-new-tokens {o.max_new_tokens}"
    yield (
        o.advantage != "grpo" and token_average,
        "advantage",
        "HAPO's B is a group rule itself; add --no-token-group-average or another --algo",
    )
    yield from impossible_sampler(o)
    yield from impossible_precision(o)
    alone = o.eval_data and not o.data
    yield alone, "eval_data", "needs --data; built-in tasks have their own held-out problems"
    wrong = layer and not o.bupo_layer.isdecimal()
    yield wrong, "bupo_layer", "must be auto or a layer from 1 to the model's last"
    one_phase = len(schedules.phase_1_steps(o)) == o.steps
    yield (
        o.bupo_layer and o.bupo_baseline != "one-layer" and one_phase,
        "bupo_steps",
        f"the first phase must be shorter than the run (--steps {o.steps})",
    )
    yield (
        o.diagnose_every and not o.bupo_layer,
        "diagnose_every",
        "needs --bupo-layer, the layer to compare the others with",
    )


def impossible_sampler(o):
    """Yield (whether the fault is present, option, message) for options of the sampler."""
    G = o.num_generations
    too_few = o.decode_rows and o.decode_rows < G
    yield (
        too_few,
        "decode_rows",
        f"the {G} responses to a prompt are drawn together: at least {G}",
    )
    yield (
        o.sampler_correction and o.bupo_layer,
        "sampler_correction",
        "the sampler does not draw from an internal policy; leave --bupo-layer out",
    )


def impossible_precision(o):
    """Yield (whether the fault is present, option, message) for dtypes and places of weights."""
    shared, half = "WORLD_SIZE" in os.environ, o.dtype == "float16"
    yield (
        half and (shared or o.keeps_masters),
        "dtype",
        "its loss scaling is for one process with float32 weights; take bfloat16, or one GPU "
        "without --offload and --split-master",
    )
    yield (
        o.split_master and (shared or o.offload),
        "split_master",
        "is for one process with everything on the card; leave out torchrun and --offload",
    )
    yield (
        o.keeps_masters and o.dtype not in ("bfloat16", ""),
        "dtype",
        "--offload and --split-master keep the model's weights in bfloat16; leave --dtype out",
    )


def without_effect(options):
    """Yield (whether the fault is present, option, message) for options that have no effect.

    They are rejected, so that config.json records only options that were used.
    """
    o, default = options, {f.name: f.default for f in dataclasses.fields(Options)}
    yield (
        o.baseline != "none" and o.algo == "hapo",
        "baseline",
        "a baseline replaces HAPO; add --algo dapo or --algo grpo",
    )
    bounded = o.temperature_form == default["temperature_form"]
    yield (
        o.released and not bounded,
        "temperature_form",
        "the released code has only the bounded form; leave --released out",
    )
    parts = [
        name for name in default if name.startswith(("adaptive_", "token_group", "advantage_"))
    ]
    for name in ("released", "rho", "temperature_form", *parts):
        unused = o.algo != "hapo" and getattr(o, name) != default[name]
        yield unused, name, f"belongs to HAPO and would do nothing with --algo {o.algo}"
    constant = "A" not in o.hapo_mechanisms
    for name, given in (("tau", o.tau not in (0.05, 0.1)), ("temperature_form", not bounded)):
        yield constant and given, name, "does nothing without HAPO's adaptive temperature"
    steered = set("ACD") & set(o.hapo_mechanisms)
    yield not steered and o.rho != default["rho"], "rho", "does nothing without HAPO's A, C and D"
    unused = o.max_rounds != default["max_rounds"] and not o.dynamic_sampling
    yield unused, "max_rounds", "does nothing without --dynamic-sampling"
    for name in ("bupo_norm", "bupo_baseline", "bupo_steps"):
        unused = not o.bupo_layer and getattr(o, name) != default[name]
        yield unused, name, "does nothing without --bupo-layer"
    usual = dataclasses.replace(o, bupo_steps=default["bupo_steps"])
    steps = range(1, max(o.bupo_steps, usual.bupo_steps) + 2)
    phases = [[schedules.in_phase_1(step, options) for step in steps] for options in (o, usual)]
    ignored = o.bupo_steps != usual.bupo_steps and phases[0] == phases[1]
    yield (
        ignored,
        "bupo_steps",
        "does nothing: the phases of this run do not depend on it",
    )
    yield (
        o.bupo_norm and o.bupo_baseline != "align",
        "bupo_norm",
        f"no internal policy is trained with --bupo-baseline {o.bupo_baseline}",
    )


def with_a_baseline(o):
    """Yield (whether the fault is present, option, message) for settings a baseline replaces."""
    default = {f.name: f.default for f in dataclasses.fields(Options)}
    moved = o.clip_low != 0.2 or o.clip_high not in (0.2, 0.28)
    own_bounds = o.baseline in ("archer", "dppo", "gspo") and moved
    yield own_bounds, "baseline", "has its own bounds; leave --clip-low and --clip-high out"
    lower = o.baseline == "cispo" and o.clip_low != 0.2
    yield lower, "clip_low", "does nothing with --baseline cispo, which has only an upper bound"
    other_rule = o.baseline == "quantile" and o.advantage != "grpo"
    yield other_rule, "advantage", "--baseline quantile replaces it"
    other_mean = o.baseline == "gspo" and o.loss_mean != "sequence"
    yield other_mean, "loss_mean", "--baseline gspo averages over responses; leave it out"
    for name in ("kl", "sampler_correction", "dual_clip"):
        unused = o.baseline in ("cispo", "gspo") and getattr(o, name) != default[name]
        yield unused, name, f"does nothing with --baseline {o.baseline}, which has its own loss"


def without_data(o):
    """Yield (whether the fault is present, option, message) for questions and rewards."""
    default = {f.name: f.default for f in dataclasses.fields(Options)}
    yield (
        o.reward_function and o.reward == "random",
        "reward",
        "--reward-function replaces it; leave one of them out",
    )
    for name in ("data_split", "question_column", "answer_column"):
        unused = not o.data and getattr(o, name) != default[name]
        yield unused, name, "does nothing without --data"
    unused = not o.eval_data and o.eval_split != default["eval_split"]
    yield unused, "eval_split", "does nothing without --eval-data"
    for name in ("task", "difficulty"):
        unused = o.data and getattr(o, name) != default[name]
        yield unused, name, "belongs to the built-in tasks and would do nothing with --data"
