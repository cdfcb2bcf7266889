"""A checkpoint holds the weights that were trained, and a run says what happened to it."""

import gc
import json
import pathlib
import re
import shutil
import sys
import types

import pytest
import torch
from conftest import SMALL, verdicts
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train
from common.errors import UserError
from engine.engine import Engine, SingleProcess
from run import checkpoint, first_look, option_checks, report
from run.setup import open_run


@pytest.fixture
def trained(opened, monkeypatch):
    """trained(*options): a run's folder after train.main, nothing evaluated."""
    monkeypatch.setattr(report, "held_out", lambda run, step: {})
    monkeypatch.setattr(first_look, "first_look", lambda run: None)
    monkeypatch.setitem(sys.modules, "scripts.curves", None)  # as without matplotlib
    verdicts(monkeypatch, True, False)

    def one(*more):
        run = opened(*more)
        run.lock.lock.release()
        shutil.rmtree(run.out)
        train.train(run.options)
        return run.out

    return one


@pytest.fixture
def saved(opened):
    """The folder of a run with two checkpoints and final/."""
    run = opened("--steps", "1")
    for step in (0, 1):
        checkpoint.save(run, step)
    checkpoint.save_model(run, run.out / "final", checkpoint.gather(run)[0])
    run.lock.lock.release()
    return run.out


def resumed(out, *more):
    """(run, step) of a run that is resumed."""
    options = option_checks.parse(["--resume", "--out", str(out), *more], "")
    run, step = open_run(options, SingleProcess("cpu"))
    run.lock.lock.release()
    return run, step


def config_of(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def all_weights(folder):
    """By name, of one file or of several."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def test_weights_in_several_files_are_those_that_were_trained(trained, monkeypatch):
    """As of a model over 50 GB: the files of the first save must not come back. They are float32
    where the weights in memory are not, and say so."""
    from transformers import PreTrainedModel

    real = PreTrainedModel.save_pretrained
    small = lambda self, *args, **more: real(self, *args, max_shard_size="100KB", **more)
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", small)
    out = trained("--steps", "1", "--split-master")
    assert len(list((out / "final").glob("*.safetensors"))) > 1
    start, one, final = (all_weights(out / f) for f in ("checkpoint-0", "checkpoint-1", "final"))
    assert any(not torch.equal(start[name], one[name]) for name in start)
    assert all(torch.equal(one[name], final[name]) for name in one) and final.keys() == one.keys()
    assert config_of(out / "final")["dtype"] == "float32"
    assert {x.dtype for x in final.values()} == {torch.float32}


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


@pytest.mark.parametrize("at", [1, 2])
def test_broken_weights_are_never_saved_as_good(trained, monkeypatch, at):
    """NaN behind the last update of step 1 (of 2) or of the last step."""
    real, steps = Engine.optimizer_step, []

    def optimizer_step(engine, loss):
        result = real(engine, loss)
        steps.append(1)
        if len(steps) == at:
            with torch.no_grad():
                engine.policy.model.norm.weight[0] = torch.nan
        return result

    monkeypatch.setattr(Engine, "optimizer_step", optimizer_step)
    message = f"last good checkpoint is .*checkpoint-{at - 1}, and so is final/"
    with pytest.raises(UserError, match=message) as error:
        trained("--steps", "2", "--max-bad-steps", "9", "--save-total-limit", "9")
    assert "\n" not in str(error.value)
    newest = pathlib.Path(re.search(r"checkpoint is (\S+),", str(error.value)).group(1))
    good, final = all_weights(newest), all_weights(newest.parent / "final")
    assert all(torch.equal(good[name], final[name]) for name in good)
    assert all(x.isfinite().all() for x in final.values())
    assert not (newest.parent / "final" / "optimizer.pt").exists()
    assert (newest.parent / "final" / "README.md").is_file()
    assert not (newest.parent / f"checkpoint-{at}").exists()


def test_another_run_s_checkpoint_is_refused(saved):
    changed = json.dumps(config_of(saved) | {"lr": 0.5})
    (saved / "config.json").write_text(changed, encoding="utf-8")
    with pytest.raises(UserError, match="is of a run with other options than"):
        resumed(saved)


def test_a_killed_overwrite_leaves_the_old_run_or_nothing(saved, monkeypatch):
    real, deleted, stored = shutil.rmtree, [], config_of(saved)

    def killed(path, *args, **more):
        deleted.append(path.name)
        if len(deleted) == 2:
            raise KeyboardInterrupt
        real(path, *args, **more)

    where = ["--model", stored["model"], "--data", stored["data"], "--out", str(saved)]
    again = option_checks.parse([*SMALL, *where, "--overwrite", "--lr", "0.5"], "")
    with monkeypatch.context() as patch:
        patch.setattr("run.checkpoint.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            open_run(again, SingleProcess("cpu"))
    gc.collect()  # lets go of the lock, as the end of a process does
    assert len(deleted) == 2 and config_of(saved)["lr"] == 1e-3  # still the old one's
    (saved / "config.json").unlink()
    (saved / "checkpoint-7").mkdir()
    with pytest.raises(UserError, match="holds checkpoints of a run without its config.json"):
        open_run(again, SingleProcess("cpu"))


def test_a_finished_run_that_goes_on_is_not_finished(saved):
    assert (saved / "final").is_dir()
    assert resumed(saved, "--steps", "2")[1] == 1 and not (saved / "final").exists()


def test_no_whole_checkpoint_is_one_line_and_deletes_nothing(saved):
    for folder in checkpoint.folders(saved):
        (folder / "checksums.json").unlink()
    kept = [p for p in saved.rglob("*") if p.is_file() and p.name not in (".lock", ".writer")]
    before = [p.read_bytes() for p in kept]
    with pytest.raises(UserError, match="none of the 2 checkpoints in .* is whole"):
        resumed(saved, "--steps", "2")
    assert before == [p.read_bytes() for p in kept]


def test_the_lock_is_held_until_final_is_written(trained, monkeypatch):
    held = []
    monkeypatch.setattr(train, "finish", lambda run: held.append(run.lock.lock.is_locked))
    trained("--steps", "1")
    assert held == [True]


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
        (1, 6, "--save-every 3 "),
        (2, 6, "--save-every 6 "),
        (1, 18, ""),
    ):
        said, run = [], types.SimpleNamespace(options=types.SimpleNamespace(save_every=every))
        run.say, run.saves = said.append, []
        for i in range(9):
            end = 100 + i * (work + 2)
            run.saves.append((end - 2, end))
            checkpoint.say_what_saving_costs(run)
        assert len(said) == bool(expected)
        for line in said:
            assert line.startswith("note: checkpoints take 25% of the time (2.0 s each)")
            assert expected in line
