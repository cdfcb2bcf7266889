"""The state of a run: what lives from step to step."""

import dataclasses
import functools
import hashlib
import pathlib
import random
import time
from dataclasses import dataclass

import filelock
import torch

import hapo
from common.devices import synchronize
from engine.engine import Engine, SingleProcess
from run.batch import Batch
from run.guard import Guard
from run.options import Options
from run.reward_function import RewardFunction
from sampling import NonFinite


@dataclass(kw_only=True)
class Run:
    """Everything a step needs. Checkpoints keep what `state` returns."""

    options: Options
    dist: SingleProcess  # the processes of this run
    engine: Engine  # the policy, its optimizer, and how the machine computes a step
    reference: torch.nn.Module | None  # the initial model, where --kl needs it
    reward_function: RewardFunction | None  # --reward-function
    tokenizer: object
    train_examples: list  # (problem, prompt ids)
    held_out: list  # problems
    out: pathlib.Path
    guard: Guard

    mechanisms: str  # HAPO's mechanisms that are on: "ABCD"

    # what changes from step to step
    prompts_consumed: int = 0  # the position in the data
    layer: int | str | None = None  # BuPO's layer; "auto" until it is measured
    sampler_stats: hapo.EntropyStats = None  # of the last batch: the next one is sampled with them
    diagnosed: tuple = None  # the fixed responses of --diagnose-every
    saves: list = dataclasses.field(default_factory=list)  # (start, end) of each checkpoint, s
    last_batch: Batch | None = None  # the last batch that was drawn
    inspected_group: dict = None  # train.inspect_group of the last step
    lock: filelock.BaseFileLock | None = (
        None  # the open file that keeps other runs out of the folder
    )
    fingerprints: dict = dataclasses.field(default_factory=dict)  # of first weights and questions
    tokenizer_files: dict = dataclasses.field(default_factory=dict)  # as checkpoints hold them

    @property
    def policy(self):
        return self.engine.policy

    @property
    def vocab_size(self):
        return self.engine.vocab_size

    def say(self, text):
        """Print a line, in one process."""
        if self.dist.main:
            print(text, flush=True)

    def next_prompts(self):
        """Return the next P (problem, prompt ids): the data in a new random order every epoch."""
        examples, size = [], len(self.train_examples)
        first = self.prompts_consumed
        for i in range(first, first + self.options.prompts_per_step):
            epoch, place = divmod(i, size)
            row = _permutation(size, self.options.seed, epoch)[place]
            examples.append(self.train_examples[row])
        self.prompts_consumed += len(examples)
        return examples[self.dist.rank :: self.dist.size]  # dealt out to the processes in turn

    def uniform(self, step, attempt):
        """Return the random numbers of a rollout, (max_new_tokens, B), by step and attempt.

        They are the same over any number of processes.
        """
        o, generator = self.options, torch.Generator()
        generator.manual_seed(seed_of(o.seed, step, attempt))
        shape = (o.max_new_tokens, o.prompts_per_step, o.num_generations)
        draws = torch.rand(shape, generator=generator)
        return draws[:, self.dist.rank :: self.dist.size].flatten(1)

    def check_finite(self, values, what):
        """Raise NonFinite in every process if one of them holds a NaN or an infinity."""
        if self.dist.all_reduce_sum((~values.isfinite()).sum())[0]:
            raise NonFinite(f"{what} is NaN or infinite")

    def state(self):
        """Return what a checkpoint keeps besides weights and moments, as JSON."""
        scaler = getattr(self.engine, "scaler", None)  # float16's
        return {
            "prompts_consumed": self.prompts_consumed,
            "layer": self.layer,
            "sampler_stats": self.sampler_stats and [float(x) for x in self.sampler_stats],
            "guard": self.guard.state(),
            "diagnosed": self.diagnosed and [x.tolist() for x in self.diagnosed],
            "fingerprints": self.fingerprints,
            "scaler": scaler.state_dict() if scaler else {},
        }

    def restore(self, state):
        """Put back what `state` has returned."""

        def tensors(values):
            return (torch.tensor(x, device=self.dist.device) for x in values)

        stats, diagnosed = state["sampler_stats"], state["diagnosed"]
        self.prompts_consumed = state["prompts_consumed"]
        self.layer = state["layer"] or self.layer
        self.sampler_stats = stats and hapo.EntropyStats(*tensors(stats))
        self.diagnosed = diagnosed and tuple(tensors(diagnosed))
        self.guard.restore(state["guard"])
        self.fingerprints = state["fingerprints"]
        if state["scaler"]:
            self.engine.scaler.load_state_dict(state["scaler"])


class Stopwatch:
    """Measures the seconds of each part of a step, by name."""

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
