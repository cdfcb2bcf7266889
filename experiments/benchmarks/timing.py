"""Provide the benchmarks' shared functions: models with random weights, and timing.

The sides of a comparison are timed in turn, so that other load on the machine affects all of them.
"""

import gc
import pathlib
import statistics
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen3Config  # noqa: E402


def qwen3(vocab=384, hidden=128, layers=4, **more):
    """Return a small Qwen3 with random weights."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
        **more,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def in_turn(functions, rounds=5, warmup=1):
    """Run all functions {name: function} once per round, in turn. Return {name: [seconds]}."""
    seconds = {name: [] for name in functions}
    for i in range(warmup + rounds):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds, a, b):
    """Return as text the median over rounds of a's time / b's time, with smallest and largest."""
    ratios = sorted(x / y for x, y in zip(seconds[a], seconds[b]))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def peak_on_cpu(function, *holders):
    """Return (the function's result, largest number of bytes allocated while it ran).

    The bytes are those of the models and optimizers in `holders` before the call, plus those that
    PyTorch's profiler sees during the call.
    """
    gc.collect()  # garbage that is freed during the call would be subtracted
    held = {}
    for holder in holders:
        tensors = list(holder.parameters()) if isinstance(holder, torch.nn.Module) else []
        for state in getattr(holder, "state", {}).values():
            tensors += [x for x in state.values() if torch.is_tensor(x)]
        held |= {x.data_ptr(): x.numel() * x.element_size() for x in tensors}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = function()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = sum(held.values())
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return result, most


def median(values):
    return statistics.median(values)


__all__ = [
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "Qwen2Config",
    "Qwen3Config",
    "in_turn",
    "median",
    "peak_on_cpu",
    "qwen3",
    "ratio",
]
