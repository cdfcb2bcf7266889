"""HAPO's four mechanisms: the paper's example by hand, then properties.

test_golden.py holds them to the released code.
"""

import math

import pytest
import torch

import hapo
from hapo import (
    adaptive_clip,
    adaptive_temperature,
    entropy_stats,
    modulation,
    redistribute_advantages,
    token_group_advantages,
)
from losses import clipped_surrogate, grpo_advantages, masked_mean

F64 = torch.float64
H = torch.tensor([[0.01, 0.05, 0.2, 0.5, 1.0, 2.0]], dtype=F64)
ONES = torch.ones_like(H)


def test_statistics_by_hand(unchanged):
    # six values, rho 0.8: rank round(0.8 * 5) = 4, so the pivot is log 1 = 0 and x - pivot = log H
    stats = unchanged(entropy_stats, H, ONES)
    assert stats.pivot.item() == 0
    assert stats.h_max.item() == pytest.approx(math.log(2))
    assert stats.h_min.item() == pytest.approx(math.log(0.01))
    sigma = math.sqrt(sum(math.log(v) ** 2 for v in H[0].tolist()) / 6)
    assert stats.sigma.item() == pytest.approx(sigma)


def pivot_of(n, *rho):
    values = torch.arange(1.0, n + 1, dtype=F64)[None]
    return entropy_stats(values, torch.ones(1, n), *rho).pivot.item()


def test_nearest_rank_and_half_ranks_round_to_even():
    # rho 0.5 of 4 values: position 1.5 goes to 2; of 2 values: 0.5 goes to 0
    for n, rank in {2: 1, 3: 2, 4: 2, 6: 4, 1: 0}.items():
        assert pivot_of(n) == pytest.approx(math.log(rank + 1)), n
    assert pivot_of(4, 0.5) == pytest.approx(math.log(3)) and pivot_of(2, 0.5) == 0


def test_masked_entropies_do_not_count():
    entropy = torch.cat([H, torch.full((1, 3), 99.0, dtype=F64)], 1)
    mask = torch.tensor([[1] * 6 + [0] * 3])
    assert entropy_stats(entropy, mask) == entropy_stats(H, ONES)
    with pytest.raises(ValueError, match="at least one valid token"):
        entropy_stats(H, torch.zeros_like(H))
    with pytest.raises(ValueError, match="rho"):
        entropy_stats(H, ONES, rho=1.5)


def test_modulation_by_hand(unchanged):
    # x = log H: -4.61 -3.00 -1.61 -0.69 0 0.69; below the pivot divided by 4.61, above by 0.69
    h = unchanged(modulation, H, entropy_stats(H, ONES))
    assert h[0].tolist() == pytest.approx([-1, -0.6505, -0.3495, -0.1505, 0, 1], abs=1e-4)
    released = modulation(H, entropy_stats(H, ONES), released=True)
    assert released[0].tolist() == pytest.approx([1, 0.6505, 0.3495, 0.1505, 0, 1], abs=1e-4)


def test_modulation_is_clamped_masked_and_detached():
    entropy = torch.tensor([[1e-30, 50.0, 0.3]], dtype=F64, requires_grad=True)
    h = modulation(entropy, entropy_stats(H, ONES), torch.tensor([[1, 1, 0]]))
    assert h.tolist() == [[-1, 1, 0]] and not h.requires_grad
    equal = torch.full((2, 3), 0.7)  # equal entropies modulate nothing
    assert (modulation(equal, entropy_stats(equal, torch.ones(2, 3))) == 0).all()


def test_temperature_by_hand(unchanged):
    stats = entropy_stats(H, ONES)
    bounded = unchanged(adaptive_temperature, H, stats)
    expected = [1 + 0.05 * h for h in (-1, -0.6505, -0.3495, -0.1505, 0, 1)]
    assert bounded[0].tolist() == pytest.approx(expected, abs=1e-5)
    zscore = adaptive_temperature(H, stats, base=0.8, tau=0.1, form="zscore")
    expected = 0.8 * (1 + 0.1 * math.log(0.01) / stats.sigma.item())
    assert zscore[0, 0].item() == pytest.approx(expected)
    sure = torch.tensor([1e-8], dtype=F64)
    least = adaptive_temperature(sure, stats, tau=5.0, form="zscore")
    assert least.item() == pytest.approx(0.1)
    # nothing spread: a token that differs from all others is drawn at a temperature all the same
    even = entropy_stats(torch.full((1, 3), 1e-3), torch.ones(1, 3))
    most = adaptive_temperature(torch.tensor([5.0]), even, base=0.8, tau=0.1, form="zscore")
    assert most.item() == pytest.approx(8.0)
    released = adaptive_temperature(H, stats, released=True)
    assert released[0, 0].item() == pytest.approx(1.05)  # a sure token, heated
    assert (adaptive_temperature(H, None, base=0.7) == 0.7).all()
    with pytest.raises(ValueError, match="form"):
        adaptive_temperature(H, stats, form="linear")


def test_group_average_by_hand(unchanged):
    # response 1 (reward 1) has 1 token, response 2 (reward 0) has 3:
    # mu = 1/4, s = sqrt(1/4 * 3/4) = 0.4330
    # A = 0.75 / 0.4330 = 1.7321 and -0.25 / 0.4330 = -0.5774;
    # their sum over tokens is 1.7321 - 3 * 0.5774 = 0
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    advantages = unchanged(token_group_advantages, torch.tensor([1.0, 0.0], dtype=F64), mask, 2)
    expected = [[math.sqrt(3), 0, 0], [-1 / math.sqrt(3)] * 3]
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=F64), rtol=1e-5, atol=1e-12)
    assert abs(advantages.sum().item()) < 1e-12


def test_group_average_of_many_groups_sums_to_zero_and_ignores_dead_ones():
    rewards, mask = torch.rand(12, dtype=F64), (torch.rand(12, 9) < 0.7).int()
    rewards[4:8] = 1 / 3
    advantages = token_group_advantages(rewards, mask, 4)
    sums = advantages.view(3, -1).sum(1)
    torch.testing.assert_close(sums, torch.zeros(3, dtype=F64), atol=1e-9, rtol=0)
    assert (advantages[4:8] == 0).all() and (advantages[mask == 0] == 0).all()


def test_equal_lengths_tie_it_to_grpo():
    # with equal lengths only the standard deviation differs: population against sample
    rewards, mask = torch.tensor([1.0, 0, 0, 1, 0, 0], dtype=F64), torch.ones(6, 4)
    ratio = token_group_advantages(rewards, mask, 3)[:, 0] / grpo_advantages(rewards, 3)
    expected = torch.full((6,), math.sqrt(3 / 2), dtype=F64)
    torch.testing.assert_close(ratio, expected, rtol=1e-5, atol=0)


def test_released_falls_back_to_grpo_where_advantages_are_large():
    rewards, mask = torch.tensor([1.0] + [0.0] * 3, dtype=F64), torch.ones(4, 40)
    mask[0, 1:] = 0  # one token against 120: |A| is about 11
    assert token_group_advantages(rewards, mask, 4).abs().max() > 5
    released = token_group_advantages(rewards, mask, 4, released=True)
    torch.testing.assert_close(released[:, 0], grpo_advantages(rewards, 4))


def test_redistribution_by_hand(unchanged):
    # zone [0.9, 1.14], closed.  h 0.5: outside grows, inside stays;
    # h -0.5: inside shrinks, outside stays;  h 0 is low
    h = torch.tensor([[0.5, 0.5, 0.5, -0.5, -0.5, 0.0]], dtype=F64)
    ratio = torch.tensor([[1.2, 0.8, 1.0, 1.0, 1.2, 1.0]], dtype=F64)
    advantages = torch.full((1, 6), -2.0, dtype=F64)
    result = unchanged(redistribute_advantages, advantages, h, ratio, 0.2, 0.28)
    assert result[0].tolist() == [-3, -3, -2, -1, -2, -2]
    # the zone is closed here and open in the release
    edge = (*torch.tensor([[1.0], [-0.5], [1 + 0.28 / 2]], dtype=F64), 0.2, 0.28)
    assert redistribute_advantages(*edge).item() == 0.5
    assert redistribute_advantages(*edge, released=True).item() == 1.0


def test_no_gradient_through_redistribution_or_bounds():
    logp = torch.zeros(1, 3, dtype=F64, requires_grad=True)
    ratio = torch.exp(logp)
    h = torch.tensor([[0.5, -0.5, 0.0]], dtype=F64)
    advantages = redistribute_advantages(torch.ones(1, 3, dtype=F64), h, ratio, 0.2, 0.28)
    low, high = adaptive_clip(h.requires_grad_())
    assert not any(x.requires_grad for x in (advantages, low, high))
    clipped_surrogate(ratio, advantages, low, high).sum().backward()
    torch.testing.assert_close(logp.grad, -advantages)


def test_adaptive_clip_by_hand(unchanged):
    low, high = unchanged(adaptive_clip, torch.tensor([[-1.0, -0.5, 0.0, 0.5, 1.0]], dtype=F64))
    assert low[0].tolist() == pytest.approx([0.4, 0.3, 0.2, 0.2, 0.2])
    assert high[0].tolist() == pytest.approx([0.28, 0.28, 0.28, 0.42, 0.56])


def test_zero_modulation_is_dapo():
    ratio, advantages, mask = torch.rand(4, 5) + 0.5, torch.randn(4, 5), torch.ones(4, 5)
    h = torch.zeros(4, 5)
    low, high = adaptive_clip(h)
    weighed = redistribute_advantages(advantages, h, ratio, 0.2, 0.28)
    hapo_loss = masked_mean(clipped_surrogate(ratio, weighed, low, high), mask)
    dapo_loss = masked_mean(clipped_surrogate(ratio, advantages, 0.2, 0.28), mask)
    assert hapo_loss.item() == pytest.approx(dapo_loss.item(), rel=1e-6)


def test_whole_objective_against_a_nested_loop():
    """Eq. 5 to 13 written once more with Python floats, token by token."""
    B, T, G, rho, eps_low, eps_high = 4, 5, 2, 0.8, 0.2, 0.28
    entropy = torch.rand(B, T, dtype=F64) * 2
    logp, old = -torch.rand(B, T, dtype=F64), -torch.rand(B, T, dtype=F64)
    mask, rewards = (torch.rand(B, T) < 0.8).int(), torch.tensor([1.0, 0, 0.3, 1.0], dtype=F64)
    mask[:, 0] = 1

    valid = [(b, t) for b in range(B) for t in range(T) if mask[b, t]]
    x = {bt: math.log(max(entropy[bt].item(), 1e-8)) for bt in valid}
    pivot = sorted(x.values())[round(rho * (len(valid) - 1))]
    highest, lowest = max(v - pivot for v in x.values()), min(v - pivot for v in x.values())
    total = 0.0
    for b, t in valid:
        d = x[b, t] - pivot
        h = d / highest if d > 0 else d / abs(lowest)
        group = [rewards[i].item() for i, _ in valid if i // G == b // G]
        mu = sum(group) / len(group)
        std = math.sqrt(sum((r - mu) ** 2 for r in group) / len(group))
        a = (rewards[b].item() - mu) / (std + 1e-6)
        r = math.exp(logp[b, t].item() - old[b, t].item())
        inside = 1 - eps_low / 2 <= r <= 1 + eps_high / 2
        if (h > 0 and not inside) or (h <= 0 and inside):
            a *= 1 + h
        low, high = (eps_low * (1 - h), eps_high) if h <= 0 else (eps_low, eps_high * (1 + h))
        total -= min(r * a, min(max(r, 1 - low), 1 + high) * a)

    stats = entropy_stats(entropy, mask, rho)
    h, ratio = modulation(entropy, stats, mask), torch.exp(logp - old)
    advantages = token_group_advantages(rewards, mask, G)
    weighed = redistribute_advantages(advantages, h, ratio, eps_low, eps_high)
    bounds = adaptive_clip(h, eps_low, eps_high)
    loss = masked_mean(clipped_surrogate(ratio, weighed, *bounds), mask)
    assert loss.item() == pytest.approx(total / len(valid), abs=1e-12)
    assert isinstance(stats, hapo.EntropyStats)
