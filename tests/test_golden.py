"""59 cases computed with the released HAPO functions in float64: ours must give the same numbers.

"released" is the published code untouched, "corrected" the same code with the sign of the
low-entropy scale turned, which is our default. Both use the released neutral zone (open, from
adapted bounds), so the loss pass asks for it. Fields of shape (B, T) are compared where the mask is
1: the released code leaves values in the padding.
"""

import json
import pathlib

import pytest
import torch

from hapo import (
    adaptive_clip,
    adaptive_temperature,
    entropy_stats,
    modulation,
    redistribute_advantages,
    token_group_advantages,
)
from losses import (
    clipped_surrogate,
    fixed_length_mean,
    grpo_advantages,
    masked_mean,
    sequence_mean,
    token_logprobs_and_entropy,
)

FILE = pathlib.Path(__file__).parent / "golden" / "hapo_golden.json"
CASES = json.loads(FILE.read_text(encoding="utf-8"))["cases"]
SIGNS = ["released", "corrected"]


def tensor(values):
    """Nested lists to float64; the file writes 'nan' and 'inf' as strings."""
    if not isinstance(values, list):
        return torch.tensor(float(values), dtype=torch.float64)
    if values and isinstance(values[0], list):
        return torch.stack([tensor(v) for v in values])
    return torch.tensor([float(v) for v in values], dtype=torch.float64)


@pytest.fixture(params=CASES, ids=lambda c: c["id"])
def case(request):
    return request.param


def close(ours, theirs, mask=None, tolerance=1e-9):
    if mask is not None:
        ours, theirs = ours[mask], theirs[mask]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_there_are_59():
    assert len(CASES) == 59


def test_statistics_and_modulation(case):
    entropy, mask = tensor(case["in_entropy"]), tensor(case["in_response_mask"]).bool()
    stats = entropy_stats(entropy, mask, case["in_entropy_pivot"])
    close(stats.pivot, tensor(case["out_pivot_log_entropy"]))
    close(stats.sigma, tensor(case["out_std_log_entropy"]))
    for sign in SIGNS:
        h = modulation(entropy, stats, mask, released=sign == "released")
        close(h, tensor(case[f"out_h_hat_{sign}"]), mask)
        assert (h[~mask] == 0).all()


def group_rows(case):
    """Row order that makes groups adjacent, as list of index lists, one a group."""
    rows = {}
    for i, name in enumerate(case["in_group_index"]):
        rows.setdefault(name, []).append(i)
    return rows.values()


def test_group_averages(case):
    rewards = tensor(case["in_token_level_rewards"]).sum(1)
    mask, divide = tensor(case["in_response_mask"]).bool(), case["in_norm_adv_by_std"]
    for rows in group_rows(case):
        size = len(rows)
        ours = token_group_advantages(rewards[rows], mask[rows], size)
        if not divide:  # an option of the release
            every = torch.repeat_interleave(rewards[rows], mask[rows].sum(1))
            ours = ours * (every.std(correction=0) + 1e-6)
        close(ours, tensor(case["out_group_adv_nofallback"])[rows], mask[rows], 1e-6)
        ours = grpo_advantages(rewards[rows], size)[:, None].expand(-1, mask.shape[1])
        if size > 1 and divide:  # a group of one gets its raw reward there, 0 here
            close(ours, tensor(case["out_grpo_adv"])[rows], mask[rows], 1e-6)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c["in_norm_adv_by_std"]], ids=lambda c: c["id"]
)
def test_released_group_fallback(case):
    """|A| >= 5 swaps a group for its GRPO advantages. Theirs also looks at padding; where only
    padding trips it we differ."""
    rewards = tensor(case["in_token_level_rewards"]).sum(1)
    mask = tensor(case["in_response_mask"]).bool()
    for rows in group_rows(case):
        plain = tensor(case["out_group_adv_nofallback"])[rows]
        trips_on_valid_tokens = bool((plain.abs() >= 5)[mask[rows]].any())
        expected = tensor(case["out_grpo_adv"])[rows] if trips_on_valid_tokens else plain
        if trips_on_valid_tokens or not any(case["out_group_fallback_used"][r] for r in rows):
            close(expected, tensor(case["out_group_adv_released"])[rows], mask[rows], 1e-6)
        ours = token_group_advantages(rewards[rows], mask[rows], len(rows), released=True)
        close(ours, expected, mask[rows], 1e-6)


def loss_pass(case, sign, logp, plain=False):
    """The loss of one case, built as train.py builds it but with the neutral zone the released code
    used; and (low, high, advantages)."""
    entropy, mask = tensor(case["in_entropy"]), tensor(case["in_response_mask"]).bool()
    low, high = case["in_cliprange_low"], case["in_cliprange_high"]
    advantages = tensor(case["in_advantages"])
    ratio = torch.exp(logp - tensor(case["in_old_log_prob"]))
    # take their ratio's value where it differs in the last bit, and the gradient of ours
    ratio = ratio + (tensor(case["out_ratio"]) - ratio).detach()
    stats = entropy_stats(entropy, mask, case["in_entropy_pivot"])
    h = modulation(entropy, stats, mask, released=sign == "released")
    if case["in_adaptive_clip"] and not plain:
        low, high = adaptive_clip(h * case["in_clip_alpha"], low, high)
    if case["in_adaptive_advantage"] and not plain:
        advantages = redistribute_advantages(
            advantages, h * case["in_adv_beta"], ratio, low, high, released=True
        )
    per_token = clipped_surrogate(ratio, advantages, low, high, dual_clip=case["in_clip_ratio_c"])
    mean = case["in_loss_agg_mode"]
    if mean == "token-mean":
        loss = masked_mean(per_token, mask)
    elif mean == "seq-mean-token-mean":
        loss = sequence_mean(per_token, mask)
    elif mean == "seq-mean-token-sum":
        loss = fixed_length_mean(per_token, mask, length=1)
    else:
        assert mean == "seq-mean-token-sum-norm"
        # the release divides the sum by the width alone, not by the responses
        loss = fixed_length_mean(per_token, mask, length=mask.shape[1], normalizer=1)
    return loss, (low, high, advantages)


@pytest.mark.parametrize("sign", SIGNS + ["plain"])
def test_loss_and_gradient(case, sign):
    mask = tensor(case["in_response_mask"]).bool()
    logp = tensor(case["in_log_prob"]).requires_grad_()
    loss, (low, high, advantages) = loss_pass(case, sign, logp, plain=sign == "plain")
    if sign != "plain":
        expand = lambda x: torch.as_tensor(x, dtype=torch.float64).expand(mask.shape)
        close(expand(low), tensor(case[f"out_clip_low_{sign}"]), mask)
        close(expand(high), tensor(case[f"out_clip_high_{sign}"]), mask)
        close(advantages, tensor(case[f"out_adv_{sign}"]), mask)
    loss.backward()
    theirs = tensor(case[f"out_loss_{sign}"])
    # a response without tokens under sequence mean: 0 / 0 there, a response that adds 0 here
    if theirs.isnan():
        assert not mask.any(1).all() and loss.isfinite() and logp.grad.isfinite().all()
        return
    close(loss, theirs)
    close(logp.grad, tensor(case[f"out_grad_log_prob_{sign}"]), mask)
    assert (logp.grad[~mask] == 0).all()


@pytest.mark.parametrize("sign", SIGNS)
def test_temperature(case, sign):
    entropy, mask = tensor(case["in_entropy"]), tensor(case["in_response_mask"]).bool()
    stats = entropy_stats(entropy, mask, case["in_entropy_pivot"])
    logits = tensor(case["in_sampler_logits"])
    if logits.isfinite().all():
        eye = torch.eye(logits.shape[1], dtype=torch.float64)
        targets = torch.zeros(len(logits), dtype=torch.long)
        _, now = token_logprobs_and_entropy(logits, eye, targets)
    else:
        now = torch.distributions.Categorical(logits=logits.clamp_min(-1e30)).entropy()
    base, tau = tensor(case["in_base_temperature"]), case["in_temperature_tau"]
    ours = adaptive_temperature(now, stats, base=base, tau=tau, released=sign == "released")
    # near 0 nats the entropy of a float32 softmax, as the release computes it, is rounding noise
    compare = (now > 1e-5) & logits.isfinite().all(1)
    # and the release does not clamp h
    h_unclamped = (tensor(case[f"out_temp_{sign}_f64"]) / base - 1) / tau
    limit = base * (1 + tau * h_unclamped.clamp(-1, 1))
    close(ours[compare], limit[compare], tolerance=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if "in_logits" in c], ids=lambda c: c["id"])
def test_from_logits_down_to_the_logits(case):
    """Log-probability, entropy and the gradient of the loss through our chunked function, at the
    logits themselves."""
    logits = torch.stack([tensor(row) for row in case["in_logits"]]).requires_grad_()
    labels = torch.tensor(case["in_labels"])
    eye = torch.eye(logits.shape[-1], dtype=torch.float64)
    mask = tensor(case["in_response_mask"]).bool()
    logp, entropy = token_logprobs_and_entropy(logits, eye, labels, chunk_tokens=3)
    close(logp, tensor(case["out_logprobs_from_logits"]), mask)
    close(entropy, tensor(case["out_entropy_from_logits"]), mask)
    loss, _ = loss_pass(case, "corrected", logp)
    loss.backward()
    close(logits.grad, torch.stack([tensor(row) for row in case["out_grad_logits_corrected"]]))
