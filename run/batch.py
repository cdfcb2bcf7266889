"""The answers of one step on their way from sampling to the update, and what came of them."""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

import hapo
from sampling import Rollout, Rows, pad_prompts


@dataclass(kw_only=True)
class Batch:
    """One value an answer (B,) or a token (B, T); `problems` one a prompt. A new quantity is one
    line here: `select` and `join` carry it along."""

    problems: list  # (P,)
    texts: list  # (B,) decoded answers
    rollout: Rollout
    strict: Tensor  # (B,) bool, the two verdicts of every answer
    lenient: Tensor  # (B,) bool
    right: Tensor  # (B,) bool, the verdict used as reward (--reward)
    rewards: Tensor  # (B,) what the advantages are made of: the verdict, less any length penalty
    # which tokens count: rollout.mask has all that were drawn, loss_mask those in the loss and its
    # denominator, of the answers `in_loss` (without groups that dynamic sampling could not
    # replace). Answers that are not `live` stay in the denominator with advantage 0
    live: Tensor = None  # (B,) bool, whether the group's rewards differ, before any length penalty
    in_loss: Tensor = None  # (B,) bool, false in groups that stayed dead under dynamic sampling
    loss_mask: Tensor = None  # (B, T) bool, tokens in the loss

    # what follows is there once the step has got to it
    all_drawn: "Batch" = None  # where dynamic sampling has replaced groups: all that were drawn
    old_logp: Tensor = None  # (B, T) of the trained policy before the first update
    trained_entropy: Tensor = None  # (B, T) of the trained policy at T_base
    entropy: Tensor = None  # (B, T) of the full policy: the same, in BuPO's phase 1 the sampler's
    ref_logp: Tensor = None  # (B, T) of the initial model
    stats: hapo.EntropyStats = None  # what h is made of
    h: Tensor = None  # (B, T) HAPO's modulation
    clip_low: Tensor = None  # (B, T) how far a ratio may fall below 1
    clip_high: Tensor = None  # (B, T) how far it may rise above 1
    advantages: Tensor = None  # (B, T)
    weight: Tensor = None  # (B, T) --sampler-correction


class Pass(NamedTuple):
    """One forward pass of an update: some answers at the policy as it was then, (rows, T) each."""

    rows: Rows
    logp: Tensor
    ratio: Tensor
    advantages: Tensor  # after HAPO's redistribution


class Update(NamedTuple):
    """What one update did. The defaults are those of a dead one."""

    # applied; skipped: NaN or infinity; rescaled: float16 overflowed; dead: nothing to learn from
    outcome: str = "dead"
    loss: float = 0.0  # over all processes
    grad_norm: float = 0.0  # before clipping
    passes: list[Pass] = ()


class Step(NamedTuple):
    """What a step did: run/report.py makes a line of metrics.jsonl of it."""

    number: int
    layer: int | None  # whose policy was trained; None: the model's own
    batch: Batch
    updates: list[Update]
    seconds: dict[str, float]


# ------------------------------------------------------------------- batches and rollouts, cut up


def select(batch, groups):
    """The Batch (or Rollout) of some of its groups, in that order."""
    rollout = getattr(batch, "rollout", batch)
    rows = rows_of(groups, rollout.group_size)
    chosen = {}
    for name, value in present(batch):
        index = groups if name in ("problems", "prompt", "prompt_mask") else rows
        if isinstance(value, Rollout):
            chosen[name] = select(value, groups)
        elif isinstance(value, (list, tuple)) and name in ("problems", "texts"):
            chosen[name] = [value[i] for i in index]
        elif isinstance(value, Tensor):
            chosen[name] = value[index]
    return type(batch)(**chosen)


def join(parts):
    """Several batches (or rollouts) with the same G as one, padded to the longest."""
    joined = {}
    for name, value in present(parts[0]):
        values = [getattr(part, name) for part in parts]
        if isinstance(value, Rollout):
            joined[name] = join(values)
        elif isinstance(value, list):
            joined[name] = sum(values, [])
        elif isinstance(value, Tensor):
            joined[name] = torch.cat(pad_to_longest(values, left=name.startswith("prompt")))
    return type(parts[0])(**joined)


def moved_to(batch, device):
    """A batch (or rollout) on another device."""
    moved = {}
    for name, value in present(batch):
        if isinstance(value, Rollout):
            value = moved_to(value, device)
        moved[name] = value.to(device) if isinstance(value, Tensor) else value
    return type(batch)(**moved)


def present(batch):
    """(name, value) of every field that is there."""
    values = ((field.name, getattr(batch, field.name)) for field in fields(batch))
    return [(name, value) for name, value in values if value is not None]


def rows_of(groups, group_size):
    """The rows of some groups: G adjacent rows each."""
    return [p * group_size + g for p in groups for g in range(group_size)]


def pad_to_longest(tensors, left=False):
    """(n_i, T_i) tensors, all padded with 0 to the largest T; (n_i,) ones as they are."""
    if tensors[0].dim() == 1:
        return tensors
    width = max(x.shape[1] for x in tensors)
    gaps = [width - x.shape[1] for x in tensors]
    pads = [(gap, 0) if left else (0, gap) for gap in gaps]
    return [torch.nn.functional.pad(x, pad) for x, pad in zip(tensors, pads)]


def rollout_of(prompts, answers):
    """Finished answers (lists of ids), one to each prompt, as a Rollout; temperature 0,
    log-probabilities and entropies unknown."""
    prompt, prompt_mask = pad_prompts(prompts)
    tokens = torch.cat(pad_to_longest([torch.tensor([ids], dtype=torch.long) for ids in answers]))
    lengths = torch.tensor([len(ids) for ids in answers])
    unknown = torch.full(tokens.shape, torch.nan)
    return Rollout(
        prompt=prompt,
        prompt_mask=prompt_mask,
        tokens=tokens,
        mask=torch.arange(tokens.shape[1]) < lengths[:, None],
        temperature=torch.zeros(tokens.shape),
        logp=unknown,
        entropy=unknown,
        finished=torch.ones(len(answers), dtype=torch.bool),
    )
