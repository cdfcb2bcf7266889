"""The mathematics both papers build on: token log-probabilities, advantages, the clipped surrogate.

All functions take and return tensors. None needs a model, a tokenizer or an optimizer, and none
changes an input.

Shapes    B responses (the G responses to one prompt are adjacent), T response positions
          (right-padded), V vocabulary, D hidden size.
Mask      (B, T), 1 at every token of a response, its end-of-sequence token included, 0 at padding.
Units     log-probabilities are natural logarithms, entropies are in nats.

Sources   GRPO (Shao et al. 2024, arXiv 2402.03300), DAPO (Yu et al. 2025, 2503.14476), Dr. GRPO
          (Liu et al. 2025, 2503.20783), RLOO (Ahmadian et al. 2024, 2402.14740), dual clip (Ye et
          al. 2020, 1912.09729), k3 (Schulman 2020, "Approximating KL divergence").
"""

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # exp overflows from 89 on, and even a clipped token's gradient is then NaN
NEVER = -1e30  # a finite stand-in for -inf: exp(NEVER) and 0 * NEVER are both 0

# ------------------------------------- log-probability and entropy of the tokens of a response


def token_logprobs_and_entropy(
    hidden: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each target and the entropy of the whole distribution.

        p = softmax(hidden @ unembedding.T / temperature)
        logp = log p[target],   entropy = -sum_v p_v log p_v

    hidden (..., D), unembedding (V, D) cut to the tokenizer's ids, targets (...). Both results are
    (...) and differentiable. Logits are computed for `chunk_tokens` tokens at a time (default: for
    all). engine/logprobs.py computes the same with less memory.
    """
    if targets.shape != hidden.shape[:-1]:
        shapes = f"{tuple(targets.shape)}, hidden {tuple(hidden.shape)}"
        raise ValueError(f"targets must have the shape of hidden without its last axis: {shapes}")
    states, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    total = max(1, len(ids))
    size, parts = chunk_tokens or total, []
    for start in range(0, total, size):
        rows = slice(start, start + size)
        logits = states[rows] @ unembedding.T
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        parts.append(row_logprobs_and_entropy(logits, ids[rows]))
    logp, entropy = (torch.cat(part).view(targets.shape) for part in zip(*parts))
    return logp, entropy


def row_logprobs_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p[target] and the entropy of p = softmax(logits): (..., V), (...) -> (...) twice.

    HAPO uses log H, so H must be exact where it is small, where log Z - E[logit] loses its digits
    by cancellation. So subtract the largest logit, which makes every z <= 0. Let s be the sum of
    e^z over all other ids. Then H = log1p(s) + sum p (-z): a sum of terms that are never negative.
    """
    with torch.autocast(logits.device.type, enabled=False):
        top = logits.argmax(-1, keepdim=True)
        z = clip(logits - logits.gather(-1, top), NEVER, torch.inf)
        others = z.exp().scatter(-1, top, 0.0)
        s = others.sum(-1)
        # log Z minus the largest logit. Add that logit's own z: it is 0, or NaN if the logit was
        # infinite, and the NaN must reach the result
        log_z = torch.log1p(s) + z.gather(-1, top).squeeze(-1)
        entropy = log_z - (others * z).sum(-1) / (1 + s)
        logp = z.gather(-1, targets[..., None]).squeeze(-1) - log_z
        return logp, entropy


# -------------------------------------------------------------------------------------- advantages


def grpo_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Return GRPO's advantages: A[b] = (R[b] - mean_group) / (std_group + 1e-6), (B,) -> (B,).

    std_group is the sample standard deviation (n - 1). A group of one response, or of equal
    rewards, has advantage 0.
    """
    groups = split_groups(rewards, group_size)
    if group_size == 1:
        return torch.zeros_like(rewards)
    mean = groups.mean(1, keepdim=True)
    std = groups.std(1, keepdim=True)
    advantages = (groups - mean) / (std + 1e-6)
    # if all rewards are equal, the mean's rounding error must not be divided by 1e-6
    return torch.where(has_reward_variance(rewards, group_size), advantages.view(-1), 0.0)


def rloo_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Return RLOO's advantages: A[b] = R[b] - mean of the group's other rewards, (B,) -> (B,).

    The baseline does not contain the response's own reward, so it is unbiased. A group of one has
    advantage 0.
    """
    groups = split_groups(rewards, group_size)
    if group_size == 1:
        return torch.zeros_like(rewards)
    total = groups.sum(1, keepdim=True)
    others = (total - groups) / (group_size - 1)
    advantages = (groups - others).view(-1)
    return torch.where(has_reward_variance(rewards, group_size), advantages, 0.0)


def split_groups(rewards: Tensor, group_size: int) -> Tensor:
    """Return rewards by group, (B,) -> (B / G, G). ValueError if B is not a multiple of G."""
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} responses: not a multiple of the group size {group_size}")
    return rewards.view(-1, group_size)


def has_reward_variance(rewards: Tensor, group_size: int) -> Tensor:
    """Return for each response whether the rewards of its group differ, (B,) -> (B,) bool.

    A group whose rewards are all equal has advantage 0: nothing is learned from it.
    """
    groups = split_groups(rewards, group_size)
    return (groups.amax(1) > groups.amin(1)).repeat_interleave(group_size)


# -------------------------------------------------------------------------------- surrogate and KL


def clip(values: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Return min(max(values, low), high), bounds numbers or tensors that broadcast to `values`.

    The gradient is 1 inside the closed interval [low, high], its two ends included, and 0 outside.
    The papers leave the gradient at a bound open, and torch.clamp gives 1, 0.5 or 0 there: it
    depends on the version and on whether the bound is a tensor. NaN stays NaN.
    """
    values = torch.where(values < low, low, values)
    return torch.where(values > high, high, values)


def likelihood_ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """Return r = exp(logp - old_logp); the exponent is clipped to +-20, with gradient 0 beyond."""
    return torch.exp(clip(logp - old_logp, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    dual_clip: float | None = None,
) -> Tensor:
    """Return PPO's clipped surrogate as a loss: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    All (B, T); the bounds may be numbers. With a dual clip c > 1, the loss of a token with A < 0 is
    at most -c A. The gradient is 0 where A > 0 and r > 1 + clip_high, and where A < 0 and
    r < 1 - clip_low; such a token still counts in the denominator of the mean.

    Gradients at equality, which the papers leave open, are those of HAPO's released code under
    torch 2.13. A token whose ratio lies exactly on a clip bound has the full gradient: where both
    sides of the minimum are equal, the unclipped side counts. A token that lies exactly on the dual
    clip has half of it: there the mean of both sides counts.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be larger than 1, not {dual_clip}")
    unclipped = -advantages * ratio
    clipped = -advantages * clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = torch.where(clipped > unclipped, clipped, unclipped)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        bounded = torch.where(loss > bound, bound, loss)
        bounded = torch.where(loss == bound, (loss + bound) / 2, bounded)
        loss = torch.where(advantages < 0, bounded, loss)
    return loss


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Return the k3 estimate of KL(policy || reference) per token, (B, T).

    exp(d) - d - 1 >= 0, with d = ref_logp - logp.
    """
    d = clip(ref_logp - logp, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.exp(d) - d - 1


# --------------------------------------------------------------------------- three kinds of mean
# The normalizer is that of an update's whole mini-batch. If the mini-batch is split into
# micro-batches, the caller passes this number, and their losses and gradients add up to those of
# the mini-batch. Padding is filled with 0, since multiplying a NaN by the mask would keep it.


def masked_mean(values: Tensor, mask: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
    """Return the token mean (DAPO), (B, T) -> (): the sum over valid tokens / their number.

    `normalizer` replaces the number of tokens.
    """
    count = mask.sum() if normalizer is None else normalizer
    return values.masked_fill(mask == 0, 0.0).sum() / max(count, 1)


def sequence_mean(
    values: Tensor,
    mask: Tensor,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return the sequence mean (GRPO), (B, T) -> (): the mean over responses of their token means.

    `normalizer` replaces the number of responses. A response without a valid token adds 0 and still
    counts as a response.
    """
    count = len(values) if normalizer is None else normalizer
    sums = values.masked_fill(mask == 0, 0.0).sum(1)
    lengths = mask.sum(1).clamp_min(1)
    return (sums / lengths).sum() / max(count, 1)


def fixed_length_mean(
    values: Tensor,
    mask: Tensor,
    length: int,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return Dr. GRPO's mean, (B, T) -> (): the mean over responses of their sums / `length`.

    `length` is a constant in tokens. `normalizer` replaces the number of responses.
    """
    count = len(values) if normalizer is None else normalizer
    total = values.masked_fill(mask == 0, 0.0).sum()
    return total / (length * max(count, 1))


# ----------------------------------------------------------------------------------------- rewards


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """Return DAPO's soft overlong penalty, which is added to the reward: (B,) tokens -> (B,).

    It is 0 up to a length of max_length - buffer, then falls linearly to -1 at max_length.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"the overlong buffer must lie in 1..{max_length}, not {buffer}")
    unpunished = max_length - buffer
    return ((unpunished - lengths) / buffer).clamp(-1.0, 0.0)
