"""The baselines' maths: numbers worked by hand, then properties, then independent references."""

import math

import pytest
import torch

import losses
from engine.logprobs import chunked_logprobs_and_entropy

F64 = torch.float64


# ---------------------------------------------------------------------- log-probability and entropy


def plain(hidden, weight, targets, temperature=1.0):
    """The textbook way: all logits, log_softmax, gather."""
    log_probs = (hidden @ weight.T / temperature).log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, targets[..., None]).squeeze(-1), entropy


def test_logprob_and_entropy_by_hand():
    # logits (0, ln 3): probabilities 1/4 and 3/4; H = 1/4 ln 4 + 3/4 ln 4/3
    weight = torch.tensor([[0.0], [math.log(3)]], dtype=F64)
    hidden, targets = torch.ones(1, 1, dtype=F64), torch.tensor([1])
    logp, entropy = losses.token_logprobs_and_entropy(hidden, weight, targets)
    assert logp.item() == pytest.approx(math.log(0.75), abs=1e-12)
    assert entropy.item() == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3), abs=1e-12)
    with pytest.raises(ValueError, match="targets"):
        losses.token_logprobs_and_entropy(hidden, weight, torch.tensor([1, 1]))


BOTH = [losses.token_logprobs_and_entropy, chunked_logprobs_and_entropy]  # readable, fast
both = pytest.mark.parametrize("scores", BOTH, ids=["readable", "fast"])


@both
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_equals_plain_with_gradients(scores, temperature, unchanged):
    hidden = torch.randn(2, 5, 8, dtype=F64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=F64, requires_grad=True)
    targets = torch.randint(0, 11, (2, 5))
    a, b = torch.randn(2, 5, dtype=F64), torch.randn(2, 5, dtype=F64)
    # upstream gradients in both outputs, then in one alone
    both = lambda l, e: (a * l + b * e).sum()
    objectives = (both, lambda l, e: (a * l).sum(), lambda l, e: (b * e).sum())
    theirs = plain(hidden, weight, targets, temperature)
    for chunk in (1, 3, 7, 100, None):
        ours = unchanged(scores, hidden, weight, targets, temperature, chunk)
        for x, y in zip(ours, theirs):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
        for objective in objectives:
            ours = scores(hidden, weight, targets, temperature, chunk)
            our_grads = torch.autograd.grad(objective(*ours), (hidden, weight))
            grads = torch.autograd.grad(objective(*theirs), (hidden, weight), retain_graph=True)
            for x, y in zip(our_grads, grads):
                torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@both
def test_gradcheck(scores):
    hidden = torch.randn(4, 3, dtype=F64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=F64, requires_grad=True)
    targets = torch.tensor([0, 4, 2, 1])
    scored = lambda h, w: scores(h, w, targets, 0.8, 3)
    assert torch.autograd.gradcheck(scored, (hidden, weight))


@both
def test_a_cut_vocabulary_has_probability_zero(scores):
    hidden, weight = torch.randn(3, 4, dtype=F64), torch.randn(10, 4, dtype=F64)
    weight[7:] = 100.0  # padding rows with wild weights
    logp, entropy = scores(hidden, weight[:7], torch.tensor([0, 6, 3]))
    masked = hidden @ weight.T
    masked[:, 7:] = -torch.inf
    torch.testing.assert_close(logp, masked.log_softmax(-1)[range(3), [0, 6, 3]])
    assert (entropy <= math.log(7) + 1e-9).all()


@both
def test_bfloat16_autocast_keeps_float32_results(scores):
    hidden, weight = torch.randn(6, 16), torch.randn(20, 16, requires_grad=True)
    targets = torch.randint(0, 20, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        logp, entropy = scores(hidden, weight, targets, chunk_tokens=2)
    assert logp.dtype == entropy.dtype == torch.float32
    logp.sum().backward()
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(logp, plain(hidden, weight, targets)[0], atol=0.1, rtol=0.02)


# --------------------------------------------------------------------------------------- advantages


def test_grpo_by_hand(unchanged):
    # group (1, 0, 0): mean 1/3, sample variance ((2/3)^2 + 2 (1/3)^2) / 2 = 1/3, std 0.57735
    # A = (2/3, -1/3, -1/3) / 0.57735 = (1.1547, -0.57735, -0.57735)
    # the second group is all right: 0
    advantages = unchanged(losses.grpo_advantages, torch.tensor([1.0, 0, 0, 1, 1, 1], dtype=F64), 3)
    expected = [2 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3), 0, 0, 0]
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=F64), rtol=1e-5, atol=0)


def test_equal_rewards_are_exactly_zero(unchanged):
    for reward in (0.1, 1 / 3, 1e6):
        assert (losses.grpo_advantages(torch.full((14,), reward), 7) == 0).all()
    rewards = torch.tensor([1.0, 1.0, 0.5, 0.25])
    varied = unchanged(losses.has_reward_variance, rewards, 2)
    assert varied.tolist() == [False, False, True, True]
    assert unchanged(losses.rloo_advantages, rewards, 2).tolist() == [0, 0, 0.25, -0.25]


def test_group_of_one_and_broken_groups():
    for advantages in (losses.grpo_advantages, losses.rloo_advantages):
        assert (advantages(torch.tensor([3.0, -1.0]), 1) == 0).all()
        with pytest.raises(ValueError, match="5 responses.*group size 2"):
            advantages(torch.zeros(5), 2)


# ---------------------------------------------------------------------------------------- surrogate


def test_surrogate_by_hand(unchanged):
    # eps 0.2 / 0.28.   r     A      r A    clip(r) A   -min
    #                  1.5    1     1.5       1.28     -1.28   clipped above
    #                  1.5   -1    -1.5      -1.28      1.5    not clipped: it must push down
    #                  0.5    1     0.5       0.8      -0.5    not clipped
    #                  0.5   -1    -0.5      -0.8       0.8    clipped below
    #                  1.1    2     2.2       2.2      -2.2    inside
    #                  3.0   -1    -3.0      -1.28      3.0, dual clip at 2: 2.0
    ratio = torch.tensor([[1.5, 1.5, 0.5], [0.5, 1.1, 3.0]], dtype=F64)
    advantages = torch.tensor([[1.0, -1, 1], [-1, 2, -1]], dtype=F64)
    loss = unchanged(losses.clipped_surrogate, ratio, advantages, 0.2, 0.28)
    expected = torch.tensor([[-1.28, 1.5, -0.5], [0.8, -2.2, 3.0]], dtype=F64)
    torch.testing.assert_close(loss, expected)
    dual = losses.clipped_surrogate(ratio, advantages, 0.2, 0.28, dual_clip=2.0)
    expected[1, 2] = 2.0
    torch.testing.assert_close(dual, expected)
    with pytest.raises(ValueError, match="dual_clip"):
        losses.clipped_surrogate(ratio, advantages, 0.2, 0.28, dual_clip=1.0)


def test_surrogate_gradient_vanishes_where_clipped_and_has_the_right_sign():
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 3.0]], dtype=F64, requires_grad=True)
    advantages = torch.tensor([[1.0, -1, 1, -1, -1]], dtype=F64)
    losses.clipped_surrogate(ratio, advantages, 0.2, 0.28, dual_clip=2.0).sum().backward()
    assert ratio.grad.tolist() == [[0.0, 1.0, -1.0, 0.0, 0.0]]


def test_a_token_exactly_on_a_bound_still_learns(unchanged):
    """1 - 0.25 and 1 + 0.5 are exact in binary, so these ratios lie on their bounds: the gradient
    is -A for both signs of A, as inside, and not 0 or half of it."""
    advantages = torch.tensor([[1.0, -3.0, 1.0, -3.0]], dtype=F64)
    tensors = [torch.full_like(advantages, bound) for bound in (0.25, 0.5)]
    for bounds in ((0.25, 0.5), tensors):
        ratio = torch.tensor([[0.75, 0.75, 1.5, 1.5]], dtype=F64, requires_grad=True)
        loss = unchanged(losses.clipped_surrogate, ratio, advantages, *bounds)
        assert loss.tolist() == [[-0.75, 2.25, -1.5, 4.5]]
        loss.sum().backward()
        assert ratio.grad.tolist() == [[-1.0, 3.0, -1.0, 3.0]]


def test_a_token_exactly_on_the_dual_clip_learns_at_half_strength():
    # A = -1, dual clip 2: the loss is r up to r = 2 and 2 beyond; the released code halves r = 2
    ratio = torch.tensor([[1.75, 2.0, 2.25]], dtype=F64, requires_grad=True)
    advantages = torch.full_like(ratio, -1.0)
    loss = losses.clipped_surrogate(ratio, advantages, 0.25, 0.5, dual_clip=2.0)
    assert loss.tolist() == [[1.75, 2.0, 2.0]]
    loss.sum().backward()
    assert ratio.grad.tolist() == [[1.0, 0.5, 0.0]]


def test_gradients_at_the_limit_of_the_log_ratio():
    limit, inside = losses.LOG_RATIO_LIMIT, torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=F64)
    difference = torch.tensor([-limit, limit, -limit - 1, limit + 1], dtype=F64)
    logp = difference.clone().requires_grad_()
    losses.likelihood_ratio(logp, torch.zeros(4, dtype=F64)).sum().backward()
    torch.testing.assert_close(logp.grad, inside * difference.exp())
    logp = (-difference).requires_grad_()  # k3's d is ref_logp - logp
    losses.kl_k3(logp, torch.zeros(4, dtype=F64)).sum().backward()
    torch.testing.assert_close(logp.grad, inside * (1 - difference.exp()))


def test_clip_by_hand():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, math.nan, math.inf], requires_grad=True)
    clipped = losses.clip(values, -1.0, torch.tensor(1.0))
    assert clipped.tolist()[:5] == [-1.0, -1.0, 0.0, 1.0, 1.0]
    assert clipped[5].isnan() and clipped[6] == 1
    clipped.sum().backward()
    assert values.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0]


def test_per_token_bounds_agree_with_a_nested_loop():
    ratio, advantages = torch.rand(3, 4, dtype=F64) * 2, torch.randn(3, 4, dtype=F64)
    low, high = torch.rand(3, 4, dtype=F64) / 2, torch.rand(3, 4, dtype=F64) / 2
    loss = losses.clipped_surrogate(ratio, advantages, low, high)
    for b in range(3):
        for t in range(4):
            r, a = ratio[b, t].item(), advantages[b, t].item()
            clipped = min(max(r, 1 - low[b, t].item()), 1 + high[b, t].item())
            assert loss[b, t].item() == pytest.approx(-min(r * a, clipped * a), abs=1e-12)


def test_k3(unchanged):
    # d = ln 2: 2 - ln 2 - 1; d = 0: 0; and never negative
    kl = losses.kl_k3(torch.tensor(0.0), torch.tensor(math.log(2.0)))
    assert kl.item() == pytest.approx(1 - math.log(2), abs=1e-6)
    assert losses.kl_k3(torch.tensor(0.5), torch.tensor(0.5)).item() == 0
    assert (unchanged(losses.kl_k3, torch.randn(100), torch.randn(100)) >= 0).all()


# -------------------------------------------------------------------------------------- three means

VALUES = torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0]], dtype=F64)
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


def test_means_by_hand(unchanged):
    # token mean (1 + 2 + 3 + 4) / 4; sequence mean (2 + 4) / 2; fixed length 5: (6 / 5 + 4 / 5) / 2
    assert unchanged(losses.masked_mean, VALUES, MASK).item() == 2.5
    assert unchanged(losses.sequence_mean, VALUES, MASK).item() == 3.0
    assert unchanged(losses.fixed_length_mean, VALUES, MASK, 5).item() == pytest.approx(1.0)


def test_micro_batches_add_up():
    fixed = lambda v, m, n: losses.fixed_length_mean(v, m, 5, n)
    for mean, normalizer in ((losses.masked_mean, 4), (losses.sequence_mean, 2), (fixed, 2)):
        whole = mean(VALUES, MASK, normalizer)
        parts = sum(mean(VALUES[b : b + 1], MASK[b : b + 1], normalizer) for b in range(2))
        assert parts.item() == pytest.approx(whole.item(), abs=1e-15)


def test_padding_never_leaks():
    values = VALUES.clone()
    values[1, 1:] = torch.nan
    values.requires_grad_()
    loss = losses.masked_mean(values, MASK)
    loss.backward()
    assert loss.item() == 2.5 and values.grad.tolist() == [[0.25] * 3, [0.25, 0, 0]]
    assert losses.masked_mean(VALUES, torch.zeros_like(MASK)).item() == 0
    assert losses.sequence_mean(VALUES, torch.zeros_like(MASK)).item() == 0


def test_overlong_by_hand(unchanged):
    # cap 100, buffer 20: nothing up to 80, half at 90, -1 at 100
    penalty = unchanged(losses.overlong_penalty, torch.tensor([10, 80, 90, 100]), 100, 20)
    assert penalty.tolist() == [0, 0, -0.5, -1]
    with pytest.raises(ValueError, match="buffer"):
        losses.overlong_penalty(torch.tensor([1]), 10, 11)
