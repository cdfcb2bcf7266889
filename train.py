"""Reinforcement learning of a causal language model with GRPO, DAPO or HAPO, bottom-up (BuPO) if asked to.

    python train.py                                             a 1-million-parameter Qwen3 learns Countdown on a laptop
    python train.py --model Qwen/Qwen3-0.6B --data train.jsonl  the same loop on a real model and a file of questions

One step, in the order of `train_step`: draw prompts, sample G answers to each, grade them, turn grades into advantages, score the
answers under the old policy, update the policy a few times, log. HAPO differs from its baseline DAPO in three visible `if`s
(sampling temperature, advantages, and redistribution with clipping), BuPO in one: whose log-probabilities are trained.

A run is a function of its options and its seed: every random draw is seeded by (seed, step), nothing else is random.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import random
import shutil
import sys
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import bupo
import hapo
import internals
import losses
from evaluate import default_cap, sample_answers, summarise
from sampling import NonFiniteLogits, Rollout, eos_ids_of, generate
from scale import checkpoint, memory, shard
from scale.guard import Guard, StopRequest
from scale.load import load_config, load_model, load_tokenizer
from tasks import BUILT_IN, BadInput, grade, load_problems, read_problems, render_prompt


def opt(default, help, **more):
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Options:
    """Every setting of a run, saved with it as config.json. Symbols are the papers'."""

    # what is trained, and on what
    model: str = opt("assets/tiny-qwen3", "Hugging Face folder or hub name")
    task: str = opt("countdown", "built-in task", choices=sorted(BUILT_IN))
    difficulty: int = opt(0, "level of the built-in task; 0: its first")
    data: str = opt("", "JSONL or parquet file of questions instead of a built-in task")
    eval_data: str = opt("", "file of held-out questions; without it some rows of --data are kept apart")
    reward: str = opt("lenient", "which verdict is the reward", choices=["strict", "lenient"])
    out: str = opt("", "output folder; default runs/ALGO-TASK")
    resume: bool = opt(False, "continue the run in --out exactly where its newest whole checkpoint stands")
    overwrite: bool = opt(False, "delete the run that --out already holds")
    seed: int = opt(0, "every random draw follows from it")
    steps: int = opt(100, "rollout batches")
    device: str = opt("", "cpu or cuda; default cuda where there is one")

    # the batch
    prompts_per_step: int = opt(16, "P, prompts a step")
    answers_per_prompt: int = opt(16, "G, answers a prompt")
    updates_per_rollout: int = opt(4, "optimiser steps on one batch of answers")
    micro_batch: int = opt(0, "sequences in one forward and backward pass; 0: all of an update's (never changes the result)")
    micro_tokens: int = opt(0, "instead of --micro-batch: tokens in one pass, padding included")
    max_new_tokens: int = opt(0, "length cap of an answer; 0: 16 countdown, 32 arithmetic, 512 files")
    temperature: float = opt(1.0, "T_base")
    dynamic_sampling: bool = opt(False, "replace groups whose rewards are all equal by new ones (DAPO)")
    max_rounds: int = opt(3, "rounds of dynamic sampling; then train on what there is")
    overlong_buffer: int = opt(0, "DAPO's soft punishment over the last so many tokens before the cap; 0: off")

    # the objective
    algo: str = opt("hapo", "grpo: clip 0.2/0.2, sequence mean; dapo: clip-higher 0.2/0.28, token mean; hapo: dapo and the four parts", choices=["grpo", "dapo", "hapo"])
    adaptive_temperature: bool = opt(True, "HAPO A: temperature by token entropy (Eq. 8)")
    token_group_average: bool = opt(True, "HAPO B: token-level group average (Eq. 9)")
    advantage_redistribution: bool = opt(True, "HAPO C: differential advantage redistribution (Eq. 10-11)")
    adaptive_clip: bool = opt(True, "HAPO D: asymmetric adaptive clipping (Eq. 12-13)")
    released: bool = opt(False, "behave as HAPO's released code where it departs from the paper")
    rho: float = opt(0.8, "rho, quantile of the entropy pivot")
    tau: float = opt(0.0, "tau, strength of the adaptive temperature; 0: 0.05 bounded, 0.1 zscore")
    temperature_form: str = opt("bounded", "form of Eq. 8", choices=["bounded", "zscore"])
    clip_low: float = opt(0.2, "eps_low")
    clip_high: float = opt(0.0, "eps_high; 0: 0.2 grpo, 0.28 dapo and hapo")
    dual_clip: float = opt(0.0, "c > 1: a token with A < 0 costs at most -c A; 0: off (HAPO's runs: 10)")
    loss_mean: str = opt("", "default: sequence for grpo, token otherwise", choices=["token", "sequence", "fixed"])
    kl: float = opt(0.0, "coefficient of the k3 KL to the initial model (phase 2); 0: no reference model is held")
    comparison: str = opt("none", "another use of entropy, for comparison", choices=["none", "forking", "archer", "entropy-advantage", "edge"])

    # BuPO
    bupo_layer: str = opt("", "align this layer's policy first: 1 ... L, or auto for the boundary layer")
    bupo_steps: int = opt(30, "s_inter, steps of the first phase")
    bupo_norm: bool = opt(False, "final norm on the internal policy too")
    bupo_arm: str = opt("align", "align: BuPO; comparison arms: freeze layers 1 ... l in the first phase, or layer-lr: upper layers learn at 0.1 x lr", choices=["align", "freeze", "layer-lr"])
    diagnose_every: int = opt(0, "log similarity, KL and entropy change of the layers every so many steps; 0: never")

    # the optimiser
    lr: float = opt(2e-4, "AdamW; 1e-6 is the papers' for 1.5B to 14B")
    weight_decay: float = opt(0.1, "AdamW")
    warmup_steps: int = opt(10, "linear warm-up")
    grad_clip: float = opt(1.0, "largest gradient norm")
    gradient_checkpointing: bool = opt(False, "recompute layers in the backward pass: less memory, a third more time")
    offload: bool = opt(False, "with torchrun: weights, gradients and moments in main memory")
    estimate: bool = opt(False, "print what the run would need in memory and stop; loads no weights")

    # looking at it
    eval_prompts: int = opt(512, "held-out answers an evaluation")
    eval_every: int = opt(25, "steps; step 0 and the last are always evaluated")
    save_every: int = opt(1, "steps between checkpoints: what a killed run may lose (raise it for large models)")
    keep: int = opt(2, "checkpoints that are kept")
    max_bad_steps: int = opt(5, "stop after so many steps in a row with NaN or infinity")

    @property
    def answers_per_step(self):
        return self.prompts_per_step * self.answers_per_prompt

    @property
    def answers_per_update(self):
        return self.answers_per_step // self.updates_per_rollout


# ------------------------------------------------------------------------------------------------------- one step


@dataclass
class Batch:
    """The answers of one step on their way from sampling to the update. (B, T) unless said otherwise."""

    problems: list  # P
    texts: list  # B decoded answers
    rollout: Rollout
    rewards: torch.Tensor  # (B,)
    mask: torch.Tensor  # tokens that enter the loss
    counts: dict  # what the console and metrics say about the rewards
    entropy: torch.Tensor = None  # of the old full policy
    old_logp: torch.Tensor = None  # of the policy that is trained, before the first update
    ref_logp: torch.Tensor = None
    advantages: torch.Tensor = None
    h: torch.Tensor = None  # HAPO's modulation


def train_step(step, run):
    """One rollout batch from prompts to updated weights; returns the batch and the step's metrics."""
    o, world, policy = run.options, run.world, run.policy
    torch.manual_seed(seed_of(o.seed, step))
    clock = [time.perf_counter()]

    # Sample answers from the current policy and grade them.
    shard.refresh_actor(run.actor, policy)
    batch = collect(step, run)
    clock.append(time.perf_counter())

    # BuPO: in phase 1 the policy that is trained is layer l's, and nothing above layer l runs.
    if o.bupo_layer and run.layer is None:
        run.layer = choose_layer(run, batch)
        run.optimizer = run.make_optimizer()  # nothing has been updated yet; the comparison arms need the layer
    layer = bupo.target_layer(step, o.bupo_steps, run.layer) if o.bupo_arm == "align" else None

    # Score the answers under the old policy. The full policy's entropy drives HAPO; in phase 1 the sampler measured it.
    batch.old_logp, entropy = score(policy, batch, layer, run)
    batch.entropy = entropy if layer is None else batch.rollout.entropy
    if run.reference is not None and layer is None:
        batch.ref_logp, _ = score(run.reference, batch, None, run)

    # Advantages: one number a response, or HAPO's one a token.
    batch.advantages = losses.grpo_advantages(batch.rewards, o.answers_per_prompt)[:, None] * batch.mask
    if o.algo == "hapo":
        run.stats = hapo.entropy_stats(world.gather(batch.entropy[batch.mask])[None], torch.ones(1), o.rho)
        batch.h = hapo.modulation(batch.entropy, run.stats, batch.mask, o.released)
        if o.token_group_average:
            batch.advantages = hapo.token_group_advantages(batch.rewards, batch.mask, o.answers_per_prompt, o.released)
    if o.comparison != "none":
        compare(batch, o)
    clock.append(time.perf_counter())

    # Update the policy on equal parts of the batch; every part is made of whole groups.
    set_learning_rate(run, step)
    before = weight_sample(policy)
    rows = torch.arange(len(batch.rewards)).view(o.updates_per_rollout, -1)
    updates = [update(run, batch, part.tolist(), layer, first=i == 0) for i, part in enumerate(rows)]
    clock.append(time.perf_counter())
    return batch, step_metrics(step, run, batch, layer, entropy, updates, before, clock)


def collect(step, run):
    """The step's answers; with dynamic sampling, groups whose rewards are all equal make room for new ones (DAPO)."""
    o, world = run.options, run.world
    batch = sample_round(step, 0, run)
    if o.dynamic_sampling:
        for attempt in range(1, o.max_rounds):
            if not world.any(not live_groups(batch, o).all()):
                break
            batch = keep_live(batch, sample_round(step, attempt, run), o)
        live = live_groups(batch, o).repeat_interleave(o.answers_per_prompt)
        batch.mask = batch.mask & live[:, None]  # groups that are still dead keep their place and stay out of the loss
        batch.counts["not_filled"] = int((~live).sum()) // o.answers_per_prompt
    return batch


def sample_round(step, attempt, run):
    """Draw P prompts, sample G answers to each, grade them."""
    o, world, G = run.options, run.world, run.options.answers_per_prompt
    items = world.mine(draw_items(run))
    # the same random numbers whatever the number of processes: each takes the columns of its own answers
    uniform = torch.rand(o.max_new_tokens, o.prompts_per_step, G, generator=torch.Generator().manual_seed(seed_of(o.seed, step, attempt)))
    uniform = uniform[:, world.rank :: world.size].flatten(1)
    rollout = generate(run.actor, [ids for _, ids in items], G, o.max_new_tokens, run.eos_ids, temperature_rule(step, run), len(run.tokenizer), uniform=uniform)

    texts = run.tokenizer.batch_decode(rollout.answers(), skip_special_tokens=True)
    grades = [grade(items[i // G][0], text) for i, text in enumerate(texts)]
    rewards = torch.tensor([float(getattr(g, o.reward)) for g in grades], device=world.device)
    groups = rewards.view(-1, G)
    counts = {
        "answers": len(rewards), "groups": len(groups), "right": int(rewards.sum()), "all_right": int((groups.amin(1) == 1).sum()), "all_wrong": int((groups.amax(1) == 0).sum()),
        "strict": sum(g.strict for g in grades), "lenient": sum(g.lenient for g in grades),
        "finished": int(rollout.finished.sum()), "finished_right": int(rewards[rollout.finished].sum()), "finished_tokens": int(rollout.lengths[rollout.finished].sum()), "tokens": int(rollout.mask.sum()),
    }
    if o.overlong_buffer:
        rewards = rewards + losses.overlong_penalty(rollout.lengths, o.max_new_tokens, o.overlong_buffer)
    return Batch([problem for problem, _ in items], texts, rollout, rewards, rollout.mask, counts)


def live_groups(batch, o):
    groups = batch.rewards.view(-1, o.answers_per_prompt)
    return groups.amax(1) > groups.amin(1)


def keep_live(batch, more, o):
    """As many groups as `batch` has, taken from both batches, live ones first."""
    counts = {key: batch.counts[key] + more.counts[key] for key in batch.counts}
    G, wanted = o.answers_per_prompt, len(batch.problems)
    both = Batch(batch.problems + more.problems, batch.texts + more.texts, Rollout.join([batch.rollout, more.rollout]), torch.cat([batch.rewards, more.rewards]), None, counts)
    chosen = live_groups(both, o).int().argsort(descending=True, stable=True)[:wanted].tolist()
    rollout = both.rollout.select(chosen)
    texts = [both.texts[p * G + g] for p in chosen for g in range(G)]
    return Batch([both.problems[p] for p in chosen], texts, rollout, both.rewards.view(-1, G)[chosen].flatten(), rollout.mask, counts)


def temperature_rule(step, run):
    """What the sampler divides logits by: HAPO's adaptive temperature (A), or the base temperature."""
    o = run.options
    if o.algo == "hapo" and o.adaptive_temperature:
        return lambda entropy: hapo.adaptive_temperature(entropy, run.stats, o.temperature, o.tau, o.temperature_form, o.released)
    if o.bupo_layer and o.bupo_arm == "align" and step <= o.bupo_steps:
        return lambda entropy: torch.full_like(entropy, o.temperature)  # a function, so that the sampler measures entropy
    return o.temperature


def token_scores(model, rollout, rows, layer, run):
    """Log-probability and entropy of the answers `rows` at T_base, (rows, T), 0 at padding: one function for old, new and reference.

    layer None: the model's own policy; l: the internal policy of layer l, computing layers 1 ... l alone.
    """
    o, mask = run.options, rollout.mask[rows]
    ids, attention, width = rollout.sequences(rows)
    with torch.autocast(run.world.device.type, torch.bfloat16, enabled=run.world.device.type == "cuda"):
        hidden = internals.policy_hidden(model, ids, attention, layer, norm=layer is None or o.bupo_norm)
        # the state that predicts a token stands one position to its left; prompt states are never projected
        states = hidden[:, -width - 1 : -1][mask[:, :width]]
        weight = internals.unembedding(model)[: len(run.tokenizer)]  # a padded vocabulary's ids have probability 0
        logp, entropy = losses.token_logprobs_and_entropy(states, weight, rollout.tokens[rows][mask], o.temperature)
    blank = torch.zeros(mask.shape, device=mask.device)
    return blank.masked_scatter(mask, logp), blank.masked_scatter(mask, entropy.detach())


@torch.no_grad()
def score(model, batch, layer, run):
    """token_scores of the whole batch, without gradient."""
    logp, entropy = torch.zeros(2, *batch.rollout.mask.shape, device=run.world.device)
    for rows, _ in micro_batches(batch, range(len(batch.rewards)), run):
        logp[rows], entropy[rows] = token_scores(model, batch.rollout, rows, layer, run)
    return logp, entropy


def micro_batches(batch, rows, run):
    """Cut rows into lists that fit --micro-batch sequences or --micro-tokens tokens (padding included), as (rows, counts).

    Every process gets equally many, because a sharded model's forward pass needs all of them: the last lists of a
    process that has fewer are repetitions with counts = False, whose loss is multiplied by 0.
    """
    o, rows = run.options, list(rows)
    if o.micro_tokens:
        lengths = batch.rollout.lengths.tolist()
        rows.sort(key=lengths.__getitem__)  # neighbours of like length: little padding
        prompt, parts = batch.rollout.prompt.shape[1], [[]]
        for row in rows:
            if parts[-1] and (len(parts[-1]) + 1) * (prompt + lengths[row]) > o.micro_tokens:
                parts.append([])
            parts[-1].append(row)
    else:
        size = o.micro_batch or len(rows)
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    most = int(run.world.max(len(parts)))
    return [(part, True) for part in parts] + [(parts[-1], False)] * (most - len(parts))


def policy_loss(logp, batch, rows, o):
    """The surrogate of some rows, one value a token, and what the console reports about it."""
    ratio = torch.exp(logp - batch.old_logp[rows])
    advantages, low, high = batch.advantages[rows], o.clip_low, o.clip_high
    if o.algo == "hapo":
        h = batch.h[rows]
        if o.adaptive_clip:
            low, high = hapo.adaptive_clip(h, o.clip_low, o.clip_high)
        if o.advantage_redistribution:
            zone = (low, high) if o.released else (o.clip_low, o.clip_high)
            advantages = hapo.redistribute_advantages(advantages, h, ratio, *zone, o.released)
    if o.comparison == "archer":
        low = high = losses.archer_bounds(batch.entropy, batch.mask)[rows]
    loss = losses.clipped_surrogate(ratio, advantages, low, high, o.dual_clip or None)
    with torch.no_grad():
        valid, below, above = batch.mask[rows], ratio < 1 - low, ratio > 1 + high
        report = {
            "clip_low": (valid & below & (advantages < 0)).sum(), "clip_high": (valid & above & (advantages > 0)).sum(),
            "outside": (valid & (below | above)).sum(), "kl_old": losses.kl_k3(logp, batch.old_logp[rows])[valid].sum(),
            "ratio_max": ratio[valid].max() if valid.any() else ratio.new_tensor(0.0),
        }
    return loss, report


def update(run, batch, rows, layer):
    """One optimiser step on some rows; sums over the whole update, never a last micro-batch's share."""
    o, world, policy = run.options, run.world, run.policy
    mask = batch.mask[rows]
    # the whole update's normalisers, over all processes, fixed before it is cut into micro-batches
    tokens, responses = int(world.sum(mask.sum())), int(world.sum(len(rows)))
    total = {"loss": 0.0, "tokens": tokens, "grad_norm": 0.0, "applied": 0}
    if not world.any(batch.advantages[rows][mask].count_nonzero()) and batch.ref_logp is None:
        return total | {"dead": 1}  # every group all right or all wrong: no gradient, and no weight decay in its name
    for part, counts in micro_batches(batch, rows, run):
        logp, _ = token_scores(policy, batch.rollout, part, layer, run)
        per_token, report = policy_loss(logp, batch, part, o)
        if batch.ref_logp is not None:
            per_token = per_token + o.kl * losses.kl_k3(logp, batch.ref_logp[part])
        loss = mean_loss(per_token, batch.mask[part], tokens, responses, o) * counts
        (loss * world.size).backward()  # sharded gradients are averaged over processes: this makes it a sum
        total["loss"] += loss.item()
        for key, value in report.items():
            total[key] = max(total.get(key, 0.0), value.item()) if key == "ratio_max" else total.get(key, 0.0) + value.item() * counts
    total = {k: (world.max if k == "ratio_max" else world.sum)(torch.tensor(v, dtype=torch.float64)).item() if k not in ("tokens", "applied") else v for k, v in total.items()}
    moving = [p for p in policy.parameters() if p.grad is not None]
    total["grad_norm"] = shard.whole(torch.nn.utils.clip_grad_norm_(moving, o.grad_clip)).item()
    if run.guard.accepts(total["loss"], total["grad_norm"]):
        run.optimizer.step()
        total["applied"] = 1
    run.optimizer.zero_grad(set_to_none=True)
    return total


def mean_loss(per_token, mask, tokens, responses, o):
    if o.loss_mean == "token":
        return losses.masked_mean(per_token, mask, tokens)
    if o.loss_mean == "sequence":
        return losses.sequence_mean(per_token, mask, responses)
    return losses.fixed_length_mean(per_token, mask, o.max_new_tokens, responses)


def compare(batch, o):
    """The other uses of entropy that the HAPO paper compares with, on top of --algo's objective."""
    if o.comparison == "forking":
        batch.mask = losses.forking_token_mask(batch.entropy, batch.mask)
    elif o.comparison == "entropy-advantage":
        batch.advantages = losses.entropy_advantage(batch.advantages, batch.entropy)
    elif o.comparison == "edge":
        mean_entropy = (batch.entropy * batch.mask).sum(1) / batch.mask.sum(1).clamp_min(1)
        advantages = losses.grpo_advantages(batch.rewards, o.answers_per_prompt)
        batch.advantages = losses.edge_advantages(advantages, mean_entropy, o.answers_per_prompt)[:, None] * batch.mask


def response_masks(batch, most):
    """At most `most` answers spread over the batch: ids, attention mask and response mask, each (rows, s + t)."""
    rows = list(range(0, len(batch.rewards), max(1, len(batch.rewards) // most)))
    ids, attention, width = batch.rollout.sequences(rows)
    response = torch.zeros_like(attention)
    response[:, -width:] = batch.rollout.mask[rows, :width]
    return ids, attention, response


def choose_layer(run, batch):
    """--bupo-layer: the number given, or the boundary layer, measured on the first answers (64 of them at most)."""
    o, world = run.options, run.world
    if o.bupo_layer != "auto":
        return int(o.bupo_layer)
    change = internals.internal_entropy(run.policy, *response_masks(batch, 64), len(run.tokenizer)).feed_forward_change
    change = world.sum(change) / world.size
    layer = internals.boundary_layer(change)
    if layer is None:
        layer = int(change.argmax()) + 1
        run.say(f"warning: --bupo-layer auto: no layer's feed-forward block raises entropy; falling back to layer {layer}, whose change is the largest ({change[layer - 1]:+.3f} nats)")
    else:
        run.say(f"boundary layer: {layer} of {len(change)}, the last whose feed-forward block raises entropy ({change[layer - 1]:+.3f} nats); its policy is trained for {o.bupo_steps} steps")
    return layer


# ------------------------------------------------------------------------------------------------- around the step


@dataclass
class Run:
    """What lives from step to step. `drawn`, `layer`, `stats` and the guard's numbers are saved with every checkpoint."""

    options: Options
    world: shard.World
    policy: torch.nn.Module
    actor: torch.nn.Module  # draws the answers: the policy itself on a CPU, else its replica in the compute dtype
    reference: torch.nn.Module  # the initial model, only with --kl
    tokenizer: object
    eos_ids: list
    items: list  # (problem, prompt ids) to train on
    held_out: list  # problems
    out: pathlib.Path
    guard: Guard
    optimizer: torch.optim.Optimizer = None
    tokenizer_files: dict = dataclasses.field(default_factory=dict)  # as every checkpoint holds them
    drawn: int = 0  # prompts drawn so far: the position in the data
    layer: int = None  # BuPO's layer
    stats: hapo.EntropyStats = None  # of the last batch, for the sampler of the next
    diagnosed: tuple = None  # the fixed answers of --diagnose-every
    last_batch: Batch = None

    def say(self, text):
        if self.world.main:
            print(text, flush=True)

    def make_optimizer(self):
        """AdamW in float32. BuPO needs nothing special: a weight without a gradient is passed by, decay and moments included."""
        o = self.options
        if self.layer is not None and o.bupo_arm == "layer-lr":
            groups = bupo.layerwise_groups(self.policy, self.layer, o.lr)
        else:
            groups = [{"params": list(self.policy.parameters()), "lr": o.lr}]
        for group in groups:
            group["peak_lr"] = group["lr"]
        return torch.optim.AdamW(groups, lr=o.lr, weight_decay=o.weight_decay)

    def state(self):
        return {"drawn": self.drawn, "layer": self.layer, "stats": self.stats and [float(x) for x in self.stats], "guard": self.guard.state()}

    def restore(self, state):
        self.drawn, self.layer = state["drawn"], state["layer"]
        self.stats = state["stats"] and hapo.EntropyStats(*(torch.tensor(x, device=self.world.device) for x in state["stats"]))
        self.guard.restore(state["guard"])


def seed_of(*parts):
    """A random seed that is a function of its arguments, the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def draw_items(run):
    """The next P prompts: a new permutation of the data every epoch, a function of the seed and of how many were drawn."""
    items = []
    for i in range(run.drawn, run.drawn + run.options.prompts_per_step):
        epoch, place = divmod(i, len(run.items))
        items.append(run.items[_permutation(len(run.items), run.options.seed, epoch)[place]])
    run.drawn += len(items)
    return items


@functools.lru_cache(maxsize=2)
def _permutation(size, seed, epoch):
    return random.Random(seed_of(seed, "epoch", epoch)).sample(range(size), size)


def set_learning_rate(run, step):
    """Linear warm-up over the first steps; and what the arm "freeze" may move in its first phase."""
    o = run.options
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * min(1.0, step / max(1, o.warmup_steps))
    if run.layer is not None and o.bupo_arm == "freeze":
        for p in bupo.lower_layers(run.policy, run.layer):
            p.requires_grad_(step > o.bupo_steps)


@torch.no_grad()
def weight_sample(policy):
    """About a thousand entries of every weight, to see what share of the weights a step really changes."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in policy.parameters()]
    return torch.cat([p.flatten()[:: max(1, p.numel() // 1000)].cpu() for p in local])


def step_metrics(step, run, batch, layer, trained_entropy, updates, before, clock):
    """The line of metrics.jsonl. Token shares are over every token of every update, sums over all processes."""
    o, world = run.options, run.world
    counts = {k: world.sum(v).item() for k, v in batch.counts.items()}
    tokens = max(1, sum(u["tokens"] for u in updates if "outside" in u))
    total = lambda key: sum(u.get(key, 0.0) for u in updates)
    over = lambda values: (world.sum((values * batch.rollout.mask).sum()) / world.sum(batch.rollout.mask.sum())).item()
    applied = [u for u in updates if u["applied"]]
    seconds = [b - a for a, b in zip(clock, clock[1:])]
    changed = (weight_sample(run.policy) != before).double()
    metrics = {
        "step": step, "phase": "full" if layer is None else "internal",
        "loss": total("loss") / len(updates), "reward": counts["right"] / counts["answers"], "entropy": over(batch.entropy),
        "grad_norm": sum(u["grad_norm"] for u in updates) / len(updates),
        "response_length": counts["tokens"] / counts["answers"], "clipped_ratio": 1 - counts["finished"] / counts["answers"],
        "clip_low": total("clip_low") / tokens, "clip_high": total("clip_high") / tokens, "ratio_max": max(u.get("ratio_max", 0.0) for u in updates), "kl_old": total("kl_old") / tokens,
        "outside_before_update": updates[0].get("outside", 0.0) / max(1, updates[0]["tokens"]),
        "dead_groups": counts["all_right"] + counts["all_wrong"], "all_right": counts["all_right"], "all_wrong": counts["all_wrong"], "groups": counts["groups"],
        "strict": counts["strict"] / counts["answers"], "lenient": counts["lenient"] / counts["answers"],
        "finished_length": counts["finished_tokens"] / max(1, counts["finished"]), "finished_accuracy": counts["finished_right"] / max(1, counts["finished"]),
        "temperature": over(batch.rollout.temperature), "lr": run.optimizer.param_groups[0]["lr"],
        "updates": len(applied), "skipped_updates": sum(1 for u in updates if not u["applied"] and "dead" not in u), "dead_updates": sum(1 for u in updates if "dead" in u),
        "weights_changed": (world.sum(changed.sum()) / world.sum(len(changed))).item(),
        "tokens_per_second": counts["tokens"] / seconds[0], "seconds_generate": seconds[0], "seconds_score": seconds[1], "seconds_update": seconds[2],
    }
    if layer is None:
        metrics["logp"] = over(batch.old_logp)
    else:  # phase 1: both policies, each under its own name
        metrics |= {"layer": layer, "logp": over(batch.rollout.logp), "internal_entropy": over(trained_entropy), "internal_logp": over(batch.old_logp)}
    if "not_filled" in counts:
        metrics["not_filled"] = counts["not_filled"]
    return metrics


def console_line(m, o):
    part = f"step {m['step']:>{len(str(o.steps))}}/{o.steps}" + (f" layer {m['layer']}" if m["phase"] == "internal" else "")
    held = f"  held-out {m['eval_accuracy']:.3f} (greedy {m['eval_greedy']:.3f})" if "eval_accuracy" in m else ""
    return (f"{part}  reward {m['reward']:.3f}  loss {m['loss']:+.4f}  grad {m['grad_norm']:.2f}  entropy {m['entropy']:.3f}  length {m['response_length']:.1f}  "
            f"dead {m['dead_groups']}/{m['groups']} ({m['all_right']} right, {m['all_wrong']} wrong)  "
            f"{m['seconds_generate'] + m['seconds_score'] + m['seconds_update']:.2f} s = {m['seconds_generate']:.2f} generate + {m['seconds_score']:.2f} score + {m['seconds_update']:.2f} update, {m['tokens_per_second']:.0f} tok/s{held}")


def held_out_metrics(run, step):
    """Accuracy on held-out questions: sampled at T = 1 and greedy; the questions are repeated if they are fewer than asked for."""
    o, world = run.options, run.world
    shard.refresh_actor(run.actor, run.policy)
    asked = [run.held_out[i % len(run.held_out)] for i in range(o.eval_prompts)]
    sampled = evaluate_over(world, run, asked, 1.0, seed_of(o.seed, "held out"), f"evaluating step {step}, sampled")
    greedy = evaluate_over(world, run, run.held_out[: o.eval_prompts], 0.0, 0, f"evaluating step {step}, greedy")
    return {"eval_accuracy": getattr(sampled, o.reward), "eval_greedy": getattr(greedy, o.reward), "eval_strict": sampled.strict, "eval_lenient": sampled.lenient,
            "eval_error": getattr(sampled, o.reward + "_error"), "eval_finished": sampled.finished, "eval_length": sampled.length}


def evaluate_over(world, run, problems, temperature, seed, name):
    answers = sample_answers(run.actor, run.tokenizer, world.mine(problems), 1, run.options.max_new_tokens, run.eos_ids, temperature, seed + world.rank, progress=name if world.main else None)
    return summarise([row for part in world.gather_objects(answers) for row in part])


def samples_of(step, run, batch, rows=(0, 1)):
    """A few answers of the step, readable: text, verdict, and entropy and temperature of every token."""
    for row in rows:
        n = int(batch.rollout.lengths[row])
        yield {
            "step": step, "question": batch.problems[row // run.options.answers_per_prompt].question, "truth": batch.problems[row // run.options.answers_per_prompt].answer,
            "answer": batch.texts[row], "reward": float(batch.rewards[row]), "finished": bool(batch.rollout.finished[row]),
            "tokens": [run.tokenizer.decode([t]) for t in batch.rollout.tokens[row, :n].tolist()],
            "entropy": [round(x, 4) for x in batch.entropy[row, :n].tolist()], "temperature": [round(x, 4) for x in batch.rollout.temperature[row, :n].tolist()],
        }


# ------------------------------------------------------------------------------------------------------- the whole run


def train(o):
    """Set a run up (or pick it up where it stopped), take its steps, leave its files."""
    world = shard.World(o.device)
    run, step = start(o, world)
    stop = StopRequest(run.say)
    if step == 0:
        first_look(run)
    while step < o.steps and not stop.asked:
        step += 1
        batch = None
        try:
            batch, metrics = train_step(step, run)
            bad = f"{metrics['skipped_updates']} of {o.updates_per_rollout} updates were not finite" if metrics["skipped_updates"] else ""
        except NonFiniteLogits as error:
            metrics, bad = {"step": step, "skipped": str(error)}, str(error)
        if not bad:
            if step % o.eval_every == 0 or step == o.steps:
                metrics |= held_out_metrics(run, step)
            if o.diagnose_every and (step % o.diagnose_every == 0 or step == 1) and run.layer:
                metrics |= diagnose(run, batch)
            run.guard.good_step(metrics)
            run.say(console_line(metrics, o))
        else:
            run.guard.bad_step(bad)
        record(run, "metrics.jsonl", [metrics])
        if batch is not None:
            record(run, "samples.jsonl", samples_of(step, run, batch))
            run.last_batch = batch
        if bad and run.guard.bad_in_a_row >= o.max_bad_steps:
            give_up(run, step)
        if not bad and (step % o.save_every == 0 or step == o.steps or stop.asked):
            checkpoint.save(run, step)
    if stop.asked and step < o.steps:
        run.say(f"stopped after step {step}; go on with: python train.py --resume --out {o.out}")
    else:
        finish(run)
    world.close()


def start(o, world):
    """(run, step it stands at): a new run, or the newest whole checkpoint of an old one."""
    shard.check_world(o, world)
    say = print if world.main else lambda *args, **kwargs: None
    out = pathlib.Path(o.out)
    found = checkpoint.newest_whole(out, say) if o.resume else None
    if o.resume and found is None:
        say(f"no whole checkpoint in {out}: starting from the beginning")
    source = str(found or o.model)
    config = load_config(source)
    if o.resume and found:
        check_fingerprint(o, found)

    if world.sharded:
        policy, tokenizer = shard.shard_model(source, world, o.offload), load_tokenizer(source)
    else:
        policy, tokenizer = load_model(source, world.device)
    reference = None
    if o.kl:
        reference = shard.shard_model(o.model, world, o.offload) if world.sharded else load_model(o.model, world.device)[0]
        reference.requires_grad_(False)
    if o.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    no_dropout(policy)
    if o.bupo_layer:
        internals.decoder_body(policy)
        if o.bupo_layer != "auto":
            internals.check_layer(policy, int(o.bupo_layer))

    items, held_out = load_data(o, tokenizer, config, say)
    guard = Guard(say)
    run = Run(o, world, policy, shard.make_actor(policy, world), reference, tokenizer, eos_ids_of(policy, tokenizer), items, held_out, out, guard)
    run.optimizer = run.make_optimizer()
    if not run.eos_ids:
        say("note: neither the model nor the tokenizer names an end-of-sequence token; answers end at --max-new-tokens only")
    step = checkpoint.restore(run, found) if found else 0
    if world.main:
        prepare_folder(o, out, step)
    describe(run, config, say)
    return run, step


def load_data(o, tokenizer, config, say):
    """([(problem, prompt ids)] to train on, held-out problems); prompts that leave no room for an answer are dropped and counted."""
    train_set, held_out = load_problems(o.task, o.data or None, o.difficulty or None, held_out=o.eval_prompts)
    if o.eval_data:
        train_set, held_out = (read_problems(o.data) if o.data else train_set), read_problems(o.eval_data)
    items = [(p, render_prompt(p.question, tokenizer)[1]) for p in tqdm(train_set, desc="rendering prompts", leave=False, disable=len(train_set) < 2000)]
    room = (getattr(config, "max_position_embeddings", None) or math.inf) - o.max_new_tokens
    fitting = [item for item in items if 0 < len(item[1]) <= room]
    if len(fitting) < len(items):
        say(f"warning: {len(items) - len(fitting)} of {len(items)} prompts are longer than the model's context less --max-new-tokens ({room} tokens) and are left out")
    if not fitting:
        raise BadInput(f"--max-new-tokens {o.max_new_tokens}: no prompt fits the model's context of {config.max_position_embeddings} tokens beside it; the shortest has {min(len(i[1]) for i in items)}")
    return fitting, [p for p in held_out if len(render_prompt(p.question, tokenizer)[1]) <= room] or [p for p, _ in fitting[:1]]


def no_dropout(policy):
    """Old and new log-probabilities must come from one function: dropout would make every ratio a random number."""
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


def prepare_folder(o, out, step):
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_file(out / "config.json", json.dumps(dataclasses.asdict(o), indent=1) + "\n")
    for name in ("metrics.jsonl", "samples.jsonl"):
        checkpoint.keep_lines(out / name, step if step or (o.resume and checkpoint.folders(out)) else -1)


def describe(run, config, say):
    o = run.options
    prompt = max(len(ids) for _, ids in run.items[:1000])
    cuda = run.world.device.type == "cuda"
    capacity = torch.cuda.get_device_properties(run.world.device).total_memory if cuda else None
    need = memory.estimate(config, o, prompt, run.world.size, cuda)
    if capacity and need.peak > capacity:
        raise BadInput(f"this run needs {need.peak / memory.GIB:.1f} GiB and the device has {capacity / memory.GIB:.1f}; change {memory.what_to_change(need, o)}")
    layers = internals.layer_count(run.policy) if hasattr(run.policy.base_model, "layers") else "?"
    say(f"{o.algo} on {o.data or o.task}: {len(run.items)} questions to train on, {len(run.held_out)} held out; {o.model}, {need.parameters / 1e6:.2f} M parameters, {layers} layers")
    say(f"a step: {o.prompts_per_step} prompts x {o.answers_per_prompt} answers = {o.answers_per_step}, {o.updates_per_rollout} updates of {o.answers_per_update} answers, "
        f"in passes of {f'{o.micro_tokens} tokens' if o.micro_tokens else f'{o.micro_batch or o.answers_per_update // run.world.size} answers'}; {run.world.size} process(es)")
    say(f"weights and moments {str(next(run.policy.parameters()).dtype)[6:]}, compute {'bfloat16 autocast' if cuda else 'float32'} on {run.world.device}; peak memory about {need.peak / memory.GIB:.2f} GiB a process (--estimate shows its parts)")
    say(f"the first prompt ({len(run.items[0][1])} tokens):\n{run.tokenizer.decode(run.items[0][1])}\n")


def first_look(run):
    """Before training: held-out accuracy, the pass rate on training prompts, and what they let one expect."""
    o = run.options
    metrics = {"step": 0, **held_out_metrics(run, 0)}
    probe = [p for p, _ in run.items[:64]]
    rate = getattr(evaluate_over(run.world, run, probe, o.temperature, seed_of(o.seed, "probe"), "pass rate of 64 prompts"), o.reward)
    live = 1 - rate**o.answers_per_prompt - (1 - rate) ** o.answers_per_prompt
    metrics |= {"pass_rate": rate, "expected_live_groups": live}
    run.say(f"before training: held-out {metrics['eval_accuracy']:.3f} sampled, {metrics['eval_greedy']:.3f} greedy (strict {metrics['eval_strict']:.3f}, lenient {metrics['eval_lenient']:.3f}); "
            f"pass rate of {len(probe)} training prompts {rate:.3f}, so about {live:.0%} of the groups will have both right and wrong answers")
    if not 0.05 <= rate <= 0.95:
        run.say(f"warning: the model is {'almost never' if rate < 0.05 else 'almost always'} right on this task; groups that are all {'wrong' if rate < 0.05 else 'right'} teach nothing (expected live groups {live:.1%}). Try {'an easier task, a stronger model' if rate < 0.05 else 'a harder task'} or more --answers-per-prompt")
    if metrics["eval_finished"] < 0.8:
        run.say(f"warning: {1 - metrics['eval_finished']:.0%} of the answers reach --max-new-tokens {o.max_new_tokens} and are cut; a cut answer is rarely right")
    run.say("a loss near 0 is right: advantages are centred and the ratio starts at 1. What shows learning is a gradient norm above 0, few dead groups, and a rising held-out accuracy.")
    record(run, "metrics.jsonl", [metrics])
    checkpoint.save(run, 0)


def diagnose(run, batch):
    """BuPO's diagnostics on a fixed set of answers, those of the first step they are asked for."""
    if run.diagnosed is None:
        run.diagnosed = response_masks(batch, 32)
    ids, attention, response = run.diagnosed
    cosine, kl = internals.layer_similarity(run.policy, ids, attention, response, run.layer)
    entropy = internals.internal_entropy(run.policy, ids, attention, response, len(run.tokenizer))
    logp, mask = batch.rollout.logp, batch.rollout.mask
    return {"diagnose_cosine": cosine.tolist(), "diagnose_kl": kl.tolist(), "diagnose_layer_change": entropy.layer_change.tolist(),
            "diagnose_perplexity": math.exp(-(logp * mask).sum().item() / mask.sum().item())}


def record(run, name, rows):
    if run.world.main:
        with open(run.out / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def give_up(run, step):
    """Too many bad steps in a row: leave the last answers on disk and stop with the last good checkpoint."""
    where = run.out / f"bad-step-{step}.jsonl"
    if run.last_batch is not None:
        worst = torch.argsort(run.last_batch.rollout.logp.sum(1))[:32].tolist()
        record(run, where.name, samples_of(step, run, run.last_batch, worst))
    raise BadInput(f"{run.guard.bad_in_a_row} bad steps in a row (NaN or infinity), stopped at step {step}; the last good checkpoint is {checkpoint.folders(run.out)[0]}, "
                   f"the last answers are in {where}. Lower --lr {run.options.lr:g} or --grad-clip {run.options.grad_clip:g} and start again from that checkpoint with --model")


def finish(run):
    weights, _ = checkpoint.gather(run)
    if run.world.main:
        checkpoint.save_model(run, run.out / "final", weights)
        run.say(f"done: {run.out / 'final'} holds the model, metrics.jsonl and samples.jsonl what happened")
        try:
            from scripts.curves import plot
        except ImportError:
            run.say("no curves.png: pip install matplotlib, then python scripts/curves.py " + str(run.out))
        else:
            run.say(f"curves: {plot([run.out])}")


# ------------------------------------------------------------------------------------------------------- the options


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message} (see --help)")


def parse(argv):
    """Options from the command line, from a resumed run's config.json where one is there, and from each other."""
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Options):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"] + ("" if f.default in ("", 0) and not isinstance(f.default, bool) else f" (default {f.default})")
        if isinstance(f.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(flag, type=type(f.default), choices=f.metadata.get("choices"), help=text)
    given = vars(parser.parse_args(argv))
    o = Options(**given)
    o = dataclasses.replace(o, out=o.out or f"runs/{o.algo}-{pathlib.Path(o.data).stem if o.data else o.task}")
    if o.estimate:
        return complete(o)
    held = pathlib.Path(o.out) / "config.json"
    if held.exists() and o.resume:
        return complete(resumed_options(held, given, o))
    if held.exists() and not o.overwrite:
        raise BadInput(f"--out {o.out}: already holds a run; --resume continues it, --overwrite deletes it, or name another folder")
    return complete(o)


MAY_CHANGE = {"steps", "device", "micro_batch", "micro_tokens", "gradient_checkpointing", "offload", "eval_every", "save_every", "keep", "max_bad_steps", "resume", "overwrite", "out", "diagnose_every", "model"}


def resumed_options(held, given, o):
    """A resumed run's own options; those given again must agree, except where changing them changes no result."""
    try:
        stored = json.loads(held.read_text())
    except ValueError as error:
        raise BadInput(f"{held}: not a run's config.json ({error})") from None
    for key, value in given.items():
        if key not in MAY_CHANGE and stored.get(key) != value:
            raise BadInput(f"--{key.replace('_', '-')} {value}: the run in {o.out} was started with {stored.get(key)}; leave the option out, or start a new run in another --out")
    known = {f.name for f in dataclasses.fields(Options)}
    return Options(**{k: v for k, v in stored.items() if k in known} | {k: v for k, v in given.items() if k in MAY_CHANGE} | {"resume": True, "overwrite": False})


def check_fingerprint(o, found):
    """--model beside --resume, or a folder copied together from two runs: model and tokenizer must be the checkpoint's."""
    if not pathlib.Path(o.model).exists():
        return  # the run's model has been moved away since: the checkpoint holds everything that is needed
    stored = json.loads((found / "run.json").read_text())["fingerprint"]
    current = checkpoint.fingerprint(load_config(o.model), load_tokenizer(o.model))
    for part in ("model", "tokenizer"):
        if stored[part] != current[part]:
            raise BadInput(f"--resume: {found} was made with another {part} than --model {o.model}; name the model the run was started with, or another --out")


def complete(o):
    """Fill in the defaults that depend on other options, and refuse what cannot work: one line each."""
    o = dataclasses.replace(
        o,
        device=o.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        max_new_tokens=o.max_new_tokens or default_cap(o.task, o.data),
        clip_high=o.clip_high or (0.2 if o.algo == "grpo" else 0.28),
        tau=o.tau or (0.1 if o.temperature_form == "zscore" else 0.05),
        loss_mean=o.loss_mean or ("sequence" if o.algo == "grpo" else "token"),
    )
    at_least = dict(steps=1, prompts_per_step=1, updates_per_rollout=1, max_new_tokens=1, max_rounds=1, eval_prompts=1, eval_every=1, save_every=1, keep=1, max_bad_steps=1, micro_batch=0, micro_tokens=0, warmup_steps=0, diagnose_every=0, bupo_steps=1, overlong_buffer=0, seed=0)
    within = dict(rho=(0, 1), tau=(0, 0.9), clip_low=(0, 1), clip_high=(0, 10), temperature=(0.05, 10), lr=(0, 1), weight_decay=(0, 10), grad_clip=(1e-8, 1e8), kl=(0, 100))
    flag = lambda name: f"--{name.replace('_', '-')} {getattr(o, name)}"
    for name, low in at_least.items():
        if getattr(o, name) < low:
            raise BadInput(f"{flag(name)}: must be at least {low}")
    for name, (low, high) in within.items():
        if not low <= getattr(o, name) <= high:
            raise BadInput(f"{flag(name)}: must lie between {low:g} and {high:g}")
    if o.answers_per_prompt < 2:
        raise BadInput(f"{flag('answers_per_prompt')}: {o.algo} compares the answers to one prompt, so it needs at least 2")
    if o.prompts_per_step % o.updates_per_rollout:
        raise BadInput(f"{flag('prompts_per_step')}: must be a multiple of --updates-per-rollout {o.updates_per_rollout}, so that every update holds whole groups")
    if o.micro_batch and o.answers_per_update % o.micro_batch:
        raise BadInput(f"{flag('micro_batch')}: must divide the {o.answers_per_update} answers of an update ({o.prompts_per_step} x {o.answers_per_prompt} / {o.updates_per_rollout})")
    if o.micro_batch and o.micro_tokens:
        raise BadInput(f"{flag('micro_tokens')}: give --micro-batch or --micro-tokens, not both")
    if o.dual_clip and o.dual_clip <= 1:
        raise BadInput(f"{flag('dual_clip')}: must be larger than 1, or 0 for none")
    if o.overlong_buffer > o.max_new_tokens:
        raise BadInput(f"{flag('overlong_buffer')}: longer than --max-new-tokens {o.max_new_tokens}")
    if o.eval_data and not o.data:
        raise BadInput(f"{flag('eval_data')}: goes with --data; built-in tasks hold out problems of their own")
    if o.bupo_layer and o.bupo_layer != "auto" and not o.bupo_layer.isdecimal():
        raise BadInput(f"{flag('bupo_layer')}: must be auto or a layer from 1 to the model's last")
    if o.bupo_layer and o.bupo_steps >= o.steps:
        raise BadInput(f"{flag('bupo_steps')}: the first phase must be shorter than the run (--steps {o.steps})")
    if o.diagnose_every and not o.bupo_layer:
        raise BadInput(f"{flag('diagnose_every')}: needs --bupo-layer, the layer to compare the others with")
    if o.device.startswith("cuda") and not torch.cuda.is_available():
        raise BadInput(f"{flag('device')}: no CUDA device is visible; use --device cpu")
    return o


def main(argv=None):
    o = parse(argv)
    if o.estimate:
        config = load_config(o.model)
        print(memory.table(memory.estimate(config, o), o, 256, 1, True))
        return
    if o.overwrite and (pathlib.Path(o.out) / "config.json").exists():
        shutil.rmtree(o.out)
    train(o)


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"train.py: {error.strerror or error}: {error.filename or ''}; what was saved before is intact, --resume continues from it", file=sys.stderr)
        sys.exit(2)
