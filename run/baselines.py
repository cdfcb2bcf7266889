"""Define the baselines that the two papers are compared with, and controls.

A default run uses none of them. Each option has its functions:

    advantages       forking, entropy-advantage, edge, quantile     change_advantages
    ratio or bounds  archer, dppo, cispo, gspo                      policy_loss
    temperature      two                                            two_temperatures
    BuPO             freeze, one-layer, layer-lr                    set_trainable_weights

To add a baseline, write a function, add an `if` next to the others of its kind, and add a choice to
--baseline (or --bupo-baseline) in run/options.py.
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
    """Return a baseline's advantages, (B, T), from GRPO's or RLOO's `advantages`, (B, T)."""
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
    """Return 1 for forking tokens (Wang et al. 2025, 2506.01939), 0 for the others, (B, T).

    Forking tokens are the fifth with the highest entropy. Only they have an advantage; the other
    tokens still count in the loss's denominator.
    """
    entropy = of_equal_contexts(batch.full.entropy, batch.rollout.tokens, batch.rollout.group_size)
    pool = run.dist.gather(entropy[batch.loss_mask])
    return forking_token_mask(entropy, batch.loss_mask, pool=pool)


def forking_token_mask(entropy, mask, share=0.2, pool=None):
    """Return a mask of the `share` of tokens with the highest entropy; (B, T) -> (B, T).

    The result has mask's dtype. All ties at the threshold are kept. The threshold is a quantile of
    the entropies `pool` (n,), for example those of all processes; default: of the valid tokens.
    """
    valid = entropy[mask.bool()] if pool is None else pool
    if not valid.numel():
        return mask
    keep = max(1, round(share * valid.numel()))
    threshold = valid.sort(descending=True).values[keep - 1]
    return mask * (entropy >= threshold).to(mask.dtype)


def of_equal_contexts(entropy, tokens, group_size):
    """Return entropies, (B, T), that are equal wherever the context of two tokens is equal.

    If responses of a group begin with the same tokens, their entropies there differ only by
    rounding, and a threshold might fall between them. So all get those of the first such response.
    """
    groups = tokens.view(-1, group_size, tokens.shape[1])
    same = (groups[:, :, None] == groups[:, None]).cumprod(-1, dtype=torch.uint8)  # (P, G, G, T)
    before = torch.nn.functional.pad(same[..., :-1], (1, 0), value=1)
    first = before.argmax(2)  # the first response with the same earlier tokens
    return entropy.view_as(groups).gather(1, first).view_as(entropy)


def entropy_advantage(advantages, entropy, alpha=0.4, kappa=2.0):
    """Return entropy advantages A + min(alpha H, |A| / kappa) (Cheng et al. 2025, 2506.14758).

    All (B, T). H is detached. With kappa > 1 the bonus cannot change a sign.
    """
    return advantages + torch.minimum(alpha * entropy.detach(), advantages.abs() / kappa)


def edge_weight(sequence_entropy, group_size, largest=10.0):
    """Return EDGE-GRPO's weights mean_group H / H[b], (B,) (Zhang et al. 2025, 2507.21848).

    H[b] is the mean token entropy of a response. A confident correct response gains more, and a
    confident wrong one is penalized more. The bound `largest` is not in the paper: without it, the
    quotient is unbounded near entropy 0.
    """
    entropy = split_groups(sequence_entropy.detach(), group_size)
    weight = entropy.mean(1, keepdim=True) / entropy.clamp_min(torch.finfo(entropy.dtype).tiny)
    return weight.clamp_max(largest).view(-1)


def quantile_advantages(rewards, group_size, K=0.4):
    """Return quantile advantages (R[b] - Q_K) / (std_group + 1e-6), (B,) -> (B,).

    The source is Wu et al. 2025, 2509.22611. Q_K is the K-quantile of the group's rewards: the
    smallest reward that at least a share K of the rewards does not exceed. Take rewards of 0 and 1
    and a share p of correct responses. If p <= 1 - K, Q_K is 0, and only correct responses have an
    advantage. Otherwise Q_K is 1, and only wrong responses have one.
    """
    groups = split_groups(rewards, group_size)
    rank = max(0, math.ceil(K * group_size) - 1)
    baseline = groups.sort(1).values[:, rank : rank + 1]
    deviation = groups.std(1, keepdim=True)
    advantages = (groups - baseline) / (deviation + 1e-6)
    return torch.where(has_reward_variance(rewards, group_size), advantages.view(-1), 0.0)


# ---------------------------------------------------------------------- ratios and clip bounds


def policy_loss(logp, batch, rows, options):
    """Return a baseline's PolicyLoss, (rows, T), with its own ratio, clip bounds and mean."""
    old_logp, mask = batch.old.logp[rows], batch.loss_mask[rows]
    advantages, loss_mean = batch.advantages[rows], options.loss_mean
    dual_clip = options.dual_clip or None
    if options.baseline == "gspo":
        ratio, low, high, loss_mean = gspo_ratio(logp, old_logp, mask)
    elif options.baseline == "cispo":  # has no bounds, since it never removes a token's gradient
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
    """Return Archer's clip distances, (B, T) (Wang et al. 2025, 2507.15778).

    A token is high-entropy if its entropy is above its response's quantile (nearest rank). Its clip
    distance is `clip_high_entropy`; that of other tokens is `clip_low_entropy`. Archer's KL term on
    the low-entropy tokens is omitted.
    """
    mask = mask.bool()
    ordered = torch.where(mask, entropy, torch.inf).sort(1).values
    rank = (quantile * (mask.sum(1, keepdim=True) - 1)).round().long().clamp_min(0)
    high = entropy > ordered.gather(1, rank)
    return torch.where(high, clip_high_entropy, clip_low_entropy).to(entropy.dtype)


def divergence_bounds(old_logp, delta=0.15):
    """Return DPPO's clip distances delta / p_old, (B, T) (Qi et al. 2026, 2602.04879).

    r <= 1 + delta / p_old means p - p_old <= delta, a bound on the binary total variation. So a
    token's gradient is removed once its probability has moved by delta in the direction of its
    advantage, whatever the ratio. A rare token may become many times as likely, but a token of
    probability 0.9 may lose only a sixth of it. Published settings of delta are 0.1 and 0.2.
    """
    return delta * (-old_logp.detach()).exp()


def cispo_loss(logp, old_logp, advantages, clip_high):
    """Return CISPO's (loss, ratio), (rows, T) each (MiniMax 2025, 2506.13585).

    CISPO bounds the weight of a token's gradient instead of removing the gradient. The loss is
    -sg(min(r, 1 + clip_high)) A log p, where sg stops the gradient. Its gradient is that of
    -sg(min(r, 1 + clip_high) / r) A r.
    """
    ratio = likelihood_ratio(logp, old_logp)
    weight = ratio.clamp_max(1 + clip_high).detach()
    return -weight * advantages * logp, ratio


def gspo_ratio(logp, old_logp, mask, clip_low=3e-4, clip_high=4e-4):
    """Return GSPO's (ratio, clip_low, clip_high, kind of mean) (Zheng et al. 2025, 2507.18071).

    The first three are (B, T). GSPO has one ratio per response. It is the exponential of a mean of
    log-ratios, which varies far less than a single one: with a token ratio's bounds of 0.2 it would
    almost never be clipped. So it has smaller bounds.
    """
    low, high = (torch.full_like(old_logp, bound) for bound in (clip_low, clip_high))
    return sequence_ratio(logp, old_logp, mask), low, high, "sequence"


def sequence_ratio(logp, old_logp, mask):
    """Return the geometric mean of a response's token ratios, at each of its tokens, (B, T).

    It is 1 at padding, and differentiable in every token's logp.
    """
    mask = mask.to(logp.dtype)
    mean = ((logp - old_logp) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
    return torch.where(mask.bool(), likelihood_ratio(mean, 0.0), 1.0)


def truncated_weight(logp, sampler_logp, largest=2.0):
    """Return the weights min(p / p_sampler, largest) of truncated importance sampling, (B, T).

    The source is Yao et al. 2025.
    """
    return likelihood_ratio(logp, sampler_logp).clamp_max(largest)


# ------------------------------------------------------------------------------ trainable weights


def set_trainable_weights(step, run):
    """Freeze weights or scale their learning rate for a step, as BuPO's baselines require.

    This must be called before the step's updates.
    """
    options, policy = run.options, run.engine.policy
    if options.bupo_baseline == "freeze":  # layers 1 ... l, in phase 1, training the full policy
        for p in lower_layers(policy, run.layer):
            p.requires_grad_(not schedules.in_phase_1(step, options))
    elif options.bupo_baseline == "one-layer":  # freeze all but layer l
        for p in all_but_layer(policy, run.layer):
            p.requires_grad_(not schedules.in_phase_1(step, options))
    elif options.bupo_baseline == "layer-lr":  # a tenth for layers above l, in every step
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
    """Return optimizer groups for layer-lr, one per layer.

    The first group, layer 0, holds the parameters outside all layers.
    """
    groups, known = [], set()
    for number, block in enumerate(decoder_body(model).layers, 1):
        groups.append({"params": list(block.parameters()), "layer": number})
        known |= {id(p) for p in block.parameters()}
    rest = [p for p in model.parameters() if id(p) not in known]
    return [{"params": rest, "layer": 0}, *groups]


# --------------------------------------------------------------------------- temperature and reward


def two_temperatures(entropy, stats, base, tau):
    """Return temperatures base (1 + tau) above the pivot and base (1 - tau) below it.

    Any shape. This is simpler than HAPO's mechanism A. Without stats, return base everywhere.
    """
    if stats is None:
        return torch.zeros_like(entropy) + base
    return base * (1 + tau * (log_entropy(entropy) - stats.pivot).sign())


def random_verdicts(step, attempt, run):
    """Return random verdicts, (B,) bool, for the control --reward random.

    A prompt's verdicts do not depend on the number of processes.
    """
    options, generator = run.options, torch.Generator()
    generator.manual_seed(seed_of(options.seed, step, attempt, "coin"))
    shape = (options.prompts_per_step, options.num_generations)
    heads = torch.rand(*shape, generator=generator) < 0.5
    return heads[run.dist.rank :: run.dist.size].flatten().to(run.dist.device)
