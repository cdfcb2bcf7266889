"""Baselines: what the two papers are compared with, and controls. A default run enters none of it.

    advantages       forking, entropy-advantage, edge, quantile     change_advantages
    ratio or bounds  archer, dppo, cispo, gspo                      policy_loss
    temperature      two                                            two_temperatures
    BuPO             freeze, one-layer, layer-lr                    set_trainable_weights

A new baseline is a function, an `if` where the others of its kind stand, and a choice of --baseline
(or --bupo-baseline) in run/options.py.
"""

import math

import torch

from hapo import log_entropy
from internals import decoder_body
from losses import clipped_surrogate, has_reward_variance, likelihood_ratio, split_groups
from run import schedules
from run.batch import PolicyLoss
from run.state import seed_of

ADVANTAGE_BASELINES = ("forking", "entropy-advantage", "edge", "quantile")
LOSS_BASELINES = ("archer", "dppo", "cispo", "gspo")

# -------------------------------------------------------------------------------------- advantages


def change_advantages(advantages, batch, run):
    """Return the advantages of a baseline, (B, T), from those of the group rule."""
    options = run.options
    mask = batch.loss_mask & batch.has_reward_variance[:, None]
    if options.baseline == "forking":
        return advantages * forking_mask(batch, run)
    if options.baseline == "entropy-advantage":
        return entropy_advantage(advantages, batch.full.entropy)
    if options.baseline == "edge":
        entropy = (batch.full.entropy * mask).sum(1) / mask.sum(1).clamp_min(1)
        return advantages * edge_weight(entropy, options.num_generations)[:, None]
    if options.baseline == "quantile":
        return quantile_advantages(batch.rewards, options.num_generations)[:, None] * mask
    raise ValueError(f"no such baseline: {options.baseline}")


def forking_mask(batch, run):
    """Forking tokens (Wang et al. 2025, 2506.01939): only the fifth of highest entropy learns.

    The other tokens stay in the mean, as zeros.
    """
    entropy = of_equal_contexts(batch.full.entropy, batch.rollout.tokens, batch.rollout.group_size)
    pool = run.dist.gather(entropy[batch.loss_mask])
    return forking_token_mask(entropy, batch.loss_mask, pool=pool)


def forking_token_mask(entropy, mask, share=0.2, pool=None):
    """Return the `share` of tokens of highest entropy; (B, T) -> (B, T), of mask's dtype.

    Ties at the threshold are all kept. The threshold is that of the entropies `pool` (n,), of all
    processes for example; default the valid tokens.
    """
    valid = entropy[mask.bool()] if pool is None else pool
    if not valid.numel():
        return mask
    keep = max(1, round(share * valid.numel()))
    threshold = valid.sort(descending=True).values[keep - 1]
    return mask * (entropy >= threshold).to(mask.dtype)


def of_equal_contexts(entropy, tokens, group_size):
    """Return entropies (B, T) in which tokens of a group after the same text have the same one.

    It is that of the first such response. They differ by rounding alone, and a threshold may fall
    between them.
    """
    groups = tokens.view(-1, group_size, tokens.shape[1])
    same = (groups[:, :, None] == groups[:, None]).cumprod(-1, dtype=torch.uint8)  # (P, G, G, T)
    before = torch.nn.functional.pad(same[..., :-1], (1, 0), value=1)
    first = before.argmax(2)  # among equal values, the first
    return entropy.view_as(groups).gather(1, first).view_as(entropy)


def entropy_advantage(advantages, entropy, alpha=0.4, kappa=2.0):
    """Entropy advantage (Cheng et al. 2025, 2506.14758): A + min(alpha H, |A| / kappa), (B, T).

    H is detached. With kappa > 1 the bonus cannot change a sign.
    """
    return advantages + torch.minimum(alpha * entropy.detach(), advantages.abs() / kappa)


def edge_weight(sequence_entropy, group_size, largest=10.0):
    """EDGE-GRPO (Zhang et al. 2025, 2507.21848): mean_group H / H[b], (B,) -> (B,).

    H[b] is the mean token entropy of a response. A confident correct response counts more, a
    confident wrong one is penalized more. At most `largest` times as much: a bound of ours, since
    the quotient has none near entropy 0.
    """
    entropy = split_groups(sequence_entropy.detach(), group_size)
    weight = entropy.mean(1, keepdim=True) / entropy.clamp_min(torch.finfo(entropy.dtype).tiny)
    return weight.clamp_max(largest).view(-1)


def quantile_advantages(rewards, group_size, K=0.4):
    """Quantile advantages (Wu et al. 2025, 2509.22611): (R[b] - Q_K) / (std_group + 1e-6).

    Q_K is the group's K-quantile: the smallest reward that at least a share K does not exceed. With
    rewards of 0 and 1 and a share p of correct responses, Q is 0 where p <= 1 - K, and only the
    correct ones learn; else it is 1, and only the wrong ones do. (B,) -> (B,).
    """
    groups = split_groups(rewards, group_size)
    rank = max(0, math.ceil(K * group_size) - 1)
    baseline = groups.sort(1).values[:, rank : rank + 1]
    deviation = groups.std(1, keepdim=True)
    advantages = (groups - baseline) / (deviation + 1e-6)
    return torch.where(has_reward_variance(rewards, group_size), advantages.view(-1), 0.0)


# ---------------------------------------------------------------------------- ratio and its bounds


def policy_loss(logp, batch, rows, options):
    """Return a baseline's PolicyLoss: its ratio, the bounds and the mean that belong to it."""
    old_logp, mask = batch.old.logp[rows], batch.loss_mask[rows]
    advantages, loss_mean = batch.advantages[rows], options.loss_mean
    dual_clip = options.dual_clip or None
    if options.baseline == "gspo":
        ratio, low, high, loss_mean = gspo_ratio(logp, old_logp, mask)
    elif options.baseline == "cispo":  # no token's gradient is ever cut off: no bounds
        low = high = torch.full_like(old_logp, torch.inf)
        loss, ratio = cispo_loss(logp, old_logp, advantages, options.clip_high)
        return PolicyLoss(loss, ratio, low, high, advantages, loss_mean)
    else:
        ratio = likelihood_ratio(logp, old_logp)
        if options.baseline == "archer":
            low = high = archer_bounds(batch.full.entropy[rows], mask)
        else:  # dppo
            low = high = divergence_bounds(old_logp)
    loss = clipped_surrogate(ratio, advantages, low, high, dual_clip)
    return PolicyLoss(loss, ratio, low, high, advantages, loss_mean)


def archer_bounds(entropy, mask, quantile=0.8, clip_high_entropy=0.5, clip_low_entropy=0.2):
    """Archer (Wang et al. 2025, 2507.15778): two classes of tokens, each with a clip range, (B, T).

    A token is high-entropy if it lies above the entropy quantile (nearest rank) of its response.
    Its clip range is `clip_high_entropy`; that of the others is `clip_low_entropy`. Archer's KL
    term on the low-entropy tokens is omitted.
    """
    mask = mask.bool()
    ordered = torch.where(mask, entropy, torch.inf).sort(1).values
    rank = (quantile * (mask.sum(1, keepdim=True) - 1)).round().long().clamp_min(0)
    high = entropy > ordered.gather(1, rank)
    return torch.where(high, clip_high_entropy, clip_low_entropy).to(entropy.dtype)


def divergence_bounds(old_logp, delta=0.15):
    """DPPO's trust region (Qi et al. 2026, 2602.04879): clip distances delta / p_old, (B, T).

    r <= 1 + delta / p_old is p - p_old <= delta, binary total variation. A token's update stops
    where its probability has already moved by delta in the direction that the advantage asks for,
    whatever the ratio. A rare token may become many times as likely; a likely one may not lose a
    quarter of itself. Public settings of delta are 0.1 and 0.2.
    """
    return delta * (-old_logp.detach()).exp()


def cispo_loss(logp, old_logp, advantages, clip_high):
    """CISPO (MiniMax 2025, 2506.13585): the weight of a gradient is bounded, none is cut off.

    loss = -sg(min(r, 1 + clip_high)) A log p, whose gradient is that of -sg(min(r, ...) / r) A r.
    Return (loss, ratio).
    """
    ratio = likelihood_ratio(logp, old_logp)
    weight = ratio.clamp_max(1 + clip_high).detach()
    return -weight * advantages * logp, ratio


def gspo_ratio(logp, old_logp, mask, clip_low=3e-4, clip_high=4e-4):
    """GSPO (Zheng et al. 2025, 2507.18071): one ratio per response, with its own clip bounds.

    A mean of log-ratios moves far less than one of them: with the token ratio's bounds of 0.2 it
    would almost never be clipped. Return (ratio, clip_low, clip_high, kind of mean), the first
    three (B, T).
    """
    low, high = (torch.full_like(old_logp, bound) for bound in (clip_low, clip_high))
    return sequence_ratio(logp, old_logp, mask), low, high, "sequence"


def sequence_ratio(logp, old_logp, mask):
    """Return s = (prod of r over a response's tokens)^(1 / their number) for each of its tokens.

    1 at padding. (B, T) -> (B, T), differentiable in every token's logp.
    """
    mask = mask.to(logp.dtype)
    mean = ((logp - old_logp) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
    return torch.where(mask.bool(), likelihood_ratio(mean, 0.0), 1.0)


def truncated_weight(logp, sampler_logp, largest=2.0):
    """Truncated importance sampling (Yao et al. 2025): min(p / p_sampler, largest) per token."""
    return likelihood_ratio(logp, sampler_logp).clamp_max(largest)


# ------------------------------------------------------------------------------ trainable weights


def set_trainable_weights(step, run):
    """BuPO's baselines: say before a step's updates which weights may move, and how fast."""
    options, policy = run.options, run.engine.policy
    if options.bupo_baseline == "freeze":  # layers 1 ... l, while the full policy trains
        for p in lower_layers(policy, run.layer):
            p.requires_grad_(not schedules.in_phase_1(step, options))
    elif options.bupo_baseline == "one-layer":  # everything but layer l
        for p in all_but_layer(policy, run.layer):
            p.requires_grad_(not schedules.in_phase_1(step, options))
    elif options.bupo_baseline == "layer-lr":  # layers above l, from the first step to the last
        for group in run.engine.optimizer.param_groups:
            if group["layer"] > run.layer:
                group["peak_lr"] = options.lr * 0.1
    if options.bupo_norm:  # phase 1 applies the final norm and leaves its weights unchanged
        full_policy = schedules.target_layer(step, options, run.layer) is None
        decoder_body(policy).norm.requires_grad_(full_policy)


def lower_layers(model, layer):
    """Return the parameters of layers 1 ... layer."""
    return [p for block in decoder_body(model).layers[:layer] for p in block.parameters()]


def all_but_layer(model, layer):
    """Return every parameter outside layer `layer`."""
    inside = {id(p) for p in decoder_body(model).layers[layer - 1].parameters()}
    return [p for p in model.parameters() if id(p) not in inside]


def groups_by_layer(model):
    """Return optimizer groups for layer-lr: first what belongs to no layer, as 0, then by layer."""
    groups, known = [], set()
    for number, block in enumerate(decoder_body(model).layers, 1):
        groups.append({"params": list(block.parameters()), "layer": number})
        known |= {id(p) for p in block.parameters()}
    rest = [p for p in model.parameters() if id(p) not in known]
    return [{"params": rest, "layer": 0}, *groups]


# --------------------------------------------------------------------------- temperature and reward


def two_temperatures(entropy, stats, base, tau):
    """Return base (1 + tau) above the pivot, base (1 - tau) below: simpler than HAPO's A."""
    if stats is None:
        return torch.zeros_like(entropy) + base
    return base * (1 + tau * (log_entropy(entropy) - stats.pivot).sign())


def random_verdicts(step, attempt, run):
    """Return verdicts by chance, (B,), for --reward random, a control.

    They are the same over any number of processes.
    """
    options, generator = run.options, torch.Generator()
    generator.manual_seed(seed_of(options.seed, step, attempt, "coin"))
    shape = (options.prompts_per_step, options.num_generations)
    heads = torch.rand(*shape, generator=generator) < 0.5
    return heads[run.dist.rank :: run.dist.size].flatten().to(run.dist.device)
