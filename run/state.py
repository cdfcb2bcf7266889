"""Define Run, the state that a run keeps from step to step."""

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
from run.alarms import History
from run.batch import Batch
from run.guard import Guard
from run.options import Options
from run.reward_function import RewardFunction
from sampling import NonFinite


@dataclass(kw_only=True)
class Run:
    """The objects and values that a step needs. Checkpoints contain what `state` returns."""

    options: Options
    dist: SingleProcess  # the processes of this run
    engine: Engine  # the policy, its optimizer, and the methods that compute a step
    reference: torch.nn.Module | None  # the initial model, where --kl needs it
    reward_function: RewardFunction | None  # --reward-function
    tokenizer: object
    train_examples: list  # (problem, prompt ids)
    held_out: list  # problems
    out: pathlib.Path
    guard: Guard

    mechanisms: str  # letters of the HAPO mechanisms that are on, for example "ABCD"

    # fields that change from step to step
    prompts_consumed: int = 0  # prompts drawn so far: the position in the data
    layer: int | str | None = None  # BuPO's layer; "auto" until it is measured
    sampler_stats: hapo.EntropyStats = None  # of the last batch, to sample the next one with
    diagnosed: tuple = None  # the fixed responses of --diagnose-every
    saves: list = dataclasses.field(default_factory=list)  # (start, end) of each checkpoint, s
    last_batch: Batch | None = None  # the last batch that was drawn
    inspected_group: dict = None  # train.inspect_group of the last step
    history: History = dataclasses.field(default_factory=History)  # what alarms are found in
    known_alarms: set = dataclasses.field(default_factory=set)  # names of those announced
    lock: filelock.BaseFileLock | None = (
        None  # the open file that keeps other runs out of the folder
    )
    fingerprints: dict = dataclasses.field(default_factory=dict)  # of first weights and questions
    tokenizer_files: dict = dataclasses.field(default_factory=dict)  # {name: content}

    @property
    def policy(self):
        return self.engine.policy

    @property
    def vocab_size(self):
        return self.engine.vocab_size

    def say(self, text):
        """Print a line, in the main process only."""
        if self.dist.main:
            print(text, flush=True)

    def next_prompts(self):
        """Return this process's share of the next P (problem, prompt ids).

        The data have a new random order in every epoch.
        """
        examples, size = [], len(self.train_examples)
        first = self.prompts_consumed
        for i in range(first, first + self.options.prompts_per_step):
            epoch, place = divmod(i, size)
            row = _permutation(size, self.options.seed, epoch)[place]
            examples.append(self.train_examples[row])
        self.prompts_consumed += len(examples)
        return examples[self.dist.rank :: self.dist.size]  # every size-th prompt

    def uniform(self, step, attempt):
        """Return the random numbers of a rollout, (max_new_tokens, B) in [0, 1).

        They depend on the seed, the step and the attempt. A prompt's numbers do not depend on the
        number of processes.
        """
        o, generator = self.options, torch.Generator()
        generator.manual_seed(seed_of(o.seed, step, attempt))
        shape = (o.max_new_tokens, o.prompts_per_step, o.num_generations)
        draws = torch.rand(shape, generator=generator)
        return draws[:, self.dist.rank :: self.dist.size].flatten(1)

    def check_finite(self, values, what):
        """Raise NonFinite in every process if `values` are NaN or infinite in one of them."""
        if self.dist.all_reduce_sum((~values.isfinite()).sum())[0]:
            raise NonFinite(f"{what} is NaN or infinite")

    def state(self):
        """Return a run's state except weights and moments, as values that JSON can hold."""
        scaler = getattr(self.engine, "scaler", None)  # of an Fp16Engine
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
        """Restore a state that `state` has returned."""

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
            synchronize(self.device)  # so that the work launched is included in the time
        now = time.perf_counter()
        self.seconds[name], self._since = now - self._since, now


@functools.lru_cache(maxsize=2)
def _permutation(size, seed, epoch):
    return random.Random(seed_of(seed, "epoch", epoch)).sample(range(size), size)


def seed_of(*parts):
    """Return a random seed that depends only on the arguments: a resume needs no random state."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
