"""Profile a step with PyTorch's profiler: launches, waits and kernels of its three phases.

On a CPU the table has operators instead of launches and kernels.
"""

import collections

import timing  # noqa: F401 - adds the project's root to sys.path
import torch
from torch.autograd.profiler_util import DeviceType
from torch.profiler import ProfilerActivity, profile

import train
from common.devices import synchronize

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "hipLaunchKernel")
WAITS = ("Synchronize", "aten::_local_scalar_dense", "aten::nonzero")  # Python waits for the GPU


def profiled_step(number, run):
    """Take one step and return {phase: events}; phases are "generate", "score" and "update"."""
    seen = collections.defaultdict(list)

    def watched(phase, function):
        def call(*args, **kwargs):
            if phase == "update" and not torch.is_grad_enabled():
                return function(*args, **kwargs)  # part of scoring, which is profiled as a whole
            kinds = [ProfilerActivity.CPU]
            kinds += [ProfilerActivity.CUDA] if run.dist.device.type == "cuda" else []
            with profile(activities=kinds) as watch:
                result = function(*args, **kwargs)
                if run.dist.device.type != "cpu":
                    synchronize(run.dist.device)
            seen[phase] += watch.events()
            return result

        return call

    engine, draw = run.engine, train.generate_and_grade
    train.generate_and_grade = watched("generate", draw)
    phases = {"batch_logprobs": "score"}
    phases |= dict.fromkeys(("token_logprobs", "backward", "optimizer_step"), "update")
    for name, phase in phases.items():
        setattr(engine, name, watched(phase, getattr(engine, name)))
    try:
        train.train_step(number, run)
    finally:
        train.generate_and_grade = draw
        for name in phases:
            delattr(engine, name)
    return seen


def table(seen, most=6):
    """Return the events as text, with the `most` most expensive kernels of each phase."""
    lines = []
    for phase, events in seen.items():
        on_card = [e for e in events if e.device_type != DeviceType.CPU]
        kernels = on_card or [e for e in events if e.name.startswith(("aten::", "mkldnn"))]
        spent = collections.Counter()
        for e in kernels:
            spent[e.name] += e.self_device_time_total if on_card else e.self_cpu_time_total
        count = collections.Counter(e.name for e in kernels)
        total = max(1e-9, sum(spent.values()))
        launches = sum(e.name.startswith(LAUNCHES) for e in events)
        waits = sum(any(w in e.name for w in WAITS) for e in events)
        what = f"{launches} launches" if on_card else f"{len(kernels)} operators"
        lines.append(f"{phase}: {what}, {waits} waits, {total / 1e6:.3f} s in kernels")
        for name, time in spent.most_common(most):
            lines.append(f"  {time / total:4.0%} {count[name]:7d} x {name[:90]}")
    return "\n".join(lines)
