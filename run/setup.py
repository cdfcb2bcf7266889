"""Set up a run: model, data and folder, new or where it stopped; and describe it."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import random
import re
import zlib

import filelock
import torch

import internals
from common import renamed
from common.devices import default_dtype
from common.errors import UserError
from common.models import load_config, load_model, load_tokenizer, vocab_size_of
from engine import cuda_graphs, fsdp, memory
from engine.engine import full_tensor
from engine.self_check import check_engine
from problems.prompts import fit_context, instruct
from run import checkpoint, schedules
from run.alarms import History, find_alarms, may_differ
from run.build import build_engine, layer_of
from run.guard import Guard
from run.options import stored_options
from run.reward_function import RewardFunction
from run.state import Run
from sampling import NonFinite, eos_ids_of
from tasks import key_of, load_problems, read_problems

LOCK, WRITER = ".lock", ".writer"


def open_run(options, dist):
    """Return (run, the step it stands at): an old run's newest whole checkpoint; new: step None."""
    fsdp.check_processes(options, dist)
    say = print if dist.main else lambda *args, **kwargs: None
    out = pathlib.Path(options.out)
    found = checkpoint.to_resume(out, say) if options.resume else None
    if options.resume and found is None:
        say(f"no whole checkpoint in {out}: starting from the beginning")
    source = str(found or options.model)
    config = load_config(source)
    if options.resume and found:
        check_model_fingerprint(options, found)

    policy, tokenizer = open_policy(options, source, dist)
    train_examples, held_out = data_of_run(options, tokenizer, config, say)
    first_weights = None if found else weights_hash(policy)
    reward_function = None
    if options.reward_function:
        warn = functools.partial(print, flush=True)
        reward_function = RewardFunction(options.reward_function, warn)
    vocab_size, eos_ids = vocab_size_of(policy, tokenizer), eos_ids_of(policy, tokenizer)
    run = Run(
        options=options,
        dist=dist,
        reference=open_reference(options, dist) if options.kl else None,
        engine=build_engine(policy, options, dist, vocab_size, eos_ids),
        reward_function=reward_function,
        tokenizer=tokenizer,
        train_examples=train_examples,
        held_out=held_out,
        out=out,
        guard=Guard(say),
        mechanisms=options.hapo_mechanisms,
        layer=layer_of(options),
    )
    run.fingerprints = {"questions": questions_hash(train_examples, held_out)}
    run.fingerprints["prompts"] = prompt_hashes(train_examples)
    if reward_function:
        run.fingerprints["reward_function"] = reward_function.sum
    run.fingerprints["weights"] = first_weights
    step = restore(run, found) if found else None
    if options.keeps_masters and run.reference is not None:
        for p in run.reference.parameters():  # as the policy's own; rotary buffers stay float32
            p.data = p.data.to(torch.bfloat16)
    if options.self_check:
        dist.raise_on_all_ranks((UserError,), check_engine, run.engine, tokenizer)
    describe(run, config, say)
    dist.raise_on_all_ranks(
        (NonFinite, UserError), prepare_folder, run, -1 if step is None else step
    )
    return run, step


def restore(run, found):
    """Put back what a checkpoint holds; return its step. UserError if the run would be another."""
    now = run.fingerprints
    step = checkpoint.restore(run, found)
    check_fingerprints(run, now)
    schedules.check_resume(stored_options(run.options.out), run.options, step)
    return step


def open_policy(options, source, dist):
    """Return (model, tokenizer), ready to be trained."""
    if dist.sharded:
        policy = fsdp.shard_model(source, dist, options.offload, options.dtype)
        tokenizer = load_tokenizer(source)
    else:
        policy, tokenizer = load_model(source, dist.device)
    if options.gradient_checkpointing:
        # its name from transformers 5.20 on
        older = policy.gradient_checkpointing_enable
        getattr(policy, "activation_checkpointing_enable", older)({"use_reentrant": False})
    policy.train()
    no_dropout(policy)
    mend_generation_config(policy)
    try:
        check_blocks(policy, options, dist)
    except ValueError as error:
        raise UserError(str(error)) from error
    return policy, tokenizer


def mend_generation_config(policy):
    """Make a contradictory generation_config valid, so that it can be saved.

    An example is a temperature without sampling. Our decoder samples.
    """
    try:
        policy.generation_config.validate(strict=True)
    except ValueError:
        policy.generation_config.do_sample = True


@torch.no_grad()
def check_blocks(policy, options, dist):
    """Raise ValueError if the decoder is laid out in another way than engines and BuPO need."""
    internals.decoder_body(policy)
    if options.bupo_layer and options.bupo_layer != "auto":
        internals.check_layer(policy, int(options.bupo_layer), "--bupo-layer")
    if options.bupo_layer:  # pre-norm residual blocks: others have no internal policies
        ids = torch.ones(1, 2, dtype=torch.long, device=dist.device)
        internals.residual_stream(policy, ids, torch.ones_like(ids))
        dist.reshard(policy)


def open_reference(options, dist):
    """Return the initial model, which is never trained."""
    if dist.sharded:
        reference = fsdp.shard_model(options.model, dist, options.offload, options.dtype)
    else:
        reference, _ = load_model(options.model, dist.device)
    return reference.requires_grad_(False)


def check_model_fingerprint(options, found):
    """Raise UserError where --model or the tokenizer is not the checkpoint's.

    That happens with another --model next to --resume, or with a folder copied from two runs.
    """
    if options.model == started_with(options) and not pathlib.Path(options.model).exists():
        return  # a hub's, or moved away since: the checkpoint holds everything that is needed
    stored = json.loads((found / "run.json").read_text(encoding="utf-8"))["fingerprint"]
    config, tokenizer = load_config(options.model), load_tokenizer(options.model)
    current = checkpoint.model_fingerprint(config, tokenizer)
    for part in ("model", "tokenizer"):
        if stored[part] != current[part]:
            raise UserError(
                f"--resume: {found} was made with another {part} than --model {options.model}; "
                "name the model the run was started with, or another --out"
            )


def check_fingerprints(run, now):
    """Raise UserError unless questions, reward function and initial weights are unchanged.

    Data are compared by content, not by path.
    """
    options = run.options
    if now.get("reward_function") != run.fingerprints.get("reward_function"):
        raise UserError(
            f"--reward-function {options.reward_function}: the file is not what it was when the "
            f"run in {options.out} was started; restore it, or start a new run in another --out"
        )
    if now["questions"] != run.fingerprints["questions"]:
        what = f"--data {options.data}" if options.data else f"--task {options.task}"
        raise UserError(
            f"{what}: the questions in use are not those that the run in {options.out} was started "
            "with (a file has changed, or math-verify is installed now and was not then, or the "
            "other way round); restore them, or start a new run in another --out"
        )
    check_prompts(run, now["prompts"])
    initial = run.reference
    if initial is None and options.model != started_with(options):
        initial = open_reference(options, run.dist)
    if initial is not None and weights_hash(initial) != run.fingerprints["weights"]:
        raise UserError(
            f"--model {options.model}: its weights are not those that the run in {options.out} was "
            "started from; name that model, or start a new run in another --out"
        )


def prompt_hashes(items):
    """Return a hash of the ids of all prompts, and a short one of each of the first thousand."""
    texts = [json.dumps(ids) for _, ids in items]
    short = [zlib.crc32(text.encode()) for text in texts[:1000]]
    return {"all": hashlib.sha256("".join(texts).encode()).hexdigest(), "first": short}


def check_prompts(run, now):
    """Raise UserError where a question is rendered to another prompt than when the run started."""
    before = run.fingerprints.get("prompts", now)  # a run of an older version has none
    if now == before:
        return
    pairs = enumerate(zip(now["first"], before["first"]))
    row = next((i for i, (a, b) in pairs if a != b), None)
    where = "one behind the first thousand"
    if row is not None:
        problem, ids = run.train_examples[row]
        where = f"{problem.place or 'the first'}: now {run.tokenizer.decode(ids)[:80]!r}"
    why = "the chat template or the tokenizer has changed"
    if "strftime_now" in str(run.tokenizer.chat_template):
        why = "the chat template asks for the clock (strftime_now)"
    raise UserError(
        f"--resume: a question has another prompt than when the run in {run.options.out} was "
        f"started ({where}): {why}. Write the date into the template of a copy of the model, or "
        "start a new run in another --out"
    )


def started_with(options):
    """Return the --model in the run's config.json."""
    config = pathlib.Path(options.out) / "config.json"
    return json.loads(config.read_text(encoding="utf-8"))["model"]


@torch.no_grad()
def weights_hash(model):
    """Return a SHA-256 of a thousand entries of every weight: the same whole or sharded."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        entries = full_tensor(parameter.detach()).flatten()
        entries = entries[:: max(1, len(entries) // 1000)].float().cpu()
        digest.update(name.encode() + entries.numpy().tobytes())
    return digest.hexdigest()


def questions_hash(items, held_out):
    """Return a SHA-256 of every question in use, its reference answer and how it is checked."""
    asked = []
    for p in [problem for problem, _ in items] + held_out:
        # integers were checked as other numbers once, and runs of then go on
        kind = "number" if p.kind == "integer" else p.kind
        asked.append((p.question, p.answer, kind, p.numbers, *([p.history] if p.history else [])))
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def data_of_run(options, tokenizer, config, say):
    """Return load_data's result; the error of a resumed run says how to name data that moved."""
    try:
        return load_data(options, tokenizer, config, say)
    except UserError as error:
        if not options.resume:
            raise
        again = "if it lies elsewhere now, add --data NEWPATH (or --eval-data)"
        raise UserError(f"{error}; {again}") from error


def load_data(options, tokenizer, config, say):
    """Return ([(problem, prompt ids)] to train on, held-out problems).

    Prompts that leave no room for a response are dropped and counted.
    """
    own = bool(options.reward_function)  # which may reward responses that no rule can check
    if options.eval_data:
        form = options.form._replace(split=options.eval_split)
        train_set = read_problems(options.data, "--data", options.form, own)
        held_out = read_problems(options.eval_data, "--eval-data", form, own)
        random.Random(0).shuffle(held_out)  # the first ones are asked, and a file may be sorted
        say_overlap(train_set, held_out, options, say)
    else:
        asked = (options.task, options.data or None, options.difficulty)
        train_set, held_out = load_problems(*asked, options.form, own)
    cap, asked = options.max_new_tokens, options.instruction
    train_set, held_out = instruct(train_set, asked), instruct(held_out, asked)
    items = fit_context(train_set, tokenizer, config, cap, say)
    return items, [problem for problem, _ in fit_context(held_out, tokenizer, config, cap, say)]


def say_overlap(train_set, held_out, options, say):
    """Warn of questions that are in both files: they are not held out."""
    known = set(map(key_of, train_set))
    known_too = sum(key_of(p) in known for p in held_out)
    if known_too:
        say(
            f"warning: {known_too} of the {len(held_out)} questions of --eval-data "
            f"{options.eval_data} are also in --data {options.data}: they are trained on, and so "
            "not held out"
        )


def no_dropout(policy):
    """Switch dropout and noise off: with them, every ratio of new to old probability is random.

    A module holds the rate of a functional dropout as a number whose name says so.
    """
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and re.search("drop|jitter|noise", name):
                setattr(module, name, 0.0)


def prepare_folder(run, step):
    """Lock the run's folder, write config.json, drop metrics and samples later than `step`.

    Every process calls it; process 0 does the work.
    """
    options, out = run.options, run.out
    if not run.dist.main:
        return
    out.mkdir(parents=True, exist_ok=True)
    run.lock = lock(out)
    if options.overwrite and (out / "config.json").exists():
        for old in sorted(out.iterdir(), key=lambda p: p.name == "config.json"):
            if old.is_dir():  # config.json goes last: until then the folder holds the old run
                checkpoint.remove(old)
            elif old.name not in (LOCK, WRITER):
                old.unlink()
    if step < 0 and not options.resume and checkpoint.folders(out):
        raise UserError(
            f"--out {out}: holds checkpoints of a run without its config.json; delete them, or "
            "name another folder"
        )
    if step < options.steps:  # a finished run that is continued is not finished
        if (out / "final").is_dir():
            checkpoint.remove(out / "final")
    config = json.dumps(dataclasses.asdict(options), indent=1) + "\n"
    checkpoint.write_file(out / "config.json", config)
    for name in ("metrics.jsonl", "samples.jsonl"):
        checkpoint.keep_lines(out / name, step)
    if (out / "metrics.jsonl").exists():  # a resumed run does not print its alarms again
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [renamed.with_new_names(json.loads(line), renamed.METRICS) for line in lines]
        run.history = History(rows)
        run.known_alarms = {alarm.name for alarm in find_alarms(rows, may_differ(options))}


def lock(out):
    """Return a lock of the folder. The system frees it when the process ends, however it ends."""
    writer = out / WRITER
    try:
        held = filelock.FileLock(out / LOCK).acquire(timeout=0)
    except filelock.Timeout:
        who = writer.read_text(encoding="utf-8").strip() if writer.exists() else "?"
        raise UserError(
            f"--out {out}: process {who} is writing to this folder; wait for it, stop it, or name "
            "another folder"
        ) from None
    writer.write_text(f"{os.getpid()}\n", encoding="utf-8")
    return held


def describe(run, config, say):
    """Print model, data and sizes. UserError if the run cannot fit the device."""
    options, cuda = run.options, run.dist.device.type == "cuda"
    prompt = max(len(ids) for _, ids in run.train_examples[:1000])
    need = memory.estimate(config, options, prompt, run.dist.size, cuda, run.dist.sharded)
    memory.check_fit(need, config, options, prompt, run.dist.device)
    peak = need.peak / memory.GIB
    say(
        f"{options.algo} on {options.data or options.task}: {len(run.train_examples)} training "
        f"questions, {len(run.held_out)} held out; {options.model}, {need.parameters / 1e6:.2f} M "
        f"parameters, {internals.layer_count(run.policy)} layers"
    )
    responses = options.micro_batch or options.responses_per_update // run.dist.size
    micro = f"{options.micro_tokens} tokens" if options.micro_tokens else f"{responses} responses"
    say(
        f"a step: {options.prompts_per_step} prompts x {options.num_generations} responses = "
        f"{options.responses_per_step}, {options.updates_per_rollout} updates of "
        f"{options.responses_per_update} responses, in micro-batches of {micro}; "
        f"{run.dist.size} process(es)"
    )
    kept = "in main memory" if options.offload else ""
    kept = "as bfloat16 and their low 16 bits" if options.split_master else kept
    say(
        f"weights and moments float32{kept and ', ' + kept}; matrix products {options.dtype} on "
        f"{run.dist.device}; peak memory about {peak:.2f} GiB a process (--estimate: its parts on "
        "a GPU)"
    )
    say(schedules.described(options))
    if not run.engine.eos_ids:
        say(
            "note: neither the model nor the tokenizer names an end-of-sequence token; "
            "responses end at --max-new-tokens only"
        )
    reason = cuda_graphs.why_not(run.policy.config, run.dist.device)
    if cuda and options.capture and not options.plain and reason:
        say(f"note: decoding steps are not recorded as CUDA graphs: {reason}")
    best = default_dtype(run.dist.device)
    if options.dtype == "bfloat16" and best == "float16":
        say("note: this GPU has no hardware bfloat16 and is slow with it; use --dtype float16")
    if need.parameters > 1e8 and options.lr == type(options).lr:
        say(f"warning: --lr {options.lr:g} is for the shipped tiny model; the papers' is 1e-6")
    _, ids = run.train_examples[0]
    say(f"the first prompt ({len(ids)} tokens):\n{run.tokenizer.decode(ids)}\n")
