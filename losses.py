"""The mathematics both papers build on: token log-probabilities, advantages, the clipped surrogate.

Tensors in, tensors out. Nothing here knows a model, a tokenizer or an optimiser, and nothing
changes an input.

Shapes    B responses (the G answers to one prompt are adjacent), T response positions
          (right-padded), V vocabulary, D hidden size.
Mask      (B, T), 1 at every token of a response, its end-of-sequence token included, 0 at padding.
Units     log-probabilities are natural logarithms, entropies are in nats.

Sources   GRPO (Shao et al. 2024, arXiv 2402.03300), DAPO (Yu et al. 2025, 2503.14476), Dr. GRPO
          (Liu et al. 2025, 2503.20783), RLOO (Ahmadian et al. 2024, 2402.14740), dual clip (Ye et
          al. 2020, 1912.09729), k3 (Schulman 2020, "Approximating KL divergence").
"""

import torch
from torch import Tensor

from fast.logprobs import chunked_logprobs_and_entropy
from fast.rows import NEVER  # -1e30: e to it is 0, and so is 0 times it

LOG_RATIO_LIMIT = 20.0  # from 89 on exp overflows, and even a clipped token's gradient is NaN

# ---------------------------------------------- log-probability and entropy of the taken tokens


def token_logprobs_and_entropy(
    hidden: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    measure_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and entropy of the whole distribution, both differentiable.

        p = softmax(hidden @ unembedding.T / temperature)
        logp = log p[target],   entropy = -sum_v p_v log p_v

    hidden (..., D), unembedding (V, D) cut to the tokenizer's ids, targets (...). In chunks, so
    that the logits never exist all at once; measure_entropy=False saves a pass over them and
    returns no entropy.
    """
    if targets.shape != hidden.shape[:-1]:
        shapes = f"{tuple(targets.shape)}, hidden {tuple(hidden.shape)}"
        raise ValueError(f"targets must have the shape of hidden without its last axis: {shapes}")
    return chunked_logprobs_and_entropy(
        hidden,
        unembedding,
        targets,
        temperature,
        chunk_tokens,
        measure_entropy,
    )


def plain_logprobs_and_entropy(
    hidden: Tensor, unembedding: Tensor, targets: Tensor, temperature: float = 1.0, **unused: bool
) -> tuple[Tensor, Tensor]:
    """The same from whole logits: for reading, and for small models. The entropy always comes."""
    logits = hidden @ unembedding.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return row_logprobs_and_entropy(logits / temperature, targets)


def row_logprobs_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p[target] and entropy of softmax(logits): (..., V), (...) -> two tensors (...).
    log Z - E[logit] would cancel, and HAPO steers by log H. Relative to the likeliest id every
    z <= 0; with s, the sum of e^z over the *others*, H = log1p(s) + sum p (-z), none negative."""
    with torch.autocast(logits.device.type, enabled=False):
        top = logits.argmax(-1, keepdim=True)
        z = clip(logits - logits.gather(-1, top), NEVER, torch.inf)
        others = z.exp().scatter(-1, top, 0.0)
        s = others.sum(-1)
        # log Z less the top logit, whose z is 0; or NaN, where that logit is infinite: it must show
        log_z = torch.log1p(s) + z.gather(-1, top).squeeze(-1)
        entropy = log_z - (others * z).sum(-1) / (1 + s)
        logp = z.gather(-1, targets[..., None]).squeeze(-1) - log_z
        return logp, entropy


# -------------------------------------------------------------------------------------- advantages


def grpo_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """GRPO: A[b] = (R[b] - mean_group) / (std_group + 1e-6), sample standard deviation (n - 1).
    (B,) -> (B,), 0 in a group of one and where a group's rewards are all equal."""
    groups = split_groups(rewards, group_size)
    if group_size == 1:
        return torch.zeros_like(rewards)
    mean = groups.mean(1, keepdim=True)
    std = groups.std(1, keepdim=True)
    advantages = (groups - mean) / (std + 1e-6)
    # rounding of the mean must not turn "all equal" into noise divided by 1e-6
    return torch.where(differ(rewards, group_size), advantages.view(-1), 0.0)


def rloo_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """RLOO: A[b] = R[b] - mean of the group's other rewards. (B,) -> (B,); a group of one gets 0.

    The baseline of an answer does not contain the answer, so it is unbiased.
    """
    groups = split_groups(rewards, group_size)
    if group_size == 1:
        return torch.zeros_like(rewards)
    total = groups.sum(1, keepdim=True)
    others = (total - groups) / (group_size - 1)
    advantages = (groups - others).view(-1)
    return torch.where(differ(rewards, group_size), advantages, 0.0)


# --advantage NAME: a new rule is one function (rewards, group_size) -> (B,) and one entry here
GROUP_RULES = {"grpo": grpo_advantages, "rloo": rloo_advantages}


def split_groups(rewards: Tensor, group_size: int) -> Tensor:
    """(B,) -> (B / G, G); refuses a batch that is not made of whole groups."""
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} responses: not a multiple of the group size {group_size}")
    return rewards.view(-1, group_size)


def differ(rewards: Tensor, group_size: int) -> Tensor:
    """Whether the rewards of an answer's group differ, (B,) -> (B,) bool; if not, it is dead."""
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
    """r = exp(logp - old_logp), its exponent within +-20; beyond that there is no gradient."""
    return torch.exp(clip(logp - old_logp, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate, as a loss:  -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).
    All (B, T), bounds too or numbers. Dual clip c > 1: a token with A < 0 costs at most -c A.

    Gradients at equality, which the papers leave open, are those of HAPO's released code with the
    torch of its time. A token whose ratio lies exactly on a clip bound learns at full strength:
    where both sides of the minimum are equal, the unclipped side counts. A token that lies exactly
    on the dual clip learns at half strength: there the mean of both sides counts.
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
    """k3 estimate of KL(policy || reference) a token: exp(d) - d - 1 >= 0, d = ref_logp - logp."""
    d = clip(ref_logp - logp, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.exp(d) - d - 1


# ------------------------------------------------------------------------------ three ways to mean
# The normaliser belongs to the whole optimiser batch. When that batch is cut into micro-batches the
# caller passes the whole batch's number, and the parts add up to the same loss and gradient.
# Padding is filled with 0: a product with the mask would let a NaN in it survive.


def masked_mean(values: Tensor, mask: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
    """Token mean (DAPO): sum over valid tokens / their number (or `normalizer`). (B, T) -> ()."""
    count = mask.sum() if normalizer is None else normalizer
    return values.masked_fill(mask == 0, 0.0).sum() / max(count, 1)


def sequence_mean(
    values: Tensor,
    mask: Tensor,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Sequence mean (GRPO): each response's mean over its tokens, then the mean over responses.

    Or / `normalizer`. A response without a valid token adds 0 and still counts as a response.
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
    """Dr. GRPO: each response's sum / a constant `length`, then the mean over responses."""
    count = len(values) if normalizer is None else normalizer
    total = values.masked_fill(mask == 0, 0.0).sum()
    return total / (length * max(count, 1))


# ----------------------------------------------------------------------------------------- rewards


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment: 0 up to max_length - buffer, then linear to -1 at the cap.

    Added to the reward. lengths (B,) in tokens; returns (B,).
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"the overlong buffer must lie in 1..{max_length}, not {buffer}")
    unpunished = max_length - buffer
    return ((unpunished - lengths) / buffer).clamp(-1.0, 0.0)
