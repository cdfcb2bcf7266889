"""Where a step's time goes: launches, waits and kernels of its three phases, by PyTorch's profiler.

On a CPU the same table holds operators instead of launches and kernels.
"""

import collections

import timing  # noqa: F401 - the project's root is on the path now
import torch
from torch.autograd.profiler_util import DeviceType
from torch.profiler import ProfilerActivity, profile

import train
from common.devices import synchronize

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "hipLaunchKernel")
WAITS = ("Synchronize", "aten::_local_scalar_dense", "aten::nonzero")  # where Python waits


def profiled_step(number, run):
    """{phase: events} of one step, drawing, scoring and updating."""
    seen = collections.defaultdict(list)

    def watched(phase, function):
        def call(*args, **kwargs):
            if phase == "update" and not torch.is_grad_enabled():
                return function(*args, **kwargs)  # part of scoring, which is watched as a whole
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
    """The events as lines for people: of each phase its most expensive kernels."""
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
