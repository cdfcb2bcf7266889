"""What is only here to be compared with: other uses of entropy, other ways to train a lower layer
first, a reward that nothing can be learned from. A run without them enters nothing of this file.

A new arm is one function and one entry in the dictionary of its kind:

    ARMS          (batch, run): changes a scored batch's advantages or clip range (--comparison)
    LOSSES        (logp, batch, rows, run) -> (loss, ratio, advantage), each (rows, T), in place of
                  train.policy_loss (--comparison, too)
    MOVERS        (step, run): says before a step's updates what may move (--bupo-arm)
    TEMPERATURES  (entropy, stats, base, tau) -> temperatures (--temperature-form)
"""

import math

import torch

import bupo
from hapo import log_entropy
from internals import decoder_body
from losses import clipped_surrogate, differ, likelihood_ratio, split_groups
from run.state import seed_of

# ------------------------------------------------------------------------------ what entropy steers


def forking(batch, run):
    """Forking tokens (Wang et al. 2025, 2506.01939): only the fifth of highest entropy learns. The
    others' tokens stay in the mean, as zeros."""
    entropy = of_equal_contexts(batch.entropy, batch.rollout.tokens, batch.rollout.group_size)
    pool = run.ranks.gather(entropy[batch.loss_mask])
    keeps = forking_token_mask(entropy, batch.loss_mask, pool=pool)
    batch.advantages = batch.advantages * keeps


def archer(batch, run):
    """Archer (Wang et al. 2025, 2507.15778): two classes of tokens, each with a clip range."""
    batch.clip_low = batch.clip_high = archer_bounds(batch.entropy, batch.loss_mask)


def entropy_bonus(batch, run):
    """Entropy advantage (Cheng et al. 2025, 2506.14758)."""
    batch.advantages = entropy_advantage(batch.advantages, batch.entropy)


def edge(batch, run):
    """EDGE-GRPO (Zhang et al. 2025, 2507.21848): the mean entropy of an answer weighs it."""
    mask = batch.loss_mask & batch.live[:, None]
    entropy = (batch.entropy * mask).sum(1) / mask.sum(1).clamp_min(1)
    weight = edge_weight(entropy, run.options.answers_per_prompt)
    batch.advantages = batch.advantages * weight[:, None]


def dppo(batch, run):
    """DPPO's trust region (Qi et al. 2026, 2602.04879; binary total variation)."""
    batch.clip_low = batch.clip_high = divergence_bounds(batch.old_logp)


def no_bounds(batch, run):
    """CISPO cuts no token off."""
    batch.clip_low = batch.clip_high = torch.full_like(batch.old_logp, torch.inf)


def sequence_bounds(batch, run):
    """GSPO's, of its ratio of a whole answer: the paper's."""
    batch.clip_low, batch.clip_high = (torch.full_like(batch.old_logp, x) for x in (3e-4, 4e-4))


def quantile(batch, run):
    """Quantile advantages (Wu et al. 2025, 2509.22611): another baseline than the mean."""
    mask = batch.loss_mask & batch.live[:, None]
    advantages = quantile_advantages(batch.rewards, run.options.answers_per_prompt)
    batch.advantages = advantages[:, None] * mask


def corrected_sampler(batch, run):
    """--sampler-correction: answers from a sampler that is not quite the policy."""
    batch.weight = truncated_weight(batch.old_logp, batch.rollout.logp)


ARMS = {
    "forking": forking,
    "archer": archer,
    "entropy-advantage": entropy_bonus,
    "edge": edge,
    "dppo": dppo,
    "cispo": no_bounds,
    "gspo": sequence_bounds,
    "quantile": quantile,
}


def forking_token_mask(entropy, mask, share=0.2, pool=None):
    """The `share` of tokens of highest entropy; entropy, mask (B, T) -> (B, T), of mask's dtype.

    Ties at the threshold are all kept. It is that of the entropies `pool` (n,), of all processes
    for example; default the valid tokens.
    """
    valid = entropy[mask.bool()] if pool is None else pool
    if not valid.numel():
        return mask
    keep = max(1, round(share * valid.numel()))
    threshold = valid.sort(descending=True).values[keep - 1]
    return mask * (entropy >= threshold).to(mask.dtype)


def of_equal_contexts(entropy, tokens, group_size):
    """Entropies (B, T) in which tokens of a group behind the same text have the same: that of the
    first. Theirs differ by rounding alone, and a threshold may fall between them."""
    groups = tokens.view(-1, group_size, tokens.shape[1])
    same = (groups[:, :, None] == groups[:, None]).cumprod(-1, dtype=torch.uint8)  # (P, G, G, T)
    before = torch.nn.functional.pad(same[..., :-1], (1, 0), value=1)
    first = before.argmax(2)  # of equals, the first
    return entropy.view_as(groups).gather(1, first).view_as(entropy)


def archer_bounds(entropy, mask, quantile=0.8, clip_high_entropy=0.5, clip_low_entropy=0.2):
    """Tokens above the entropy quantile of their own response (nearest rank) may move by
    `clip_high_entropy`, the others by `clip_low_entropy`. (B, T) -> (B, T). Archer's other half, a
    KL term on the low-entropy tokens alone, is left out."""
    mask = mask.bool()
    ordered = torch.where(mask, entropy, torch.inf).sort(1).values
    rank = (quantile * (mask.sum(1, keepdim=True) - 1)).round().long().clamp_min(0)
    high = entropy > ordered.gather(1, rank)
    return torch.where(high, clip_high_entropy, clip_low_entropy).to(entropy.dtype)


def entropy_advantage(advantages, entropy, alpha=0.4, kappa=2.0):
    """A + min(alpha H, |A| / kappa), H detached; with kappa > 1 it cannot turn a sign. (B, T)."""
    return advantages + torch.minimum(alpha * entropy.detach(), advantages.abs() / kappa)


def edge_weight(sequence_entropy, group_size, largest=10.0):
    """mean_group H / H[b] of the mean token entropies of responses, (B,) -> (B,).

    A sure and right answer counts more, a sure and wrong one hurts more; at most `largest` times
    as much, a bound of ours: near entropy 0 the quotient has none.
    """
    entropy = split_groups(sequence_entropy.detach(), group_size)
    weight = entropy.mean(1, keepdim=True) / entropy.clamp_min(torch.finfo(entropy.dtype).tiny)
    return weight.clamp_max(largest).view(-1)


def divergence_bounds(old_logp, delta=0.15):
    """Clip distances delta / p_old, (B, T): r <= 1 + delta / p_old is p - p_old <= delta.

    A token's update stops where its probability has already moved by delta in the direction that
    the advantage asks for, whatever the ratio: a rare token may become many times as likely, a sure
    one may not lose a quarter of itself. Public settings of delta are 0.1 and 0.2.
    """
    return delta * (-old_logp.detach()).exp()


def quantile_advantages(rewards, group_size, K=0.4):
    """A[b] = (R[b] - Q_K) / (std_group + 1e-6): the group's K-quantile as baseline, the smallest
    reward that at least a share K does not exceed. (B,) -> (B,).

    With rewards of 0 and 1 and a share p of right answers Q is 0 where p <= 1 - K: the right ones
    alone learn; else it is 1, and the wrong ones do.
    """
    groups = split_groups(rewards, group_size)
    rank = max(0, math.ceil(K * group_size) - 1)
    baseline = groups.sort(1).values[:, rank : rank + 1]
    deviation = groups.std(1, keepdim=True)
    advantages = (groups - baseline) / (deviation + 1e-6)
    return torch.where(differ(rewards, group_size), advantages.view(-1), 0.0)


def truncated_weight(logp, sampler_logp, largest=2.0):
    """min(p / p_sampler, largest) a token: truncated importance sampling (Yao et al. 2025)."""
    return likelihood_ratio(logp, sampler_logp).clamp_max(largest)


# ------------------------------------------------------------------------------------ other losses


def cispo(logp, batch, rows, run):
    """CISPO (MiniMax 2025, 2506.13585): no token's gradient is ever cut off; its weight is bounded.

    loss = -sg(min(r, 1 + clip_high)) A log p, whose gradient is that of -sg(min(r, ...) / r) A r.
    """
    ratio = likelihood_ratio(logp, batch.old_logp[rows])
    advantage = batch.advantages[rows]
    weight = ratio.clamp_max(1 + run.options.clip_high).detach()
    return -weight * advantage * logp, ratio, advantage


def gspo(logp, batch, rows, run):
    """GSPO (Zheng et al. 2025, 2507.18071): one ratio an answer, the geometric mean of its tokens',
    clipped by bounds of its own."""
    ratio = sequence_ratio(logp, batch.old_logp[rows], batch.loss_mask[rows])
    advantage = batch.advantages[rows]
    low, high = batch.clip_low[rows], batch.clip_high[rows]
    return clipped_surrogate(ratio, advantage, low, high), ratio, advantage


LOSSES = {"cispo": cispo, "gspo": gspo}


def sequence_ratio(logp, old_logp, mask):
    """s = (prod of r over an answer's tokens)^(1 / their number), the same for each of them, 1 at
    padding. (B, T) -> (B, T), differentiable in every token's logp."""
    mask = mask.to(logp.dtype)
    mean = ((logp - old_logp) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
    return torch.where(mask.bool(), likelihood_ratio(mean, 0.0), 1.0)


# ------------------------------------------------------------------------- which layers move, when


def freeze(step, run):
    """Layers 1 ... l keep still in BuPO's first phase, while the full policy trains."""
    for p in lower_layers(run.policy, run.layer):
        p.requires_grad_(not in_first_phase(step, run))


def one_layer(step, run):
    """Everything but layer l keeps still in the first phase, while the full policy trains."""
    for p in all_but_layer(run.policy, run.layer):
        p.requires_grad_(not in_first_phase(step, run))


def layer_lr(step, run):
    """Layers above l learn at a tenth of the learning rate, from the first step to the last."""
    for group in run.weights.optimizer.param_groups:
        if group["layer"] > run.layer:
            group["peak_lr"] = run.options.lr * 0.1


def final_norm(step, run):
    """--bupo-norm: phase 1 applies the final norm to layer l's policy and leaves it as it is."""
    norm = decoder_body(run.policy).norm  # BuPO 9: an ablation
    norm.requires_grad_(run.schedule(step) is None)


# BuPO 10: the paper's baselines, and one of ours (one-layer)
MOVERS = {"freeze": freeze, "one-layer": one_layer, "layer-lr": layer_lr}


def in_first_phase(step, run):
    return bupo.target_layer(step, run.options.bupo_steps, run.layer) is not None


def lower_layers(model, layer):
    """The parameters of layers 1 ... layer."""
    return [p for block in decoder_body(model).layers[:layer] for p in block.parameters()]


def all_but_layer(model, layer):
    """Every parameter outside layer `layer`."""
    own = {id(p) for p in decoder_body(model).layers[layer - 1].parameters()}
    return [p for p in model.parameters() if id(p) not in own]


def groups_by_layer(model):
    """Optimiser groups for `layer_lr`: what belongs to no layer first, as 0, then one a layer."""
    groups, known = [], set()
    for number, block in enumerate(decoder_body(model).layers, 1):
        groups.append({"params": list(block.parameters()), "layer": number})
        known |= {id(p) for p in block.parameters()}
    rest = [p for p in model.parameters() if id(p) not in known]
    return [{"params": rest, "layer": 0}, *groups]


# --------------------------------------------------------------------------- temperatures, rewards


def two_temperatures(entropy, stats, base, tau):
    """A simple rival of HAPO's A: base (1 + tau) above the pivot, base (1 - tau) below."""
    if stats is None:
        return torch.zeros_like(entropy) + base
    return base * (1 + tau * (log_entropy(entropy) - stats.pivot).sign())


TEMPERATURES = {"two": two_temperatures}


def coin(run):
    """--reward random, a control: verdicts by chance, (B,), the same over any number of
    processes."""

    def verdict(grades, step, attempt):
        o, generator = run.options, torch.Generator()
        generator.manual_seed(seed_of(o.seed, step, attempt, "coin"))
        coins = torch.rand(o.prompts_per_step, o.answers_per_prompt, generator=generator) < 0.5
        return coins[run.ranks.rank :: run.ranks.size].flatten().to(run.ranks.device)

    return verdict
