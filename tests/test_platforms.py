"""Other platforms, devices and places: no POSIX-only module, no default encoding, no network."""

import json
import os
import socket
import subprocess
import sys
import time
import types

import pytest
import torch
from conftest import ROOT, SMALL, TINY

from common import devices, hub
from common.errors import UserError
from common.models import load_config, load_model
from run import checkpoint
from scripts import follow

HIDDEN = ("fcntl", "resource", "pwd", "grp", "termios", "pty")
OURS = (
    r"(__main__|train|evaluate|internals|tasks|(bridges|common|engine|problems|run|scripts)\..*)$"
)
PROGRAMS = f"""
import builtins, json, runpy, sys, warnings
warnings.filterwarnings("error", category=EncodingWarning, module={OURS!r})
usual = builtins.__import__
def without(name, names=None, *more, **how):  # libraries ask for the platform first
    file = str((names or {{}}).get("__file__"))
    ours = {str(ROOT)!r} in file and "site-packages" not in file
    if ours and name in {HIDDEN!r}: raise ImportError(name)
    return usual(name, names, *more, **how)
builtins.__import__ = without
sys.modules["matplotlib"] = None  # no curves: a second each
sys.path[0] = "."
for command in json.loads(sys.argv[1]):
    print("\\n##", flush=True)
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code: raise
"""


def elsewhere(commands, **places):
    """What programs of the project print, run in turn in one interpreter without POSIX: every use
    by our own files of the platform's encoding is an error, and the terminal knows no Greek."""
    env = os.environ | {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONIOENCODING": "cp1252"}
    given = [[part.format(**places) for part in command.split()] for command in commands]
    command = [sys.executable, "-c", PROGRAMS, json.dumps(given)]
    done = subprocess.run(
        command, cwd=ROOT, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True
    )
    printed = done.stdout.decode("cp1252")
    assert done.returncode == 0, printed + done.stderr.decode("cp1252")
    return printed.split("\n##")[1:]


@pytest.mark.programs
def test_a_run_its_resume_and_its_evaluation_need_no_posix(tmp_path, tiny_folder):
    out, data = tmp_path / "run", tmp_path / "q.csv"
    rows = "".join(f"\u03c0 \u2248 {n} caf\u00e9 {n}?,{n}\n" for n in range(10))
    data.write_bytes(f"question,answer\n{rows}".encode())
    run = f"train.py {' '.join(SMALL)} --steps 1 --model {{model}} --data {{data}} --out {{out}}"
    sampled = "--limit 2 --samples 1 --max-new-tokens 4 --device cpu"
    wanted = {
        "train.py --help": "usage",
        "evaluate.py --help": "usage",
        "internals.py --help": "usage",
        "scripts/page.py --help": "usage",
        run: "done: ",
        "train.py --resume --out {out} --steps 2": "resuming from ",
        f"evaluate.py --model {{out}}/final {sampled}": "avg@1",
        "scripts/page.py {out}": "open it in a browser",
    }
    printed_by = elsewhere(wanted, model=tiny_folder, data=data, out=out)
    for (command, said), printed in zip(wanted.items(), printed_by, strict=True):
        assert said in printed, (command, printed)
    assert len((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 3


def test_folders_are_not_flushed_where_they_cannot_be(tmp_path, monkeypatch):
    checkpoint._flush(tmp_path)
    opened, folder = [], types.SimpleNamespace(is_dir=lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda *a: opened.append(a))
        patch.setattr(os, "name", "nt")
        checkpoint._flush(folder)
    assert opened == []


# ------------------------------------------------------------------------------------------ devices


def test_devices_are_asked_for_in_one_place(monkeypatch):
    for name in ("tpu", "cuda:x", "meta"):
        with pytest.raises(UserError, match="must be cpu, cuda, mps or xpu"):
            devices.check_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    devices.check_device("mps")
    with pytest.raises(UserError, match=r"--device mps:1: no such MPS device is visible \(1 are\)"):
        devices.check_device("mps:1")
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"--device xpu: no such XPU device is visible \(0 are\)"):
        devices.check_device("xpu")
    assert devices.default_dtype("mps") == "float32" and devices.default_dtype("xpu") == "bfloat16"
    assert devices.widest_float_dtype(torch.device("mps")) == torch.float32
    assert devices.widest_float_dtype(torch.device("cuda")) == torch.float64
    assert [devices.pins_memory(torch.device(d)) for d in devices.KNOWN] == [0, 1, 0, 1]


def test_the_accelerator_is_the_default(monkeypatch):
    for kind, chosen in (("xpu", "xpu"), ("mps", "mps"), ("hpu", "cpu")):
        there = types.SimpleNamespace(type=kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: there)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        assert devices.default_device() == chosen
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        assert devices.default_device() == "cpu"


def test_memory_where_nobody_tells(monkeypatch):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 5)
    assert devices.total_memory(torch.device("mps")) == 5
    assert devices.total_memory(torch.device("cpu")) > 2**28
    monkeypatch.delattr(os, "sysconf")
    assert devices.total_memory(torch.device("cpu")) is None


# ------------------------------------------------------------------------------ the hub and folders


@pytest.fixture
def no_proxy(monkeypatch):
    """The network is asked, whatever the user's environment says of it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in list(os.environ):
        if name.lower() in ("https_proxy", "all_proxy"):
            monkeypatch.delenv(name)


def test_a_hub_name_without_a_network_is_one_line(monkeypatch, no_proxy):
    def refuse(*args):
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(UserError, match="--model Nobody/none: no such folder, and the hub cannot"):
        load_config("Nobody/none")
    monkeypatch.setattr(hub, "SECONDS", 0.05)

    def slow(*args):
        time.sleep(0.5)
        return types.SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(socket, "create_connection", slow)
    with pytest.raises(UserError, match="no answer in 0.05 s"):
        load_config("Nobody/none")


def test_the_network_is_not_asked_for_what_is_known(monkeypatch, no_proxy):
    asked = []
    monkeypatch.setattr(hub, "_unreachable", lambda: asked.append(1) or "down")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a: "/cache/config.json")
    hub.check_network("--model a/b", "a/b")
    assert not asked
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a: None)
    with pytest.raises(UserError, match="down"):
        hub.check_network("--model a/b", "a/b")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    hub.check_network("--model a/b", "a/b")
    assert asked == [1]


def test_folders_that_are_no_models_say_what_they_are(tmp_path):
    lora, bare = tmp_path / "lora", tmp_path / "bare"
    lora.mkdir()
    (lora / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="holds a LoRA adapter, not a model; merge it"):
        load_config(str(lora))
    bare.mkdir()
    for path in TINY.iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            (bare / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="holds a configuration and no weights"):
        load_model(str(bare))


# ------------------------------------------------------------------------------------------- follow


def a_run(folder, *rows):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"steps": 2}), encoding="utf-8")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def test_follow_hands_on_every_number_once(tmp_path):
    seen, looks = [], []
    first = {"step": 0, "reward": 0.5, "phase": "full", "diagnose_kl": [1.0, 2.0], "x": None}
    a_run(tmp_path / "run", first)
    path = tmp_path / "run" / "metrics.jsonl"

    def look(seconds):
        looks.append(seconds)
        with open(path, "a", encoding="utf-8") as file:  # half a line, then the other half
            file.write('{"step": 2, "rew' if len(looks) == 1 else 'ard": 1}\n')

    write = lambda step, numbers: seen.append((step, numbers))
    assert follow.follow(tmp_path / "run", write, look=look) == 2
    numbers = {"reward": 0.5, "diagnose_kl/1": 1.0, "diagnose_kl/2": 2.0}
    assert seen == [(0, numbers), (2, {"reward": 1})] and len(looks) == 2


def test_follow_to_a_tool(tmp_path, monkeypatch, capsys):
    a_run(tmp_path / "run", {"step": 1, "reward": 0.25})
    logged = []
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **how: logged.append(how["name"])
    wandb.log = lambda numbers, step: logged.append((step, numbers))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    follow.main([str(tmp_path / "run"), "--to", "wandb", "--once"])
    assert logged == ["run", (1, {"reward": 0.25})] and "1 lines of" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="--to trackio: is not installed; pip install trackio"):
        follow.main([str(tmp_path / "run"), "--to", "trackio"])
    with pytest.raises(UserError, match="holds no run"):
        follow.main([str(tmp_path), "--to", "wandb"])
