"""Define the options of a run, and read them from the command line and from a run's folder.

Nothing here imports torch, which takes seconds. So `check_command_line` reports a misspelled
option, a missing file or a folder that already holds a run at once. run/option_checks.py checks
combinations of options and fills in the defaults that depend on the machine.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import sys
from dataclasses import dataclass

from common import renamed
from common.command import OneLineParser, refuse_old_names
from common.errors import UserError
from common.hub import check_model_name
from problems.files import DatasetSpec, check_exists
from problems.prompts import FILE_INSTRUCTION
from run.reward_function import check_named
from tasks import BUILT_IN, FILE_CAP

FORMS = ["bounded", "zscore", "two"]
TASKS = "; ".join(f"{name}: {task.help}" for name, task in sorted(BUILT_IN.items()))
CAPS = ", ".join(f"{task.cap} {name}" for name, task in sorted(BUILT_IN.items()))


def opt(default, help, choices=None):
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Options:
    """Every setting of a run, which is saved as config.json. Symbols are those of the papers."""

    # model and data
    model: str = opt("assets/tiny-qwen3", "Hugging Face folder or hub name")
    task: str = opt("addition", f"built-in task; {TASKS}", sorted(BUILT_IN))
    difficulty: int = opt(None, "level of the built-in task; default its first")
    data: str = opt(
        "",
        "questions instead of a built-in task: .jsonl, .json, .csv or .parquet, each also .gz; a "
        "folder or a hub's OWNER/NAME through datasets",
    )
    data_split: str = opt("train", "split of --data to load")
    eval_data: str = opt("", "held-out questions, as --data; default some rows of --data")
    eval_split: str = opt("test", "split of --eval-data to load")
    question_column: str = opt("", "column of the questions; default question, prompt or messages")
    answer_column: str = opt(
        "", "column of the reference answers; default answer or reward_model.ground_truth"
    )
    instruction: str = opt(
        None, f"line after every question, '' for none; default '{FILE_INSTRUCTION}' for files"
    )
    reward: str = opt(
        "lenient",
        "verdict that is the reward; random: chance, a control from which nothing can be learned",
        ["strict", "lenient", "random"],
    )
    reward_function: str = opt(
        "", "FILE.py:NAME, a function (question, answer, text) -> float that replaces the verdict"
    )
    out: str = opt("", "output folder; default runs/ALGO-TASK")
    resume: bool = opt(False, "continue the run in --out from its newest whole checkpoint")
    overwrite: bool = opt(False, "delete the run that --out already holds")
    seed: int = opt(0, "seed of every random draw (the split of the questions is fixed)")
    steps: int = opt(40, "number of steps; each draws one batch of responses")
    device: str = opt("", "cpu, cuda, mps or xpu; default the accelerator if there is one")
    dtype: str = opt(
        "",
        "compute dtype of matrix products; default bfloat16 on a GPU that supports it, float16 on "
        "an older one, float32 on a CPU. Weights and moments are always float32",
        ["bfloat16", "float16", "float32"],
    )
    plain: bool = opt(False, "readable versions of all that has a fast one (for small models)")
    self_check: bool = opt(
        True, "compare sampler and scorer with the model's own forward pass before the first step"
    )
    capture: bool = opt(True, "record decoding steps as CUDA graphs and replay them")
    threads: int = opt(None, "CPU threads; default PyTorch's. On a busy machine 1 may be fastest")

    # the batch
    prompts_per_step: int = opt(32, "prompts per step, P")
    num_generations: int = opt(8, "responses per prompt, G")
    updates_per_rollout: int = opt(4, "optimizer steps on one batch of responses")
    micro_batch: int = opt(
        0, "responses per forward pass; 0: a whole mini-batch (never changes the result)"
    )
    micro_tokens: int = opt(0, "tokens per forward pass, instead of --micro-batch; 0: off")
    decode_rows: int = opt(0, "responses decoded at a time, whole groups; 0: all of a step")
    prefill_tokens: int = opt(2**15, "prompt tokens per prefill pass, padding included")
    max_new_tokens: int = opt(None, f"length cap of a response; default {CAPS}, {FILE_CAP} files")
    temperature: float = opt(1.0, "base temperature, T_base")
    dynamic_sampling: bool = opt(False, "replace groups whose rewards are all equal (DAPO)")
    max_rounds: int = opt(3, "rounds of dynamic sampling; after them, train on what there is")
    overlong_buffer: int = opt(
        0, "DAPO's soft overlong penalty: tokens before the cap over which it grows; 0: off"
    )

    # the objective
    algo: str = opt(
        "hapo",
        "grpo: clip 0.2/0.2, sequence mean; dapo: clip-higher 0.2/0.28, token mean; "
        "hapo: dapo and the four mechanisms",
        ["grpo", "dapo", "hapo"],
    )
    adaptive_temperature: bool = opt(True, "HAPO A: temperature by token entropy (Eq. 8)")
    token_group_average: bool = opt(True, "HAPO B: token-level group average (Eq. 9)")
    advantage_redistribution: bool = opt(True, "HAPO C: advantage redistribution (Eq. 10-11)")
    adaptive_clip: bool = opt(True, "HAPO D: asymmetric adaptive clipping (Eq. 12-13)")
    released: bool = opt(False, "follow HAPO's released code where it differs from the paper")
    advantage: str = opt("grpo", "group rule where HAPO's B is off", ["grpo", "rloo"])
    rho: float = opt(0.8, "quantile of the entropy pivot, rho")
    tau: float = opt(None, "strength of the adaptive temperature, tau; default 0.05, zscore 0.1")
    temperature_form: str = opt("bounded", "form of Eq. 8; two: a simple baseline", FORMS)
    clip_low: float = opt(0.2, "lower clip distance, eps_low")
    clip_high: float = opt(None, "upper clip distance, eps_high; default 0.2 grpo, else 0.28")
    dual_clip: float = opt(
        0.0, "dual clip c > 1: a token with A < 0 costs at most -c A; 0: off (papers: 10)"
    )
    loss_mean: str = opt(
        "",
        "mean of the loss; default sequence for grpo and gspo, else token",
        ["token", "sequence", "fixed"],
    )
    kl: float = opt(0.0, "coefficient of the k3 KL to the initial model (phase 2)")
    sampler_correction: bool = opt(False, "weight tokens by min(exp(old - sampler logp), 2)")
    baseline: str = opt(
        "none",
        "another use of entropy, trust region, group rule or ratio, to compare with",
        "none forking archer entropy-advantage edge dppo quantile cispo gspo".split(),
    )

    # BuPO
    bupo_layer: str = opt("", "layer whose policy is aligned first: 1 ... L, or auto: the boundary")
    bupo_steps: int = opt(30, "steps of the first phase, s_inter")
    bupo_norm: bool = opt(False, "apply the final norm to the internal policy, too")
    bupo_baseline: str = opt(
        "align",
        "align: BuPO; freeze: keep layers 1 ... l unchanged in the first phase; one-layer: train "
        "layer l alone in it; layer-lr: upper layers learn at 0.1 x lr",
        ["align", "freeze", "one-layer", "layer-lr"],
    )
    diagnose_every: int = opt(
        0, "steps between diagnostics (similarity, KL and entropy of the layers); 0: never"
    )

    # the optimizer
    lr: float = opt(2e-4, "AdamW's peak learning rate; the papers' is 1e-6, for 1.5B to 14B")
    weight_decay: float = opt(0.1, "AdamW's weight decay")
    warmup_steps: int = opt(10, "steps of linear warm-up")
    grad_clip: float = opt(1.0, "largest gradient norm")
    gradient_checkpointing: bool = opt(False, "recompute activations: less memory, more time")
    offload: bool = opt(
        False,
        "keep float32 weights and moments in main memory (with torchrun bfloat16 weights and "
        "gradients, too)",
    )
    split_master: bool = opt(
        False, "on one GPU: keep weights as bfloat16, and the low 16 bits of float32 separately"
    )
    doctor: bool = opt(False, "check machine, model, data and one step, then stop; keeps no file")
    estimate: bool = opt(False, "print the memory the run would need and stop; loads no weights")

    # evaluation and checkpoints
    eval_prompts: int = opt(512, "held-out responses per evaluation")
    eval_every: int = opt(20, "steps between evaluations; step 0 and the last are always evaluated")
    save_every: int = opt(1, "steps between checkpoints: what a killed run may lose")
    save_total_limit: int = opt(2, "number of checkpoints to keep")
    max_bad_steps: int = opt(5, "bad steps in a row (NaN or infinity) that stop the run")

    @property
    def responses_per_step(self):
        return self.prompts_per_step * self.num_generations

    @property
    def responses_per_update(self):
        return self.responses_per_step // self.updates_per_rollout

    @property
    def form(self):
        """Return the DatasetSpec of --data: its split and columns."""
        return DatasetSpec(self.data_split, self.question_column, self.answer_column)

    @property
    def verdict(self):
        """Return the verdict that is measured on held-out questions: --reward, unless random."""
        return "lenient" if self.reward == "random" else self.reward

    @property
    def hapo_mechanisms(self):
        """Return the letters of the HAPO mechanisms that are on, at most "ABCD"."""
        on = {
            "A": self.adaptive_temperature,
            "B": self.token_group_average,
            "C": self.advantage_redistribution,
            "D": self.adaptive_clip,
        }
        return "".join(part for part in on if on[part] and self.algo == "hapo")

    @property
    def keeps_masters(self):
        """Return whether the model has bfloat16 weights and separate float32 master weights."""
        return self.split_master or (self.offload and "WORLD_SIZE" not in os.environ)


def read_command_line(argv, description):
    """Return the Options of a command line, or of the run that it resumes.

    Defaults that depend on other options or on the machine are not filled in yet. UserError for a
    wrong option, a number out of its range, or an unsuitable --out.
    """
    refuse_old_names(sys.argv[1:] if argv is None else argv, renamed.OPTIONS)
    given = vars(_parser(description).parse_args(argv))
    options = Options(**given)
    name = options.task
    if options.data:
        name = re.sub(r"(\.\w{2,7}){1,2}$", "", pathlib.Path(options.data).name)
        name = re.sub(r"\W+", "-", name)
    options = dataclasses.replace(options, out=options.out or f"runs/{options.algo}-{name}")
    held = pathlib.Path(options.out) / "config.json"
    if any(p.exists() and not p.is_dir() for p in (held.parent, *held.parent.parents)):
        raise UserError(f"--out {options.out}: leads through a file; name another folder")
    if options.resume and not held.exists() and not given.keys() - {"resume", "out"}:
        raise UserError(f"--out {options.out}: holds no run that --resume could go on with")
    taken = held.exists() and not options.estimate and not options.doctor
    if taken and "prompts_per_step" not in held.read_text(errors="replace", encoding="utf-8"):
        raise UserError(
            f"--out {options.out}: holds something that is not a run (its config.json is another "
            "program's); name another folder"
        )
    if taken and options.resume:
        options = resumed_options(given, options)
        check_ranges(options)
        return options
    check_ranges(options)  # report a wrong setting before a folder that is already used
    if taken and not options.overwrite:
        raise UserError(
            f"--out {options.out}: already holds a run; --resume continues it, --overwrite deletes "
            "it, or name another folder"
        )
    return options


def check_command_line(argv, description):
    """Raise UserError for a wrong option, file or folder, as far as this is known without torch."""
    options = read_command_line(argv, description)
    if options.resume:
        return  # files may have moved; the resume checks them and says how to name them
    check_model_name(options.model)
    for flag, data in (("--data", options.data), ("--eval-data", options.eval_data)):
        if data and options.data and not options.estimate:  # an estimate reads no questions
            check_exists(data, flag)
    if options.reward_function:
        check_named(options.reward_function)


AT_LEAST = dict.fromkeys(
    "micro_batch micro_tokens decode_rows warmup_steps diagnose_every overlong_buffer seed".split(),
    0,
) | dict.fromkeys(
    "steps prompts_per_step updates_per_rollout max_new_tokens max_rounds eval_prompts eval_every "
    "save_every save_total_limit max_bad_steps bupo_steps prefill_tokens".split(),
    1,
)
WITHIN = dict(
    rho=(0, 1),
    tau=(0, 0.9),
    clip_low=(0, 1),
    clip_high=(0, 10),
    temperature=(0.05, 10),
    lr=(0, 1),
    weight_decay=(0, 10),
    grad_clip=(1e-8, 1e8),
    kl=(0, 100),
)


def check_ranges(options):
    """Raise UserError for a number out of its range. None is a default that is not set yet."""
    for name, low in AT_LEAST.items():
        value = getattr(options, name)
        if value is not None and value < low:
            raise UserError(f"{flag_of(name)} {value}: must be at least {low}")
    for name, (low, high) in WITHIN.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{flag_of(name)} {value}: must lie between {low:g} and {high:g}")


def _parser(description):
    parser = OneLineParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    for f in dataclasses.fields(Options):
        flag, text = flag_of(f.name), f.metadata["help"]
        if f.type is bool:
            on = f" (default {f.default})"
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text + on)
            continue
        if f.default not in ("", 0, None):
            text += f" (default {f.default})"
        parser.add_argument(flag, type=f.type, choices=f.metadata["choices"], help=text)
    return parser


def flag_of(name):
    return f"--{name.replace('_', '-')}"


# Options that may change when a run is resumed, since they change no result. For --steps,
# schedules.check_resume checks this; for --data and --eval-data, the questions must be the same.
MAY_CHANGE = {
    "capture",
    "data",
    "decode_rows",
    "device",
    "diagnose_every",
    "eval_data",
    "eval_every",
    "gradient_checkpointing",
    "max_bad_steps",
    "micro_batch",
    "micro_tokens",
    "model",
    "offload",
    "out",
    "overwrite",
    "plain",
    "prefill_tokens",
    "resume",
    "save_every",
    "save_total_limit",
    "self_check",
    "steps",
    "threads",
}


def stored_options(out):
    """Return the Options with which the run in a folder was last started or resumed."""
    path = pathlib.Path(out) / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not a run's config.json ({error})") from None
    stored = renamed.with_new_names(stored, renamed.OPTIONS)
    names = {f.name for f in dataclasses.fields(Options)}
    return Options(**{name: value for name, value in stored.items() if name in names})


def resumed_options(given, options):
    """Return a resumed run's Options. given: {name: value} of the command line.

    UserError if a given option differs from the run's and is not in MAY_CHANGE.
    """
    stored = stored_options(options.out)
    for key, value in given.items():
        if key not in MAY_CHANGE and getattr(stored, key) != value:
            raise UserError(
                f"{flag_of(key)} {value}: the run in {options.out} was started with "
                f"{getattr(stored, key)}; leave the option out, or start a new run in another --out"
            )
    changed = {name: value for name, value in given.items() if name in MAY_CHANGE}
    return dataclasses.replace(stored, **changed | {"resume": True, "overwrite": False})
