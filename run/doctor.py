"""--doctor: check whether a run would work, in a minute, without leaving a file."""

import contextlib
import dataclasses
import pathlib
import platform
import tempfile
import time

import torch
import transformers

from common.devices import synchronize
from common.errors import UserError
from run import first_look, report
from run.alarms import History, may_differ, new_alarms
from run.setup import open_run

PROMPTS = 64  # held-out questions that are sampled


def examine(options, dist, guarded_step):
    """Print what a run finds before its first step, then take that step and measure it.

    Nothing is kept. guarded_step: train.guarded_step. UserError names what is wrong; then the
    program ends with exit code 2.
    """
    device, say = dist.device, print if dist.main else lambda text: None
    where = device.type
    if where == "cuda":
        where = torch.cuda.get_device_name(device)
    say(
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, on {where}, {torch.get_num_threads()} threads"
    )
    if (pathlib.Path(options.out) / "config.json").exists() and not options.overwrite:
        say(f"note: {options.out} already holds a run; start with --overwrite or another --out")
    with tempfile.TemporaryDirectory() as folder:
        options = dataclasses.replace(
            options,
            out=str(pathlib.Path(folder) / "run"),
            eval_prompts=min(options.eval_prompts, PROMPTS),
            overwrite=False,
        )
        run, _ = open_run(options, dist)  # which compares sampler and scorer: --self-check
        with run.lock or contextlib.nullcontext():  # only the main process has a lock
            say(
                "self-check passed: sampler, scorer and gradients agree"
                if options.self_check
                else "the self-check was left out: --no-self-check"
            )
            wrong = first_look.first_look(run)
            synchronize(device)
            started = time.perf_counter()
            metrics, bad = guarded_step(1, run)
            synchronize(device)
            seconds = time.perf_counter() - started
        alarms = [] if bad else new_alarms(History([metrics]), set(), may_differ(options))
    wrong += [f"step 1 failed: {bad}"] if bad else [str(alarm) for alarm in alarms]
    if not bad:
        say(report.console_line(metrics, options))
        say(
            f"one step took {seconds:.2f} s; {options.steps} steps like it take "
            f"{report.duration(seconds * options.steps)}, longer if responses grow"
        )
    if wrong:
        raise UserError("--doctor: " + "; ".join(wrong))
    say("--doctor: nothing is wrong; nothing was kept. Start without --doctor")
    dist.close()
