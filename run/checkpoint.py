"""Write checkpoints that are complete or absent, and continue a run exactly from one.

checkpoint-N/ is an ordinary Hugging Face folder (config, weights, tokenizer) plus
    optimizer.pt     AdamW's moments by weight name (torch.load(weights_only=True))
    run.json         the rest of the state: step, data position, BuPO layer, entropy statistics,
                     guard, a hash of the options
    checksums.json   SHA-256 of every other file, written last
The folder is written under another name, flushed to the disk and renamed. So a run that is killed
at any moment leaves either no checkpoint-N or a complete one. Loading verifies every checksum and
uses the newest folder that passes. There is no random state to save: every draw is seeded by
(seed, step).
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
import time

import torch
from safetensors import SafetensorError, safe_open

from common import renamed
from common.errors import UserError
from engine.engine import full_tensor
from run.options import MAY_CHANGE

SHAPE = (
    "model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
    "intermediate_size vocab_size tie_word_embeddings"
).split()

NOT_THE_DISK = {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.EINVAL, errno.EBADF}


def remove(folder):
    """Delete a folder; of a link to a folder, delete the link alone."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def write_file(path, text):
    """Write a small text file atomically: a reader finds the old text or the new one."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def save(run, step):
    """Write checkpoint-`step` and remove all but the newest --save-total-limit.

    Every process must call it; process 0 writes.
    """
    started = time.perf_counter()
    weights, moments = gather(run)
    if not run.dist.main:
        return
    folder = run.out / f"checkpoint-{step}"
    aside = run.out / f".checkpoint-{step}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    with disk_faults_in_one_line(run.out, f"checkpoint {step}", aside):
        save_model(run, aside, weights)
        torch.save(moments, aside / "optimizer.pt")
        made_of = model_fingerprint(run.policy.config, run.tokenizer)
        settings = settings_hash(run.options)
        state = {"step": step, "fingerprint": made_of, "settings": settings, **run.state()}
        (aside / "run.json").write_text(json.dumps(state), encoding="utf-8")
        files = sorted(p for p in aside.rglob("*") if p.is_file())
        for path in files:
            _flush(path)
        sums = {p.relative_to(aside).as_posix(): _sha256(p) for p in files}
        (aside / "checksums.json").write_text(json.dumps(sums, indent=1), encoding="utf-8")
        _flush(aside / "checksums.json")
        if folder.exists() or folder.is_symlink():  # of before the run went back to a step
            remove(folder)
        os.replace(aside, folder)
        _flush(run.out)
    for old in folders(run.out, step)[run.options.save_total_limit :]:
        remove(old)
    run.saves.append((started, time.perf_counter()))
    say_what_saving_costs(run)


def say_what_saving_costs(run, count=5, tenth=0.1):
    """Print a note if checkpoints take more than a tenth of the time, once, after the fifth."""
    if len(run.saves) != count:
        return
    since, now = run.saves[0][1], run.saves[-1][1]
    spent = sum(end - start for start, end in run.saves[1:])
    share, every = spent / (now - since), run.options.save_every
    if share > tenth:
        # with n times as many steps between checkpoints, spent / (spent + n (now - since - spent))
        # is a tenth
        fewer = math.ceil(every * (1 - tenth) / tenth * share / (1 - share))
        run.say(
            f"note: checkpoints take {share:.0%} of the time ({spent / (count - 1):.1f} s each); "
            f"with --save-every {fewer} they would take a tenth, and a killed run may lose so many "
            "steps"
        )


@contextlib.contextmanager
def disk_faults_in_one_line(out, what, unfinished):
    """Turn a failed write, on a full or read-only disk, into a UserError; remove `unfinished`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # Python, torch.save, safetensors
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in NOT_THE_DISK:
            raise  # a fault of this program
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        raise UserError(
            f"--out {out}: {what} cannot be written ({reason}); what was saved before is intact. "
            "Free space, then --resume"
        ) from error


def save_model(run, folder, weights):
    """Write the policy's weights as an ordinary Hugging Face folder, and read one weight back."""
    run.policy.save_pretrained(folder, state_dict=dict(weights))  # a copy: it may be emptied
    config = folder / "config.json"  # transformers records the compute dtype; the files are float32
    config.write_text(
        json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}, indent=2),
        encoding="utf-8",
    )
    check_written(folder, weights)
    if not run.tokenizer_files:  # keep the files: they never change, and saving takes half a second
        with tempfile.TemporaryDirectory() as apart:
            run.tokenizer.save_pretrained(apart)
            files = [p for p in pathlib.Path(apart).rglob("*") if p.is_file()]
            run.tokenizer_files = {str(p.relative_to(apart)): p.read_bytes() for p in files}
    for name, content in run.tokenizer_files.items():  # some in a folder: additional_chat_templates
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def check_written(folder, weights):
    """Raise OSError if the smallest weight, read back from its file, is not what was written.

    A large model has several files, and an index that names the file of each weight.
    """
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.exists() else {}
    name = min(places or weights, key=lambda name: weights[name].numel())
    with safe_open(folder / places.get(name, "model.safetensors"), "pt") as file:
        if not torch.equal(file.get_tensor(name), weights[name]):
            raise OSError(f"{name} reads back as something else")


def gather(run):
    """Return (weights by name, AdamW state by weight name) as whole tensors in main memory.

    Every process must call it. Only process 0 keeps the tensors; the others return empty ones.
    """
    kept = run.dist.main
    every = {name for name, _ in run.policy.named_parameters(remove_duplicate=False)}
    tied = every - {name for name, _ in run.policy.named_parameters()}
    weights, moments = {}, {}
    parameters = dict(run.policy.named_parameters())
    for name, value in run.policy.state_dict().items():
        if name not in tied:
            gathered = run.engine.full_tensor(parameters[name]) if name in parameters else value
            if kept:
                weights[name] = gathered.cpu()
    for name, p in run.policy.named_parameters():
        for key, value in run.engine.optimizer.state.get(p, {}).items():
            gathered = full_tensor(value)
            if kept:
                moments.setdefault(name, {})[key] = gathered.cpu()
    return weights, moments


def folders(out, last=math.inf):
    """Return the checkpoint-N folders up to step `last`, newest first.

    (Later folders may be damaged ones that a resumed run has skipped.)
    """
    named = [(re.fullmatch(r"checkpoint-(\d+)", p.name), p) for p in out.glob("checkpoint-*")]
    found = [(int(match.group(1)), p) for match, p in named if match]
    return [p for step, p in sorted(found, reverse=True) if step <= last]


def newest_whole(out, say):
    """Return the newest checkpoint whose checksums all match, or None; print those skipped."""
    for folder in folders(out):
        fault = _fault(folder)
        if fault is None:
            say(f"resuming from {folder}, the newest whole checkpoint")
            return folder
        say(f"warning: {folder} is passed over: {fault}")
    return None


def to_resume(out, say):
    """Return the newest whole checkpoint, or None if the run has written none yet.

    UserError if there are checkpoints and none is whole. The fault may be transient, so nothing is
    deleted.
    """
    found = newest_whole(out, say)
    if found is None and folders(out):
        raise UserError(
            f"--resume: none of the {len(folders(out))} checkpoints in {out} is whole (see above); "
            "nothing was changed. Mend the disk, or start again with --overwrite or another --out"
        )
    return found


def _fault(folder):
    try:
        sums = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _sha256(folder / name) != expected:
                return f"{name} is damaged (its checksum differs)"
    except (OSError, ValueError) as error:
        return f"checksums.json cannot be read ({error})"
    listed = "run.json" in sums and "optimizer.pt" in sums
    return None if listed else "it lists no run.json or optimizer.pt"


def settings_hash(options):
    """Return the SHA-256 of the options that a resumed run may not change.

    Options with their default value are left out, so that an option added to the code later does
    not change the hash of an older run.
    """
    return _sum(given_settings(options))


def given_settings(options):
    """Return {name: value} of options that a resumed run may not change, without default values."""
    default = {f.name: f.default for f in dataclasses.fields(options)}
    given = {k: v for k, v in dataclasses.asdict(options).items() if v != default[k]}
    return {k: v for k, v in given.items() if k not in MAY_CHANGE}


def _sum(settings):
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def restore(run, folder):
    """Restore a run's state, except the weights, from a checkpoint. Return the checkpoint's step.

    UserError if the checkpoint belongs to other options or to an older version of the code.
    """
    state = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    state = renamed.with_new_names(state, renamed.STATE)
    given = given_settings(run.options)
    known = (_sum(given), _sum(renamed.with_old_names(given, renamed.OPTIONS)))
    if state.get("settings", known[0]) not in known:
        raise UserError(
            f"--resume: {folder} is of a run with other options than {run.out / 'config.json'}; "
            "move away what does not belong there, or start a new run in another --out"
        )
    if lacking := run.state().keys() - state.keys():
        raise UserError(
            f"--resume: {folder} is of an older version of this code (no {min(lacking)} in its "
            f"run.json) and cannot be continued; start a new run from it with --model {folder} and "
            "another --out"
        )
    run.restore(state)
    moments = torch.load(folder / "optimizer.pt", weights_only=True, mmap=True)
    for name, p in run.policy.named_parameters():
        if name in moments:
            kept = moments[name].items()
            template = run.engine.moment_template(p)
            run.engine.optimizer.state[p] = {
                key: _placed_like(value, template) for key, value in kept
            }
    return state["step"]


def _placed_like(value, parameter):
    if value.dim() and hasattr(parameter, "placements"):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements
        placed = distribute_tensor(value, mesh, placements, src_data_rank=None)
        mine = torch.empty_like(parameter)
        # offloaded parameters are in main memory, but their mesh is on the GPU
        mine.to_local().copy_(placed.to_local())
        return mine
    return value.to(parameter.device, copy=True)


def model_fingerprint(config, tokenizer):
    """Return what must agree between a checkpoint and a --model that is given with --resume."""
    shape = {name: getattr(config, name, None) for name in SHAPE}
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {"model": shape, "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest()}


def keep_lines(path, last_step):
    """Remove the lines of a JSONL file that are later than `last_step` or incomplete.

    A resumed run writes them again.
    """
    if path.exists():
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= last_step:
                    kept.append(line)
            except ValueError:
                pass  # an incomplete line that a killed run left at the end
        write_file(path, "".join(line + "\n" for line in kept))


def _flush(path):
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path):
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
