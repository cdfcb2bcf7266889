"""A checkpoint holds the weights that were trained, and a run says what happened to it."""

import gc
import json
import shutil
import types

import pytest
import torch
from conftest import verdicts
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train
from common.errors import UserError
from engine.engine import Engine, SingleProcess
from run import checkpoint, option_checks, report
from run.setup import open_run


@pytest.fixture
def trained(opened, monkeypatch):
    """trained(*options): a run's folder after train.main, nothing evaluated."""
    monkeypatch.setattr(report, "held_out", lambda run, step: {})
    monkeypatch.setattr(report, "first_look", lambda run: None)
    verdicts(monkeypatch, True, False)

    def one(*more):
        run = opened(*more)
        run.lock.lock.release()
        shutil.rmtree(run.out)
        train.train(run.options)
        return run.out

    return one


def all_weights(folder):
    """By name, of one file or of several."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def test_weights_in_several_files_are_those_that_were_trained(trained, monkeypatch):
    """As of a model over 50 GB: the files of the first save must not come back."""
    from transformers import PreTrainedModel

    real = PreTrainedModel.save_pretrained
    small = lambda self, *args, **more: real(self, *args, max_shard_size="100KB", **more)
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", small)
    out = trained("--steps", "2", "--save-total-limit", "9")
    assert len(list((out / "final").glob("*.safetensors"))) > 1
    start, one, two = (all_weights(out / f"checkpoint-{n}") for n in range(3))
    assert any(not torch.equal(start[name], one[name]) for name in start)
    assert any(not torch.equal(one[name], two[name]) for name in start)
    final = all_weights(out / "final")
    assert all(torch.equal(two[name], final[name]) for name in two) and final.keys() == two.keys()


def test_a_weight_that_reads_back_as_something_else_is_one_line(opened, monkeypatch):
    run = opened()
    real = run.policy.save_pretrained

    def damaged(folder, **more):
        real(folder, **more)
        weights = load_file(folder / "model.safetensors")
        name = min(weights, key=lambda n: weights[n].numel())
        weights[name] = weights[name] + 1
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(run.policy, "save_pretrained", damaged)
    with pytest.raises(UserError, match="checkpoint 0 cannot be written .*reads back as"):
        checkpoint.save(run, 0)
    assert not list(run.out.glob("*checkpoint-0*"))


@pytest.mark.parametrize("at, ends", [(2, "checkpoint-1"), (3, "checkpoint-2")])
def test_broken_weights_are_never_saved_as_good(trained, monkeypatch, at, ends):
    """NaN behind the last update of step 2 (of 3) or of the last step."""
    real, steps = Engine.optimizer_step, []

    def optimizer_step(engine, loss):
        result = real(engine, loss)
        steps.append(1)
        if len(steps) == at:
            with torch.no_grad():
                engine.policy.model.norm.weight[0] = torch.nan
        return result

    monkeypatch.setattr(Engine, "optimizer_step", optimizer_step)
    message = f"last good checkpoint is .*{ends}, and so is final/"
    with pytest.raises(UserError, match=message) as error:
        trained("--steps", "3", "--max-bad-steps", "9", "--save-total-limit", "9")
    assert "\n" not in str(error.value)
    out = next(p for p in _folders(error) if (p / "final").is_dir())
    good, final = all_weights(out / ends), all_weights(out / "final")
    assert all(torch.equal(good[name], final[name]) for name in good)
    assert all(x.isfinite().all() for x in final.values())
    assert not (out / "final" / "optimizer.pt").exists()
    assert (out / "final" / "README.md").is_file()
    assert not (out / f"checkpoint-{at}").exists()


def _folders(error):
    import pathlib
    import re

    found = re.search(r"checkpoint is (\S+)/checkpoint-", str(error.value)).group(1)
    return [pathlib.Path(found)]


def test_another_run_s_checkpoint_is_refused(trained):
    out = trained("--steps", "1")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(config | {"lr": 0.5}), encoding="utf-8")
    again = option_checks.parse(["--resume", "--out", str(out)], "")
    with pytest.raises(UserError, match="is of a run with other options than"):
        open_run(again, SingleProcess("cpu"))


def test_a_killed_overwrite_leaves_the_old_run_or_nothing(trained, monkeypatch):
    out = trained("--steps", "1")
    parsed = json.loads((out / "config.json").read_text(encoding="utf-8"))
    real, deleted = shutil.rmtree, []

    def killed(path, *args, **more):
        deleted.append(path.name)
        if len(deleted) == 2:
            raise KeyboardInterrupt
        real(path, *args, **more)

    monkeypatch.setattr("run.checkpoint.shutil.rmtree", killed)
    where = ["--model", parsed["model"], "--data", parsed["data"], "--device", "cpu"]
    again = ["--out", str(out), "--overwrite", "--lr", "0.5", "--prompts-per-step", "4", *where]
    again += ["--max-new-tokens", "6"]
    try:
        open_run(option_checks.parse(again, ""), SingleProcess("cpu"))
    except KeyboardInterrupt:
        pass
    gc.collect()  # lets go of the lock, as the end of a process does
    assert len(deleted) == 2
    assert (
        json.loads((out / "config.json").read_text(encoding="utf-8"))["lr"] == 1e-3
    )  # still the old one's
    monkeypatch.undo()
    (out / "config.json").unlink()
    (out / "checkpoint-7").mkdir(exist_ok=True)
    with pytest.raises(UserError, match="holds checkpoints of a run without its config.json"):
        open_run(option_checks.parse(again, ""), SingleProcess("cpu"))


def test_a_finished_run_that_goes_on_is_not_finished(trained):
    out = trained("--steps", "1")
    assert (out / "final").is_dir()
    run, step = open_run(
        option_checks.parse(["--resume", "--out", str(out), "--steps", "2"], ""),
        SingleProcess("cpu"),
    )
    run.lock.lock.release()
    assert step == 1 and not (out / "final").exists()


def test_no_whole_checkpoint_is_one_line_and_deletes_nothing(trained):
    out = trained("--steps", "1")
    for folder in checkpoint.folders(out):
        (folder / "checksums.json").unlink()
    before = {
        p: p.read_bytes()
        for p in out.rglob("*")
        if p.is_file() and p.name not in (".lock", ".writer")
    }
    again = option_checks.parse(["--resume", "--out", str(out), "--steps", "2"], "")
    with pytest.raises(UserError, match="none of the 2 checkpoints in .* is whole"):
        open_run(again, SingleProcess("cpu"))
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p in before}


def test_the_lock_is_held_until_final_is_written(trained, monkeypatch):
    held = []

    def finish(run):
        held.append(run.lock.lock.is_locked)

    monkeypatch.setattr(train, "finish", finish)
    trained("--steps", "1")
    assert held == [True]


def test_final_says_float32_where_the_weights_are(trained):
    out = trained("--steps", "1", "--split-master")
    assert (
        json.loads((out / "final" / "config.json").read_text(encoding="utf-8"))["dtype"]
        == "float32"
    )
    assert {x.dtype for x in all_weights(out / "final").values()} == {torch.float32}


def test_a_generation_config_that_contradicts_itself_can_be_saved(opened, tmp_path, tiny_folder):
    model = shutil.copytree(tiny_folder, tmp_path / "odd")
    config = {"do_sample": False, "temperature": 0.5, "eos_token_id": 1}
    (model / "generation_config.json").write_text(json.dumps(config), encoding="utf-8")
    run = opened("--model", str(model))
    checkpoint.save(run, 0)
    assert checkpoint.newest_whole(run.out, lambda text: None).name == "checkpoint-0"


def test_what_saving_costs_is_said_once():
    """Checkpoints of 2 s behind steps of 6: a quarter of the time. Behind steps of 18, a tenth."""
    for every, work, expected in (
        (1, 6.0, "--save-every 3 "),
        (2, 6.0, "--save-every 6 "),
        (1, 18.0, None),
    ):
        said, run = [], types.SimpleNamespace(options=types.SimpleNamespace(save_every=every))
        run.say, run.saves = said.append, []
        for i in range(9):
            end = 100 + i * (work + 2)
            run.saves.append((end - 2, end))
            checkpoint.say_what_saving_costs(run)
        if expected is None:
            assert not said
        else:
            (line,) = said
            assert line.startswith("note: checkpoints take 25% of the time (2.0 s each)")
            assert expected in line
