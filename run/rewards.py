"""The reward of a response, composed in one function."""

from typing import NamedTuple

import torch
from torch import Tensor

import losses
from problems.grading import grade
from run.state import seed_of


class Rewards(NamedTuple):
    """What the responses of a batch are given, one value per response, (B,)."""

    strict: Tensor  # bool, the two verdicts of the grader
    lenient: Tensor  # bool
    correct: Tensor  # bool, the verdict that --reward names
    total: Tensor  # what the advantages are computed from
    has_variance: Tensor  # bool, whether the rewards of the response's group differ


def compute_rewards(problems, texts, rollout, step, attempt, run):
    """Grade the responses and return their Rewards.

    problems: one per prompt; texts: the responses, one per row of the rollout.
    """
    options, G, device = run.options, rollout.group_size, rollout.mask.device
    grades = [grade(problems[row // G], text) for row, text in enumerate(texts)]
    strict, lenient = torch.tensor(grades, device=device).unbind(1)

    # Duplicate responses share the first one's outcome. With different ones, say by chance, their
    # gradients would cancel but for rounding, and AdamW turns any gradient into a full step.
    first = [texts.index(text, row // G * G) for row, text in enumerate(texts)]
    if options.reward == "random":
        correct = random_verdicts(step, attempt, run)[first]
    elif options.reward == "strict":
        correct = strict[first]
    else:
        correct = lenient[first]

    if run.reward_function is not None:  # --reward-function; NaN where it failed
        own = [run.reward_function(problems[row // G], text) for row, text in enumerate(texts)]
        outcome = torch.tensor(own, device=device)[first]
    else:
        outcome = correct.float()
    # Add other terms of the outcome here, a bonus for the format for example. A group whose
    # outcomes are all equal has zero reward variance: nothing is learned from it.
    has_variance = losses.has_reward_variance(outcome, G)

    # A length penalty is no outcome: it must not make a zero-variance group trainable.
    penalty = torch.zeros_like(outcome)
    if options.overlong_buffer:
        cap, buffer = options.max_new_tokens, options.overlong_buffer
        penalty = losses.overlong_penalty(rollout.lengths, cap, buffer)
    return Rewards(strict, lenient, correct, outcome + penalty, has_variance)


def random_verdicts(step, attempt, run):
    """Return --reward random's verdicts by chance, (B,), the same over any number of processes."""
    options, generator = run.options, torch.Generator()
    generator.manual_seed(seed_of(options.seed, step, attempt, "coin"))
    shape = (options.prompts_per_step, options.num_generations)
    heads = torch.rand(*shape, generator=generator) < 0.5
    return heads[run.dist.rank :: run.dist.size].flatten().to(run.dist.device)
