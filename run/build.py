"""Build the engine that the options ask for."""

import bupo
from engine.engine import Engine
from engine.fast import FastEngine
from engine.float16 import Fp16Engine
from engine.fsdp import FsdpEngine
from engine.master_weights import MasterWeightEngine
from run import baselines


def build_engine(policy, options, dist, vocab_size, eos_ids):
    """Return the Engine of a policy; the options select its precision, memory and processes."""
    groups = [{"params": list(policy.parameters())}]
    if options.bupo_layer and options.bupo_baseline == "layer-lr":
        groups = baselines.groups_by_layer(policy)
    for group in groups:
        group["peak_lr"] = options.lr
    arguments = (policy, options, dist, vocab_size, eos_ids, groups)
    if dist.sharded:
        return FsdpEngine(*arguments)
    if options.keeps_masters:
        return MasterWeightEngine(*arguments)
    if options.dtype == "float16":
        return Fp16Engine(*arguments)
    if options.plain and options.dtype == "float32" and not options.micro_tokens:
        return Engine(*arguments)
    return FastEngine(*arguments)


def layer_of(options):
    """Return BuPO's layer: a number, AUTO, or None in a run without BuPO."""
    if options.bupo_layer in ("", bupo.AUTO):
        return options.bupo_layer or None
    return int(options.bupo_layer)
