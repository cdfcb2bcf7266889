"""What lives from step to step of a run, and the little that a step asks of it.

Everything that differs between runs, but not from step to step, is chosen once: run/choices.py.
"""

import dataclasses
import functools
import hashlib
import pathlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import hapo
from program.devices import synchronize
from program.errors import NonFinite
from run.guard import Guard
from run.machine import OneProcess, Weights
from run.options import Options


@dataclass(kw_only=True)
class Run:
    """`drawn`, `layer`, `sampler_stats`, `diagnosed` and the guard are saved with checkpoints."""

    options: Options
    ranks: OneProcess  # the processes of this run
    policy: torch.nn.Module
    reference: torch.nn.Module | None  # the initial model, where --kl needs it
    tokenizer: object
    vocab_size: int  # ids from here on only pad the model's vocabulary
    eos_ids: list
    items: list  # (problem, prompt ids) to train on
    held_out: list  # problems
    out: pathlib.Path
    guard: Guard

    # what changes from step to step
    drawn: int = 0  # prompts drawn so far: the position in the data
    layer: int | str = None  # BuPO's layer; "auto" until it is measured
    sampler_stats: hapo.EntropyStats = None  # of the last batch: the next one is sampled with them
    diagnosed: tuple = None  # the fixed answers of --diagnose-every
    saves: list = dataclasses.field(default_factory=list)  # when each checkpoint began and ended
    last_batch: object = None  # the last that was drawn
    shown: dict = None  # train.inspect_group of the last step
    lock: object = None  # the open file that keeps other runs out of the folder
    origin: dict = dataclasses.field(default_factory=dict)  # sums of first weights and questions
    tokenizer_files: dict = dataclasses.field(default_factory=dict)  # as checkpoints hold them

    # what run/choices.py has chosen
    mechanisms: str = ""  # those of HAPO that are on: "ABCD"
    weights: Weights = None
    actor: Callable = None  # () -> the model that answers are drawn from
    generate: Callable = None  # as sampling.generate
    layout: Callable = None  # as internals.one_line_each
    scorer: Callable = None  # as losses.plain_logprobs_and_entropy
    passes: Callable = None  # as machine.split_rows
    autocast: Callable = None  # () -> context: products in --dtype, everything else in float32
    schedule: Callable = None  # step -> the layer whose policy learns, or None
    temperature: Callable = None  # (entropies, statistics) -> temperatures
    verdict: Callable = None  # (grades, step, attempt) -> (B,) bool: the verdict used as reward
    clock: Callable = None  # () -> a Stopwatch
    own_reward: Callable = None  # (problem, text) -> float: --reward-function
    pay: Callable = None  # (verdicts, problems, texts) -> (B,) rewards, 1 or 0 by default
    rounds: Callable = None  # (collect, step, layer, run) -> the step's batch: one, or several
    mean_loss: Callable = None  # (per token, mask, tokens, answers) -> loss; as losses.masked_mean
    arms: list = ()  # run/arms.py: what changes a scored batch
    rival: Callable = None  # and what takes the place of train.policy_loss
    movers: list = ()  # and what says which weights may move

    def say(self, text):
        if self.ranks.main:
            print(text, flush=True)

    def draw_items(self):
        """The next P (problem, prompt): the data in a new random order every epoch."""
        items, size = [], len(self.items)
        for i in range(self.drawn, self.drawn + self.options.prompts_per_step):
            epoch, place = divmod(i, size)
            items.append(self.items[_permutation(size, self.options.seed, epoch)[place]])
        self.drawn += len(items)
        return self.ranks.mine(items)

    def uniform(self, step, attempt):
        """A round's random numbers, (max_new_tokens, B), the same over any number of processes."""
        o, generator = self.options, torch.Generator()
        generator.manual_seed(seed_of(o.seed, step, attempt))
        shape = (o.max_new_tokens, o.prompts_per_step, o.answers_per_prompt)
        draws = torch.rand(shape, generator=generator)
        return draws[:, self.ranks.rank :: self.ranks.size].flatten(1)

    def check_finite(self, values, what):
        """NonFinite, in every process, if one of them holds a NaN or an infinity."""
        if self.ranks.total((~values.isfinite()).sum())[0]:
            raise NonFinite(f"{what} is NaN or infinite")

    def state(self):
        """What a checkpoint keeps beside weights and moments, as JSON."""
        return {
            "drawn": self.drawn,
            "layer": self.layer,
            "sampler_stats": self.sampler_stats and [float(x) for x in self.sampler_stats],
            "guard": self.guard.state(),
            "diagnosed": self.diagnosed and [x.tolist() for x in self.diagnosed],
            "origin": self.origin,
            "scaler": self.weights.state(),
        }

    def restore(self, state):
        def tensors(values):
            return (torch.tensor(x, device=self.ranks.device) for x in values)

        stats, diagnosed = state["sampler_stats"], state["diagnosed"]
        self.drawn = state["drawn"]
        self.layer = state["layer"] or self.layer
        self.sampler_stats = stats and hapo.EntropyStats(*tensors(stats))
        self.diagnosed = diagnosed and tuple(tensors(diagnosed))
        self.guard.restore(state["guard"])
        self.origin = state["origin"]
        self.weights.restore(state["scaler"])


class Stopwatch:
    """Seconds of each part of a step, by name."""

    def __init__(self, device):
        self.device, self.seconds, self._since = device, {}, time.perf_counter()

    def lap(self, name):
        if self.device.type != "cpu":
            synchronize(self.device)  # what was launched has run
        now = time.perf_counter()
        self.seconds[name], self._since = now - self._since, now


@functools.lru_cache(maxsize=2)
def _permutation(size, seed, epoch):
    return random.Random(seed_of(seed, "epoch", epoch)).sample(range(size), size)


def seed_of(*parts):
    """A random seed that is a function of its arguments: no state that a resume must restore."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
