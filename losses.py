"""The mathematics both papers build on: token log-probabilities, advantages, the clipped surrogate, its means.

Tensors in, tensors out. Nothing here knows a model, a tokenizer or an optimiser, nothing changes an input, and this
module imports nothing else of the project.

Shapes    B responses (the G answers to one prompt are adjacent rows), T response positions (right-padded),
          V vocabulary, D hidden size, N any number of tokens.
Mask      (B, T), 1 at every token of a response, its end-of-sequence token included, 0 at padding.
Units     log-probabilities are natural logarithms, entropies are in nats.

Sources   GRPO (Shao et al. 2024, arXiv 2402.03300), DAPO (Yu et al. 2025, 2503.14476), Dr. GRPO (Liu et al. 2025,
          2503.20783), dual clip (Ye et al. 2020, 1912.09729), k3 (Schulman 2020, "Approximating KL divergence").
"""

import torch

LOGIT_CHUNK_BYTES = 2**27  # 128 MiB of float32 logits at a time, unless the caller names a number of tokens


# ------------------------------------------------------------------ log-probability and entropy of the taken tokens


def token_logprobs_and_entropy(hidden, unembedding, targets, temperature=1.0, chunk_tokens=None):
    """Log-probability of each target and entropy of the whole distribution, without ever holding all the logits.

        p = softmax(hidden @ unembedding.T / temperature)
        logp = log p[target],   entropy = -sum_v p_v log p_v

    hidden (..., D), unembedding (V, D), targets (...) integer; returns two tensors (...) in float32 (float64 for
    float64 input). The logits exist for `chunk_tokens` tokens at a time and are computed again in the backward pass,
    so peak memory is chunk x V and not N x V; both outputs have their exact gradient with respect to `hidden` and
    `unembedding`. Cut a padded vocabulary with `unembedding[:len(tokenizer)]`: the missing ids then have probability 0.
    Under autocast the products run in its dtype, everything after them in float32.
    """
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets {tuple(targets.shape)} must have the shape of hidden without its last axis {tuple(hidden.shape)}")
    if chunk_tokens is None:
        chunk_tokens = max(1, LOGIT_CHUNK_BYTES // (4 * unembedding.shape[0]))
    if torch.is_autocast_enabled(hidden.device.type):
        compute = torch.get_autocast_dtype(hidden.device.type)
        hidden, unembedding = hidden.to(compute), unembedding.to(compute)
    flat = hidden.reshape(-1, hidden.shape[-1])
    logp, entropy = _ChunkedLogProb.apply(flat, unembedding, targets.reshape(-1), float(temperature), chunk_tokens)
    return logp.view(targets.shape), entropy.view(targets.shape)


class _ChunkedLogProb(torch.autograd.Function):
    """Saves hidden, weights and one number a token; the backward recomputes each chunk of logits."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logp = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        entropy, logsumexp = torch.empty_like(logp), torch.empty_like(logp)
        for i in range(0, len(hidden), chunk):
            rows = slice(i, i + chunk)
            logits = _logits(hidden[rows], weight, temperature, dtype)
            lse = logits.logsumexp(-1)
            logp[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1) - lse
            # H = log Z - E[logit]
            probs = (logits - lse[:, None]).exp_()
            # a logit of -inf has probability 0 and adds nothing to the mean: keep 0 * -inf out of it
            entropy[rows] = lse - torch.linalg.vecdot(probs, logits.clamp_min_(torch.finfo(dtype).min))
            logsumexp[rows] = lse
        ctx.save_for_backward(hidden, weight, targets, logsumexp, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)  # an output the loss does not use arrives as None in the backward
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, targets, logsumexp, entropy = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dtype = logsumexp.dtype
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if need_weight else None
        if grad_logp is None:
            grad_logp = torch.zeros_like(logsumexp)
        for i in range(0, len(hidden), ctx.chunk):
            rows = slice(i, i + ctx.chunk)
            log_probs = _logits(hidden[rows], weight, ctx.temperature, dtype).sub_(logsumexp[rows, None])
            # d logp / d logits = onehot - p        d H / d logits = -p (log p + H)
            if grad_entropy is not None:
                scale = (log_probs.clamp_min(torch.finfo(dtype).min) + entropy[rows, None]).mul_(-grad_entropy[rows, None])
                scale.sub_(grad_logp[rows, None])
                grad_logits = log_probs.exp_().mul_(scale)
            else:
                grad_logits = log_probs.exp_().mul_(-grad_logp[rows, None])
            grad_logits.scatter_add_(-1, targets[rows, None], grad_logp[rows, None])
            if ctx.temperature != 1.0:
                grad_logits.div_(ctx.temperature)
            grad_logits = grad_logits.to(hidden.dtype)
            if need_hidden:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if need_weight:
                if dtype == hidden.dtype:
                    grad_weight.addmm_(grad_logits.T, hidden[rows])
                else:  # low-precision products, summed over the chunks in float32
                    grad_weight += grad_logits.T @ hidden[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _logits(hidden, weight, temperature, dtype):
    logits = (hidden @ weight.T).to(dtype)
    return logits if temperature == 1.0 else logits.div_(temperature)


# ------------------------------------------------------------------------------------------------------ advantages


def grpo_advantages(rewards, group_size):
    """GRPO: A[b] = (R[b] - mean_group) / (std_group + 1e-6), sample standard deviation (n - 1).

    rewards (B,), B a multiple of group_size; returns (B,). A group of one, or one whose rewards are all equal, gets 0.
    """
    groups = split_groups(rewards, group_size)
    if group_size == 1:
        return torch.zeros_like(rewards)
    centred = groups - groups.mean(1, keepdim=True)
    advantages = centred / (groups.std(1, keepdim=True) + 1e-6)
    # rounding of the mean must not turn "all equal" into noise divided by 1e-6
    alive = groups.amax(1, keepdim=True) > groups.amin(1, keepdim=True)
    return torch.where(alive, advantages, 0.0).view(-1)


def split_groups(rewards, group_size):
    """(B,) -> (B / G, G); refuses a batch that is not made of whole groups."""
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} responses are not a multiple of the group size {group_size}")
    return rewards.view(-1, group_size)


# ------------------------------------------------------------------------------------------------- surrogate and KL


def clipped_surrogate(ratio, advantages, clip_low, clip_high, dual_clip=None):
    """PPO's clipped surrogate as a loss, one value a token:  -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    ratio, advantages (B, T); the bounds are numbers or (B, T) tensors of distances from 1. With dual clip c > 1 a token
    with A < 0 costs at most -c A, so one wild ratio cannot dominate a batch. Gradient flows through ratio alone.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be larger than 1, not {dual_clip}")
    low, high = (torch.as_tensor(x, dtype=ratio.dtype, device=ratio.device) for x in (clip_low, clip_high))
    clipped = torch.clamp(ratio, 1 - low, 1 + high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss


def kl_k3(logp, ref_logp):
    """k3 estimate of KL(policy || reference), one value a token, never negative: exp(d) - d - 1, d = ref_logp - logp."""
    d = ref_logp - logp
    return torch.exp(d) - d - 1


# ------------------------------------------------------------------------------------------------- three ways to mean
# The normaliser belongs to the whole optimiser batch. When that batch is cut into micro-batches the caller passes the
# whole batch's number, and the parts then add up to the same loss and the same gradient, however it is cut.


def masked_mean(values, mask, normalizer=None):
    """Token mean (DAPO): sum over valid tokens / number of valid tokens (or `normalizer`). (B, T) -> scalar."""
    count = mask.sum() if normalizer is None else normalizer
    return _masked(values, mask).sum() / _at_least_one(count)


def sequence_mean(values, mask, normalizer=None):
    """Sequence mean (GRPO): each response's mean over its tokens, then the mean over responses (or / `normalizer`).

    A response without a valid token adds 0 and still counts as a response.
    """
    per_response = _masked(values, mask).sum(1) / mask.sum(1).clamp_min(1)
    return per_response.sum() / _at_least_one(len(values) if normalizer is None else normalizer)


def fixed_length_mean(values, mask, length, normalizer=None):
    """Dr. GRPO: each response's sum / a constant `length`, then the mean over responses (or / `normalizer`)."""
    return _masked(values, mask).sum() / (length * _at_least_one(len(values) if normalizer is None else normalizer))


def _masked(values, mask):
    return torch.where(mask.bool(), values, 0.0)  # not a product: a NaN in the padding must not survive it


def _at_least_one(count):
    return count.clamp_min(1) if torch.is_tensor(count) else max(count, 1)


# ------------------------------------------------------------------------------------- rewards and comparison arms


def overlong_penalty(lengths, max_length, buffer):
    """DAPO's soft overlong punishment, added to the reward: 0 up to max_length - buffer, then linear to -1 at max_length.

    lengths (B,) in tokens; returns (B,).
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"the overlong buffer must lie in 1..{max_length}, not {buffer}")
    return ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0)


def forking_token_mask(entropy, mask, share=0.2, pool=None):
    """Forking tokens (Wang et al. 2025, 2506.01939): keep the `share` of valid tokens whose entropy is highest.

    entropy, mask (B, T); returns a mask (B, T), of the dtype of `mask`. Ties at the threshold are all kept. The threshold is
    that of the entropies `pool` (n,), of all processes for example; default the valid tokens.
    """
    valid = entropy[mask.bool()] if pool is None else pool
    if not valid.numel():
        return mask
    keep = max(1, round(share * valid.numel()))
    threshold = valid.sort(descending=True).values[keep - 1]
    return mask * (entropy >= threshold).to(mask.dtype)


def archer_bounds(entropy, mask, quantile=0.8, clip_high_entropy=0.5, clip_low_entropy=0.2, pool=None):
    """Archer (Wang et al. 2025, 2507.15778): two classes of tokens, each with its own clip range.

    Tokens above the entropy quantile may move by `clip_high_entropy`, the others by `clip_low_entropy`. (B, T) -> (B, T).
    The quantile (nearest rank) is that of the entropies `pool` (n,); default the valid tokens.
    """
    valid = (entropy[mask.bool()] if pool is None else pool).sort().values
    threshold = valid[round(quantile * (len(valid) - 1))] if len(valid) else torch.inf
    return torch.where(entropy > threshold, clip_high_entropy, clip_low_entropy).to(entropy.dtype)


def entropy_advantage(advantages, entropy, alpha=0.4, kappa=2.0):
    """Entropy advantage (Cheng et al. 2025, 2506.14758): A + min(alpha H, |A| / kappa), H detached.

    The bonus is never larger than |A| / kappa, so with kappa > 1 it cannot turn the sign of an advantage.
    """
    return advantages + torch.minimum(alpha * entropy.detach(), advantages.abs() / kappa)


def edge_advantages(advantages, sequence_entropy, group_size):
    """EDGE-GRPO (Zhang et al. 2025, 2507.21848): A[b] / (H[b] / mean_group H); H the mean token entropy of response b.

    advantages, sequence_entropy (B,); returns (B,). A sure and right answer counts more, a sure and wrong one hurts more.
    """
    entropy = split_groups(sequence_entropy.detach(), group_size)
    normalised = entropy / entropy.mean(1, keepdim=True).clamp_min(1e-6)
    return advantages / normalised.clamp_min(1e-6).view(-1)
