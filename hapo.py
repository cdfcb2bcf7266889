"""HAPO: token entropy drives sampling, advantages and clipping.

"From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token's Nature", Liu et al.,
arXiv 2509.16591, equation numbers of version 2. Four mechanisms, one function each:

    A  adaptive temperature sampling             Eq. 8       adaptive_temperature
    B  token-level group average                 Eq. 9       token_group_advantages
    C  differential advantage redistribution     Eq. 10-11   redistribute_advantages
    D  asymmetric adaptive clipping              Eq. 12-13   adaptive_clip

A, C and D compare a token's entropy with the statistics of a batch (Eq. 5). A uses those of the
previous batch, because the current one is still being sampled. C and D use h, which is computed
with the statistics of the current batch. B uses no entropy.

Shapes as in losses.py: B responses in groups of G adjacent rows, T positions, mask 1 at response
tokens (end of sequence included), entropies in nats. No function changes an input or lets a
gradient flow through an entropy or a ratio.

The paper contradicts itself in Eq. 6. As printed in version 2 (according to two readers'
transcriptions), its lower branch is -h / |h_min|, which is never negative. But the range [-1, 1],
the text on the same pages, and Eq. 8 and 10-13 need h to be negative for low entropy: otherwise
their branches for h <= 0 could never apply. We follow the range, the text and Eq. 8, 10-13. Eq. 8
is printed with z; the published runs, and our default, use its bounded form with h.

Differences from the released code (starriver030515/HAPO, 7671dde); `released=True` follows it:
1. The release has the sign of Eq. 6 as printed: it divides a negative number by a negative one, so
   h is positive for low-entropy tokens. These tokens are then sampled at a higher temperature
   instead of a lower one, get a wider *upper* bound instead of a wider lower one, and their
   advantage is never reduced.
2. Here the neutral zone is a closed interval built from the base clip values. In the release it is
   an open interval built from mechanism D's adapted values.
3. Here Eq. 9 is used as printed. The release replaces the advantages of a group in which some
   |A| >= 5 by the group's GRPO advantages.
Two differences have no switch. Here statistics are computed once per rollout batch from the old
policy; the release recomputes them in every micro-batch from the current policy, so its objective
depends on the micro-batch size. And here padding holds zeros.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from losses import grpo_advantages, split_groups

ENTROPY_FLOOR = 1e-8  # nats; keeps log H finite where H is 0
SPREAD_FLOOR = 1e-8  # the smallest sigma^2, h_max and -h_min: equal entropies give h = 0


class EntropyStats(NamedTuple):
    """Statistics of x = log H over a rollout batch (Eq. 5): four scalar tensors."""

    pivot: Tensor  # the rho-quantile of x: tokens above it are "high entropy"
    sigma: Tensor  # root mean square of x - pivot
    h_max: Tensor  # largest x - pivot, > 0
    h_min: Tensor  # smallest x - pivot, < 0


def log_entropy(entropy: Tensor) -> Tensor:
    """Return x = log(max(H, 1e-8)) of entropies H in nats, of any shape, without a gradient."""
    return entropy.detach().clamp_min(ENTROPY_FLOOR).log()


def entropy_stats(entropy: Tensor, mask: Tensor, rho: float = 0.8) -> EntropyStats:
    """Return Eq. 5's statistics of the log-entropy over the valid tokens of one rollout batch.

    entropy: nats, of the policy before the updates; mask: the same shape. The pivot is the
    rho-quantile by nearest rank. ValueError if rho is outside [0, 1] or no token is valid.
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"rho is a quantile and must lie in [0, 1], not {rho}")
    x = log_entropy(entropy[mask.bool()])
    if x.numel() == 0:
        raise ValueError("entropy statistics need at least one valid token")
    rank = round(rho * (x.numel() - 1))
    pivot = x.sort().values[rank]
    distance = x - pivot
    sigma = distance.square().mean().clamp_min(SPREAD_FLOOR).sqrt()
    h_max = distance.max().clamp_min(SPREAD_FLOOR)
    h_min = distance.min().clamp_max(-SPREAD_FLOOR)
    return EntropyStats(pivot, sigma, h_max, h_min)


def modulation(
    entropy: Tensor, stats: EntropyStats, mask: Tensor | None = None, released: bool = False
) -> Tensor:
    """Return h of Eq. 6: (x - pivot) / h_max above the pivot, (x - pivot) / |h_min| below it.

    The shape is that of `entropy`. h lies in [-1, 1] and is 0 where `mask` is 0. The clamp matters
    only when `stats` come from another batch.
    """
    distance = log_entropy(entropy) - stats.pivot
    above = distance / stats.h_max
    below = distance / stats.h_min.abs()  # -1 ... 0
    if released:
        below = distance / stats.h_min  # 0 ... 1
    h = torch.where(distance > 0, above, below).clamp(-1.0, 1.0)
    return h if mask is None else torch.where(mask.bool(), h, 0.0)


def adaptive_temperature(
    entropy: Tensor,
    stats: EntropyStats | None,
    base: float = 1.0,
    tau: float = 0.05,
    form: str = "bounded",
    released: bool = False,
) -> Tensor:
    """Return mechanism A's temperatures, Eq. 8, from the entropies of a decoding step's raw logits.

        bounded (published runs)   T = base (1 + tau h)
        zscore  (as printed)       T = base clip(1 + tau z, 0.1, 10),  z = (x - pivot) / sigma

    The shape is that of `entropy`. stats: those of the previous batch; None for the first batch,
    whose temperature is `base` everywhere.
    """
    if stats is None:
        return torch.zeros_like(entropy) + base
    if form == "bounded":
        return base * (1 + tau * modulation(entropy, stats, released=released))
    if form == "zscore":
        z = (log_entropy(entropy) - stats.pivot) / stats.sigma
        return base * (1 + tau * z).clamp(0.1, 10.0)
    raise ValueError(f"form must be 'bounded' or 'zscore', not {form!r}")


def token_group_advantages(
    rewards: Tensor, mask: Tensor, group_size: int, released: bool = False
) -> Tensor:
    """Return mechanism B's advantages, Eq. 9: rewards normalized over the tokens of a group.

        A[b, t] = (R[b] - mu) / (s + 1e-6)

    Every token of response b carries its reward R[b]. mu and s (population) are the mean and
    standard deviation over all valid tokens of the group, so a long response weighs more.
    (B,), (B, T) -> (B, T), 0 at padding and where a group's rewards are equal.
    """
    groups = split_groups(rewards, group_size)
    lengths = mask.to(rewards.dtype).sum(1).view_as(groups)  # in tokens
    # all tokens of a response carry its reward: sum over responses, weighted by their lengths
    tokens = lengths.sum(1, keepdim=True).clamp_min(1)
    mean = (groups * lengths).sum(1, keepdim=True) / tokens
    variance = ((groups - mean).square() * lengths).sum(1, keepdim=True) / tokens
    advantages = (groups - mean) / (variance.sqrt() + 1e-6)
    # equal rewards give exactly 0, whatever the mean's rounding; responses without tokens are
    # ignored
    counts = lengths > 0
    highest = torch.where(counts, groups, -torch.inf).amax(1, keepdim=True)
    lowest = torch.where(counts, groups, torch.inf).amin(1, keepdim=True)
    advantages = torch.where(highest > lowest, advantages, 0.0)
    if released:
        advantages = _released_fallback(advantages, lengths, rewards, group_size)
    return torch.where(mask.bool(), advantages.view(-1, 1), 0.0)


def _released_fallback(advantages, lengths, rewards, group_size):
    """Return advantages in which a group with some |A| >= 5 has its GRPO advantages instead."""
    large = (advantages.abs() >= 5) & (lengths > 0)
    grpo = grpo_advantages(rewards, group_size).view_as(advantages)
    return torch.where(large.any(1, keepdim=True), grpo, advantages)


def redistribute_advantages(
    advantages: Tensor,
    h: Tensor,
    ratio: Tensor,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    released: bool = False,
) -> Tensor:
    """Return mechanism C's advantages, Eq. 10-11, (B, T), without a gradient.

    They are A (1 + h) where h > 0 and r is outside the neutral zone, and where h <= 0 and r is
    inside it. Elsewhere they are A. The neutral zone is [1 - clip_low / 2, 1 + clip_high / 2].
    All inputs are (B, T); the bounds may be numbers.
    """
    ratio, advantages = ratio.detach(), advantages.detach()
    low, high = 1 - clip_low / 2, 1 + clip_high / 2
    inside = (ratio >= low) & (ratio <= high)
    if released:
        inside = (ratio > low) & (ratio < high)
    uncertain, moved = h > 0, ~inside
    chosen = (uncertain & moved) | (~uncertain & ~moved)
    return torch.where(chosen, advantages * (1 + h), advantages)


def adaptive_clip(h: Tensor, clip_low: float = 0.2, clip_high: float = 0.28) -> tuple:
    """Return mechanism D's clip distances (low, high) of every token, Eq. 12-13, each (B, T).

        low  = clip_low (1 - h)  where h <= 0: a low-entropy token may lose more probability
        high = clip_high (1 + h) where h > 0:  a high-entropy token may gain more probability

    Elsewhere they are clip_low and clip_high.
    """
    sure = h.detach().clamp_max(0.0)  # h where h <= 0, elsewhere 0
    uncertain = h.detach().clamp_min(0.0)
    return clip_low * (1 - sure), clip_high * (1 + uncertain)
