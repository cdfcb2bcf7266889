"""What lives from step to step of a run, and what a step asks of it.

`train.py` is written as if there were one process: whatever concerns several of them, the device or
the cut into passes is behind the methods of Run.
"""

import dataclasses
import functools
import hashlib
import pathlib
import random
import time
from dataclasses import dataclass

import torch

import bupo
import hapo
from program.errors import BadInput, NonFinite
from run.guard import Guard
from run.options import Options
from scale import shard
from scale.master import MasterAdamW, Masters
from scale.shard import World


@dataclass(kw_only=True)
class Run:
    """`drawn`, `layer`, `sampler_stats`, `diagnosed` and the guard are saved with checkpoints."""

    options: Options
    world: World  # the processes of this run; usually one
    policy: torch.nn.Module
    actor: torch.nn.Module  # draws the answers: on a CPU the policy itself, else a replica of it
    reference: torch.nn.Module | None  # the initial model, where an option needs it
    tokenizer: object
    eos_ids: list
    items: list  # (problem, prompt ids) to train on
    held_out: list  # problems
    out: pathlib.Path
    guard: Guard
    optimizer: torch.optim.Optimizer = None
    tokenizer_files: dict = dataclasses.field(default_factory=dict)  # as checkpoints hold them
    drawn: int = 0  # prompts drawn so far: the position in the data
    layer: int = None  # BuPO's layer
    sampler_stats: hapo.EntropyStats = None  # of the last batch: the next one is sampled with them
    diagnosed: tuple = None  # the fixed answers of --diagnose-every
    last_batch: object = None  # the last that was drawn
    shown: dict = None  # train.close_up of the last step
    lock: object = None  # the open file that keeps other runs out of the folder
    origin: dict = dataclasses.field(default_factory=dict)  # sums of first weights and questions
    masters: Masters = None  # float32 weights, where the policy's own are bfloat16
    scaler: torch.amp.GradScaler = None  # float16's: keeps small gradients from vanishing

    def __post_init__(self):
        if self.options.masters_apart:
            self.masters = Masters(self.policy, self.options.offload)
        half = self.options.dtype == "float16"
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=half)

    def say(self, text):
        if self.world.main:
            print(text, flush=True)

    @property
    def vocab_size(self):
        """Ids from here on only pad the model's vocabulary."""
        return len(self.tokenizer)

    def draw_items(self):
        """The next P (problem, prompt): the data in a new random order every epoch."""
        items, size = [], len(self.items)
        for i in range(self.drawn, self.drawn + self.options.prompts_per_step):
            epoch, place = divmod(i, size)
            items.append(self.items[_permutation(size, self.options.seed, epoch)[place]])
        self.drawn += len(items)
        return self.world.mine(items)

    def uniform(self, step, attempt):
        """A round's random numbers, (max_new_tokens, B), the same over any number of processes."""
        o, generator = self.options, torch.Generator()
        generator.manual_seed(seed_of(o.seed, step, attempt))
        shape = (o.max_new_tokens, o.prompts_per_step, o.answers_per_prompt)
        draws = torch.rand(shape, generator=generator)
        return draws[:, self.world.rank :: self.world.size].flatten(1)

    def coins(self, step, attempt):
        """A round's verdicts by chance, (B,) bool, the same over any number of processes."""
        o, generator = self.options, torch.Generator()
        generator.manual_seed(seed_of(o.seed, step, attempt, "coin"))
        coins = torch.rand(o.prompts_per_step, o.answers_per_prompt, generator=generator) < 0.5
        return coins[self.world.rank :: self.world.size].flatten().to(self.world.device)

    def together(self, function, *args, **kwargs):
        """function(...); an error of ours in one process is raised in all, so that none waits."""
        return self.world.together((NonFinite, BadInput), function, *args, **kwargs)

    def passes(self, rollout, rows):
        """The forward passes over some rows, as (rows, weight). Weight 0 marks a pass that only
        keeps other processes company: a sharded model needs all of them."""
        sizes = (self.options.micro_batch, self.options.micro_tokens)
        parts = self.world.even(micro_batches(rollout, rows, *sizes))
        for i, part in enumerate(parts):
            if self.options.offload:  # gradients go down to main memory once, behind the last
                shard.exchange_gradients(self.policy, i + 1 == len(parts))
            yield part

    def autocast(self):
        """Products in --dtype, everything else in float32."""
        dtype = getattr(torch, self.options.dtype)
        return torch.autocast(self.world.device.type, dtype, enabled=dtype != torch.float32)

    def backward(self, loss):
        """Sharded gradients are averaged over processes; times their number, the mean is a sum."""
        self.scaler.scale(loss * self.world.size).backward()

    def clip_gradients(self):
        """Scale the gradient to a norm of at most --grad-clip; returns its norm before."""
        if self.masters:
            return self.masters.clip(self.options.grad_clip).item()
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.options.grad_clip)
        return shard.whole(norm).item()

    def rescale(self):
        """Under float16: lower the loss scale if this update's gradients overflowed, raise it after
        many that did not. Returns the scale."""
        if self.scaler.is_enabled():
            self.scaler.update()
        return self.scaler.get_scale()

    def whole(self, parameter):
        """A parameter's float32 weights as one tensor; every process must call it."""
        if self.masters:
            return self.masters.whole(parameter)
        return shard.whole(parameter.detach())

    def check_finite(self, values, what):
        """NonFinite, in every process, if one of them holds a NaN or an infinity."""
        if self.world.any(not values.isfinite().all()):
            raise NonFinite(f"{what} is NaN or infinite")

    def largest(self, *numbers):
        """The largest of each number over processes."""
        return self.world.max(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def total(self, numbers):
        """A dictionary of numbers, summed over processes."""
        sums = self.world.sum(torch.tensor(list(numbers.values()), dtype=torch.float64))
        return dict(zip(numbers, sums.tolist()))

    def make_optimizer(self):
        """AdamW in float32. BuPO's first phase needs nothing special: a weight without a gradient
        is passed by, decay and moments included."""
        options = self.options
        groups = [{"params": list(self.policy.parameters()), "lr": options.lr}]
        if self.layer is not None and options.bupo_arm == "layer-lr":  # BuPO 7: a comparison arm
            groups = bupo.layerwise_groups(self.policy, self.layer, options.lr)
        for group in groups:
            group["peak_lr"] = group["lr"]
        how = dict(lr=options.lr, weight_decay=options.weight_decay)
        if self.masters:
            return MasterAdamW(groups, self.masters, **how)
        return torch.optim.AdamW(groups, fused=True, **how)

    def state(self):
        """What a checkpoint keeps beside weights and moments, as JSON."""
        return {
            "drawn": self.drawn,
            "layer": self.layer,
            "sampler_stats": self.sampler_stats and [float(x) for x in self.sampler_stats],
            "guard": self.guard.state(),
            "diagnosed": self.diagnosed and [x.tolist() for x in self.diagnosed],
            "origin": self.origin,
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state):
        def tensors(values):
            return (torch.tensor(x, device=self.world.device) for x in values)

        stats, diagnosed = state["sampler_stats"], state["diagnosed"]
        self.drawn, self.layer = state["drawn"], state["layer"]
        self.sampler_stats = stats and hapo.EntropyStats(*tensors(stats))
        self.diagnosed = diagnosed and tuple(tensors(diagnosed))
        self.guard.restore(state["guard"])
        self.origin = state["origin"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])


class Stopwatch:
    """Seconds of each part of a step, by name."""

    def __init__(self):
        self.seconds, self._since = {}, time.perf_counter()

    def lap(self, name):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what was launched has run
        now = time.perf_counter()
        self.seconds[name], self._since = now - self._since, now


def micro_batches(rollout, rows, sequences=0, tokens=0):
    """Rows in lists of at most `sequences` rows, or of at most `tokens` tokens; 0: no limit."""
    if tokens:
        return batches_of_tokens(rollout, rows, tokens)
    rows, size = list(rows), sequences or len(rows)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def batches_of_tokens(rollout, rows, tokens):
    """Rows in lists of at most `tokens` tokens each, padding included, or of one row."""
    lengths, prompt, parts = rollout.lengths.tolist(), rollout.prompt.shape[1], [[]]
    for row in sorted(rows, key=lengths.__getitem__):  # neighbours of like length: little padding
        if parts[-1] and (len(parts[-1]) + 1) * (prompt + lengths[row]) > tokens:
            parts.append([])
        parts[-1].append(row)
    return parts


@functools.lru_cache(maxsize=2)
def _permutation(size, seed, epoch):
    return random.Random(seed_of(seed, "epoch", epoch)).sample(range(size), size)


def seed_of(*parts):
    """A random seed that is a function of its arguments: no state that a resume must restore."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
