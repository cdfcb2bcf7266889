"""Define Batch, the responses of one step with their values, and the records of its updates."""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

import hapo
from sampling import Rollout, Rows, TokenScores, pad_prompts


@dataclass(kw_only=True)
class Batch:
    """The responses of one step, with one value per response (B,) or per token (B, T).

    `problems` has one item per prompt. To add a tensor (B,) or (B, T), add one line here: `select`
    and `join` handle it. They drop fields of other types, which must be set after dynamic sampling.
    """

    problems: list  # (P,)
    texts: list  # (B,) decoded responses
    rollout: Rollout
    strict: Tensor  # (B,) bool, the two verdicts on each response
    lenient: Tensor  # (B,) bool
    correct: Tensor  # (B,) bool, the verdict that --reward names
    rewards: Tensor  # (B,) what the advantages are computed from
    has_reward_variance: Tensor  # (B,) bool, whether the outcomes of the response's group differ
    # rollout.mask has all tokens drawn; loss_mask has those in the loss and its denominator.
    # Zero-variance groups count in the denominator, with advantage 0. Under dynamic sampling,
    # groups that could not be replaced do not count.
    in_loss: Tensor  # (B,) bool, false in groups that dynamic sampling could not replace
    loss_mask: Tensor  # (B, T) bool, tokens in the loss

    # The fields below are None until the step sets them.
    all_drawn: "Batch" = None  # with dynamic sampling: all responses drawn, before the selection
    old: TokenScores = None  # of the policy being trained, before the first update
    full: TokenScores = None  # of the full policy; h is computed from these entropies
    reference: TokenScores = None  # of the initial model
    stats: hapo.EntropyStats = None  # entropy statistics that h is computed with
    h: Tensor = None  # (B, T) HAPO's modulation
    advantages: Tensor = None  # (B, T)
    importance_weights: Tensor = None  # (B, T) --sampler-correction


class PolicyLoss(NamedTuple):
    """The loss of some responses, and the values that it was computed from, (rows, T) each."""

    per_token: Tensor
    ratio: Tensor
    clip_low: Tensor  # distance of the lower clip bound from 1
    clip_high: Tensor  # distance of the upper clip bound from 1
    advantages: Tensor  # after HAPO's redistribution
    loss_mean: str  # how per_token is averaged: "token", "sequence" or "fixed"


class MicroBatchResult(NamedTuple):
    """The result of one forward pass of an update, on some responses."""

    rows: Rows
    logp: Tensor  # (rows, T)
    loss: PolicyLoss


class Update(NamedTuple):
    """The result of one update. The defaults are those of an update without any advantage."""

    # applied; skipped: NaN or infinite; rescaled: float16 overflowed; no_signal: no advantage
    outcome: str = "no_signal"
    loss: float = 0.0  # over all processes
    grad_norm: float = 0.0  # before clipping
    micro_batches: list[MicroBatchResult] = ()


class StepRecord(NamedTuple):
    """The results of a step, from which run/report.py computes a line of metrics.jsonl."""

    number: int
    layer: int | None  # layer whose policy was trained; None: the model's own
    batch: Batch
    updates: list[Update]
    seconds: dict[str, float]


# ----------------------------------------------- select, join and move batches and rollouts


def select(batch, groups):
    """Return the Batch (or Rollout) of the groups with these numbers, in this order."""
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
    """Return several batches (or rollouts) with the same G as one, padded to the longest."""
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
    """Return a batch (or rollout) with all tensors on a device."""
    moved = {}
    for name, value in present(batch):
        if isinstance(value, Rollout):
            value = moved_to(value, device)
        moved[name] = value.to(device) if isinstance(value, Tensor) else value
    return type(batch)(**moved)


def present(batch):
    """Return the (name, value) of every field that is not None."""
    values = ((field.name, getattr(batch, field.name)) for field in fields(batch))
    return [(name, value) for name, value in values if value is not None]


def rows_of(groups, group_size):
    """Return the row numbers of some groups, G adjacent rows each."""
    return [p * group_size + g for p in groups for g in range(group_size)]


def pad_to_longest(tensors, left=False):
    """Return (n_i, T_i) tensors padded with 0 to the largest T. Return (n_i,) tensors unchanged."""
    if tensors[0].dim() == 1:
        return tensors
    width = max(x.shape[1] for x in tensors)
    gaps = [width - x.shape[1] for x in tensors]
    pads = [(gap, 0) if left else (0, gap) for gap in gaps]
    return [torch.nn.functional.pad(x, pad) for x, pad in zip(tensors, pads)]


def rollout_of(prompts, responses):
    """Return given responses (lists of ids), one to each prompt, as a Rollout.

    Their temperature is set to 0, their log-probabilities and entropies to NaN.
    """
    prompt, prompt_mask = pad_prompts(prompts)
    tokens = torch.cat(pad_to_longest([torch.tensor([ids], dtype=torch.long) for ids in responses]))
    lengths = torch.tensor([len(ids) for ids in responses])
    unknown = torch.full(tokens.shape, torch.nan)
    return Rollout(
        prompt=prompt,
        prompt_mask=prompt_mask,
        tokens=tokens,
        mask=torch.arange(tokens.shape[1]) < lengths[:, None],
        temperature=torch.zeros(tokens.shape),
        logp=unknown,
        entropy=unknown,
        finished=torch.ones(len(responses), dtype=torch.bool),
    )
