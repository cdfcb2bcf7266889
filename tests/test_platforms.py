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
from conftest import ROOT, TINY

from common import devices, hub
from common.errors import UserError
from common.models import load_config, load_model
from run import checkpoint
from scripts import follow

HIDDEN = ("fcntl", "resource", "pwd", "grp", "termios", "pty")
OURS = r"(__main__|train|evaluate|internals|tasks|(run|program|questions|grading|scripts)\..*)$"
PROGRAM = (
    "import runpy, sys, warnings\n"
    f"warnings.filterwarnings('error', category=EncodingWarning, module={OURS!r})\n"
    "import builtins\n"
    "usual = builtins.__import__\n"
    "def without(name, names=None, *more, **how):\n"  # libraries ask for the platform first
    f"    ours = {str(ROOT)!r} in str((names or {{}}).get('__file__'))\n"
    "    ours = ours and 'site-packages' not in names['__file__']\n"
    f"    if ours and name in {HIDDEN!r}: raise ImportError(name)\n"
    "    return usual(name, names, *more, **how)\n"
    "builtins.__import__ = without\n"
    "sys.argv = sys.argv[1:]\n"
    "sys.path[0] = '.'\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')\n"
)
SMALL = (
    "--prompts-per-step 2 --num-generations 2 --updates-per-rollout 1 --max-new-tokens 4 "
    "--eval-prompts 2 --device cpu"
).split()


def elsewhere(*command):
    """A program of the project as it would run without POSIX: every use by our own files of the
    platform's encoding is an error, and the terminal knows no Greek."""
    env = os.environ | {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONIOENCODING": "cp1252"}
    env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command], cwd=ROOT, env=env, capture_output=True
    )
    return done.returncode, done.stdout.decode("cp1252"), done.stderr.decode("cp1252")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The shipped model; libraries may read its files as they like, ours may not."""
    return str(TINY)


@pytest.mark.parametrize("program", ["train.py", "evaluate.py", "internals.py", "scripts/page.py"])
def test_help_needs_no_posix(program):
    code, out, err = elsewhere(program, "--help")
    assert code == 0 and "usage" in out, err


def test_a_run_its_resume_and_its_evaluation_need_no_posix(tmp_path, model):
    out, data = str(tmp_path / "run"), tmp_path / "q.csv"
    data.write_bytes(
        "question,answer\n".encode()
        + b"".join(f"\u03c0 \u2248 {n} caf\u00e9 {n}?,{n}\n".encode() for n in range(10))
    )
    where = ["--model", model, "--out", out, "--data", str(data)]
    code, said, err = elsewhere("train.py", *SMALL, *where, "--steps", "1")
    assert code == 0 and "done: " in said, err
    code, said, err = elsewhere("train.py", "--resume", "--out", out, "--steps", "2")
    assert code == 0 and "resuming from " in said, err
    assert len((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    more = ["--limit", "2", "--samples", "1", "--max-new-tokens", "4", "--device", "cpu"]
    code, said, err = elsewhere("evaluate.py", "--model", f"{out}/final", *more)
    assert code == 0 and "avg@1" in said, err
    code, said, err = elsewhere("scripts/page.py", out)
    assert code == 0 and "open it in a browser" in said, err


def test_folders_are_not_flushed_where_they_cannot_be(tmp_path, monkeypatch):
    checkpoint._flush(tmp_path)
    opened = []
    monkeypatch.setattr(os, "open", lambda *a: opened.append(a))
    monkeypatch.setattr(os, "name", "nt")
    folder = types.SimpleNamespace(is_dir=lambda: True)
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


@pytest.mark.parametrize("kind, chosen", [("xpu", "xpu"), ("mps", "mps"), ("hpu", "cpu")])
def test_the_accelerator_is_the_default(monkeypatch, kind, chosen):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    there = types.SimpleNamespace(type=kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: there)
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
        time.sleep(1)
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


def test_no_text_file_is_opened_in_the_platforms_encoding():
    """What no test runs is found by eye: every open and read_text names its encoding."""
    import ast

    for path in ROOT.rglob("*.py"):
        if {"runs", ".venv"} & set(path.relative_to(ROOT).parts) or path.parent.name == "pkgs":
            continue
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(getattr(call, "func", None), "attr", "")
            built_in = getattr(getattr(call, "func", None), "id", "") == "open"
            if isinstance(call, ast.Call) and (built_in or name in ("read_text", "write_text")):
                named = {keyword.arg for keyword in call.keywords}
                binary = built_in and "b" in "".join(ast.unparse(x) for x in call.args[1:])
                assert binary or "encoding" in named, f"{path}:{call.lineno}"
