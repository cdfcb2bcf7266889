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
from fast.rows import NEVER

LOG_RATIO_LIMIT = 20.0  # beyond it exp overflows, and even a clipped token's gradient is NaN

# ---------------------------------------------- log-probability and entropy of the taken tokens


def token_logprobs_and_entropy(
    hidden: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    plain: bool = False,
    measure_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and entropy of the whole distribution, both differentiable.

        p = softmax(hidden @ unembedding.T / temperature)
        logp = log p[target],   entropy = -sum_v p_v log p_v

    hidden (..., D), unembedding (V, D) cut to the tokenizer's ids, targets (...). Chunked or plain;
    measure_entropy=False saves the chunked one a pass over the logits, and it returns no entropy.
    """
    if targets.shape != hidden.shape[:-1]:
        shapes = f"{tuple(targets.shape)}, hidden {tuple(hidden.shape)}"
        raise ValueError(f"targets must have the shape of hidden without its last axis: {shapes}")
    if plain:
        return plain_logprobs_and_entropy(hidden, unembedding, targets, temperature)
    how = (temperature, chunk_tokens, measure_entropy)
    return chunked_logprobs_and_entropy(hidden, unembedding, targets, *how)


def plain_logprobs_and_entropy(
    hidden: Tensor, unembedding: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """token_logprobs_and_entropy from whole logits: for reading, and for small models."""
    logits = hidden @ unembedding.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return row_logprobs_and_entropy(logits / temperature, targets)


def row_logprobs_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p[target] and entropy of softmax(logits): (..., V), (...) -> two tensors (...).

    log Z - E[logit] would cancel, and HAPO steers by log H. Relative to the likeliest id every
    z <= 0; with s, the sum of e^z over the *others*, H = log1p(s) + sum p (-z): no negative term.
    """
    with torch.autocast(logits.device.type, enabled=False):
        top = logits.argmax(-1, keepdim=True)
        z = (logits - logits.gather(-1, top)).clamp_min(NEVER)
        others = z.exp().scatter(-1, top, 0.0)
        s = others.sum(-1)
        log_z = torch.log1p(s) + z.gather(-1, top).squeeze(-1)  # + 0, or NaN that must show
        entropy = log_z - (others * z).sum(-1) / (1 + s)
        return z.gather(-1, targets[..., None]).squeeze(-1) - log_z, entropy


# -------------------------------------------------------------------------------------- advantages


def grpo_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """GRPO: A[b] = (R[b] - mean_group) / (std_group + 1e-6), sample standard deviation (n - 1).
    (B,) -> (B,), 0 in a group of one and where a group's rewards are all equal."""
    groups = split_groups(rewards, group_size)
    if group_size == 1:
        return torch.zeros_like(rewards)
    centred = groups - groups.mean(1, keepdim=True)
    advantages = centred / (groups.std(1, keepdim=True) + 1e-6)
    # rounding of the mean must not turn "all equal" into noise divided by 1e-6
    alive = groups.amax(1, keepdim=True) > groups.amin(1, keepdim=True)
    return torch.where(alive, advantages, 0.0).view(-1)


def rloo_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """RLOO: A[b] = R[b] - mean of the group's other rewards. (B,) -> (B,); a group of one gets 0.

    The baseline of an answer does not contain the answer, so it is unbiased.
    """
    groups = split_groups(rewards, group_size)
    if group_size == 1:
        return torch.zeros_like(rewards)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    alive = groups.amax(1, keepdim=True) > groups.amin(1, keepdim=True)
    return torch.where(alive, groups - others, 0.0).view(-1)


# --advantage NAME: a new rule is one function (rewards, group_size) -> (B,) and one entry here
GROUP_RULES = {"grpo": grpo_advantages, "rloo": rloo_advantages}


def split_groups(rewards: Tensor, group_size: int) -> Tensor:
    """(B,) -> (B / G, G); refuses a batch that is not made of whole groups."""
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} responses: not a multiple of the group size {group_size}")
    return rewards.view(-1, group_size)


# -------------------------------------------------------------------------------- surrogate and KL


def likelihood_ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """r = exp(logp - old_logp), its exponent within +-20; beyond that there is no gradient."""
    return torch.exp((logp - old_logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate, as a loss:  -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).
    All (B, T), bounds too or numbers. Dual clip c > 1: a token with A < 0 costs at most -c A."""
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be larger than 1, not {dual_clip}")
    like = dict(dtype=ratio.dtype, device=ratio.device)
    low, high = (torch.as_tensor(c, **like) for c in (clip_low, clip_high))
    clipped = torch.clamp(ratio, 1 - low, 1 + high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss


def truncated_weight(logp: Tensor, sampler_logp: Tensor, most: float = 2.0) -> Tensor:
    """min(p / p_sampler, most) a token, detached: truncated importance sampling (Yao et al. 2025),
    for answers from a sampler that is not quite the policy."""
    return likelihood_ratio(logp, sampler_logp).detach().clamp_max(most)


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k3 estimate of KL(policy || reference) a token: exp(d) - d - 1 >= 0, d = ref_logp - logp."""
    d = (ref_logp - logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.exp(d) - d - 1


# ------------------------------------------------------------------------------ three ways to mean
# The normaliser belongs to the whole optimiser batch. When that batch is cut into micro-batches the
# caller passes the whole batch's number, and the parts add up to the same loss and gradient.


def masked_mean(values: Tensor, mask: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
    """Token mean (DAPO): sum over valid tokens / their number (or `normalizer`). (B, T) -> ()."""
    count = mask.sum() if normalizer is None else normalizer
    return _masked(values, mask).sum() / _at_least_one(count)


def sequence_mean(values: Tensor, mask: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
    """Sequence mean (GRPO): each response's mean over its tokens, then the mean over responses.

    Or / `normalizer`. A response without a valid token adds 0 and still counts as a response.
    """
    per_response = _masked(values, mask).sum(1) / mask.sum(1).clamp_min(1)
    return per_response.sum() / _at_least_one(len(values) if normalizer is None else normalizer)


def fixed_length_mean(
    values: Tensor, mask: Tensor, length: int, normalizer: float | Tensor | None = None
) -> Tensor:
    """Dr. GRPO: each response's sum / a constant `length`, then the mean over responses."""
    responses = _at_least_one(len(values) if normalizer is None else normalizer)
    return _masked(values, mask).sum() / (length * responses)


def _masked(values, mask):
    return torch.where(mask.bool(), values, 0.0)  # a product would let a NaN in the padding survive


def _at_least_one(count):
    return count.clamp_min(1) if torch.is_tensor(count) else max(count, 1)


# -------------------------------------------------------------------- rewards and comparison arms


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment: 0 up to max_length - buffer, then linear to -1 at the cap.

    Added to the reward. lengths (B,) in tokens; returns (B,).
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"the overlong buffer must lie in 1..{max_length}, not {buffer}")
    return ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0)


def forking_token_mask(
    entropy: Tensor, mask: Tensor, share: float = 0.2, pool: Tensor | None = None
) -> Tensor:
    """Forking tokens (Wang et al. 2025, 2506.01939): keep the `share` of highest entropy.

    entropy, mask (B, T); returns a mask (B, T), of the dtype of `mask`, to be multiplied with the
    advantages: the paper divides by the number of *all* tokens. Ties at the threshold are all
    kept. It is that of the entropies `pool` (n,), of all processes for example; default the valid
    tokens.
    """
    valid = entropy[mask.bool()] if pool is None else pool
    if not valid.numel():
        return mask
    keep = max(1, round(share * valid.numel()))
    threshold = valid.sort(descending=True).values[keep - 1]
    return mask * (entropy >= threshold).to(mask.dtype)


def archer_bounds(
    entropy: Tensor,
    mask: Tensor,
    quantile: float = 0.8,
    clip_high_entropy: float = 0.5,
    clip_low_entropy: float = 0.2,
) -> Tensor:
    """Archer (Wang et al. 2025, 2507.15778): two classes of tokens, each with its own clip range.

    Tokens above the entropy quantile of their own response (nearest rank) may move by
    `clip_high_entropy`, the others by `clip_low_entropy`. (B, T) -> (B, T). Its other half, a
    KL term on the low-entropy tokens alone, is left out.
    """
    mask = mask.bool()
    ordered = torch.where(mask, entropy, torch.inf).sort(1).values
    rank = (quantile * (mask.sum(1, keepdim=True) - 1)).round().long().clamp_min(0)
    high = entropy > ordered.gather(1, rank)
    return torch.where(high, clip_high_entropy, clip_low_entropy).to(entropy.dtype)


def entropy_advantage(
    advantages: Tensor, entropy: Tensor, alpha: float = 0.4, kappa: float = 2.0
) -> Tensor:
    """Entropy advantage (Cheng et al. 2025, 2506.14758): A + min(alpha H, |A| / kappa), H detached.

    The bonus is at most |A| / kappa, so with kappa > 1 it cannot turn the sign of an advantage.
    """
    return advantages + torch.minimum(alpha * entropy.detach(), advantages.abs() / kappa)


def edge_advantages(
    advantages: Tensor, sequence_entropy: Tensor, group_size: int, most: float = 10.0
) -> Tensor:
    """EDGE-GRPO (Zhang et al. 2025, 2507.21848): A[b] / (H[b] / mean_group H).

    advantages (B,); sequence_entropy (B,), the mean token entropy of each response; returns (B,).
    A sure and right answer counts more, a sure and wrong one hurts more; at most `most` times as
    much, a bound of ours: near entropy 0 the quotient has none.
    """
    entropy = split_groups(sequence_entropy.detach(), group_size)
    weight = entropy.mean(1, keepdim=True) / entropy.clamp_min(torch.finfo(entropy.dtype).tiny)
    return advantages * weight.clamp_max(most).view(-1)
