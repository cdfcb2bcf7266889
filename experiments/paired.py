"""Paired differences over seeds: interval, exact sign-flip test, Holm's correction, verdict.

Ten numbers are few. A percentile bootstrap of ten covers 89 %, not 95; the t-interval and the
sign-flip test, which looks at all 2^n signs, keep what they promise.
"""

import itertools
import math
from typing import NamedTuple

# two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


class Effect(NamedTuple):
    """Mean paired difference, its 95 % interval, the chance of so large a one by signs alone."""

    mean: float
    low: float
    high: float
    p: float


def effect(differences):
    """The Effect of at least two paired differences."""
    n = len(differences)
    mean = sum(differences) / n
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1))
    half = T95[n - 2] * deviation / math.sqrt(n)
    return Effect(mean, mean - half, mean + half, sign_flip(differences))


def sign_flip(differences):
    """Two-sided p: the share of all 2^n sign patterns whose mean is at least as far from 0."""
    observed, count = abs(sum(differences)), 0
    for signs in itertools.product((1, -1), repeat=len(differences)):
        flipped = abs(sum(s * d for s, d in zip(signs, differences)))
        count += flipped >= observed - 1e-12  # rounding must not lose the observed one
    return count / 2 ** len(differences)


def holm(ps):
    """p values corrected for their number, in the order given: the k-th smallest times n - k + 1,
    never smaller than the one before."""
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, ps[i] * (len(ps) - rank)))
        corrected[i] = largest
    return corrected


def probability_of_improvement(ours, theirs):
    """P(ours > theirs) over all pairs of runs, ties counting half (Agarwal et al. 2021)."""
    wins = sum((a > b) + (a == b) / 2 for a in ours for b in theirs)
    return wins / (len(ours) * len(theirs))


def verdict(effect, p, smallest):
    """holds: the corrected p is below 0.05 and the mean at least the smallest effect of interest in
    the claimed direction (positive); contradicted: the whole interval lies below that effect."""
    if p < 0.05 and effect.mean >= smallest:
        return "holds"
    return "contradicted" if effect.high < smallest else "not decided"
