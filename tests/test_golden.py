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

import hapo
import losses

SIGNS = ["released", "corrected"]


def tensor(values):
    """Nested lists or one number to float64; the file writes 'nan' and 'inf' as strings."""
    if isinstance(values, list) and values and isinstance(values[0], list):
        return torch.stack([tensor(v) for v in values])
    values = [float(v) for v in values] if isinstance(values, list) else float(values)
    return torch.tensor(values, dtype=torch.float64)


def as_tensors(case):
    """A case whose lists and results are tensors, but for names and labels."""
    for name, value in case.items():
        numbers = isinstance(value, list) and name.startswith("in_")
        if name.startswith("out_") or numbers and name not in ("in_group_index", "in_labels"):
            case[name] = tensor(value)
    case["mask"] = case["in_response_mask"].bool()
    return case


FILE = pathlib.Path(__file__).parent / "golden" / "hapo_golden.json"
CASES = [as_tensors(case) for case in json.loads(FILE.read_text(encoding="utf-8"))["cases"]]


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
    entropy, mask = case["in_entropy"], case["mask"]
    stats = hapo.entropy_stats(entropy, mask, case["in_entropy_pivot"])
    close(stats.pivot, case["out_pivot_log_entropy"])
    close(stats.sigma, case["out_std_log_entropy"])
    for sign in SIGNS:
        h = hapo.modulation(entropy, stats, mask, released=sign == "released")
        close(h, case[f"out_h_hat_{sign}"], mask)
        assert (h[~mask] == 0).all()


def group_rows(case):
    """Row order that makes groups adjacent, as list of index lists, one a group."""
    rows = {}
    for i, name in enumerate(case["in_group_index"]):
        rows.setdefault(name, []).append(i)
    return rows.values()


def test_group_averages(case):
    """Eq. 9, GRPO's, and the release's fallback: |A| >= 5 swaps a group for its GRPO advantages.
    Theirs also looks at padding; where only padding trips it we differ."""
    all_rewards, divide = case["in_token_level_rewards"].sum(1), case["in_norm_adv_by_std"]
    for rows in group_rows(case):
        rewards, mask, size = all_rewards[rows], case["mask"][rows], len(rows)
        names = ("group_adv_nofallback", "grpo_adv", "group_adv_released", "group_fallback_used")
        plain, grpo, released, used = (case[f"out_{name}"][rows] for name in names)
        ours = hapo.token_group_advantages(rewards, mask, size)
        if not divide:  # an option of the release
            every = torch.repeat_interleave(rewards, mask.sum(1))
            close(ours * (every.std(correction=0) + 1e-6), plain, mask, 1e-6)
            continue
        close(ours, plain, mask, 1e-6)
        if size > 1:  # a group of one gets its raw reward there, 0 here
            close(losses.grpo_advantages(rewards, size)[:, None].expand_as(mask), grpo, mask, 1e-6)
        trips_on_valid_tokens = bool((plain.abs() >= 5)[mask].any())
        expected = grpo if trips_on_valid_tokens else plain
        if trips_on_valid_tokens or not used.any():
            close(expected, released, mask, 1e-6)
        ours = hapo.token_group_advantages(rewards, mask, size, released=True)
        close(ours, expected, mask, 1e-6)


def loss_pass(case, sign, logp):
    """The loss of one case, built as train.py builds it but with the neutral zone the released code
    used; and (low, high, advantages)."""
    entropy, mask, advantages = case["in_entropy"], case["mask"], case["in_advantages"]
    low, high = case["in_cliprange_low"], case["in_cliprange_high"]
    ratio = torch.exp(logp - case["in_old_log_prob"])
    # take their ratio's value where it differs in the last bit, and the gradient of ours
    ratio = ratio + (case["out_ratio"] - ratio).detach()
    stats = hapo.entropy_stats(entropy, mask, case["in_entropy_pivot"])
    h = hapo.modulation(entropy, stats, mask, released=sign == "released")
    if case["in_adaptive_clip"] and sign != "plain":
        low, high = hapo.adaptive_clip(h * case["in_clip_alpha"], low, high)
    if case["in_adaptive_advantage"] and sign != "plain":
        advantages = hapo.redistribute_advantages(
            advantages, h * case["in_adv_beta"], ratio, low, high, released=True
        )
    per_token = losses.clipped_surrogate(ratio, advantages, low, high, case["in_clip_ratio_c"])
    # the release divides the sum by the width alone, not by the responses
    by_width = dict(length=mask.shape[1], normalizer=1)
    mean, how = {
        "token-mean": (losses.masked_mean, {}),
        "seq-mean-token-mean": (losses.sequence_mean, {}),
        "seq-mean-token-sum": (losses.fixed_length_mean, dict(length=1)),
        "seq-mean-token-sum-norm": (losses.fixed_length_mean, by_width),
    }[case["in_loss_agg_mode"]]
    return mean(per_token, mask, **how), (low, high, advantages)


@pytest.mark.parametrize("sign", [*SIGNS, "plain"])
def test_loss_and_gradient(case, sign):
    mask, logp = case["mask"], case["in_log_prob"].clone().requires_grad_()
    loss, (low, high, advantages) = loss_pass(case, sign, logp)
    if sign != "plain":
        expand = lambda x: torch.as_tensor(x, dtype=torch.float64).expand(mask.shape)
        close(expand(low), case[f"out_clip_low_{sign}"], mask)
        close(expand(high), case[f"out_clip_high_{sign}"], mask)
        close(advantages, case[f"out_adv_{sign}"], mask)
    loss.backward()
    theirs = case[f"out_loss_{sign}"]
    # a response without tokens under sequence mean: 0 / 0 there, a response that adds 0 here
    if theirs.isnan():
        assert not mask.any(1).all() and loss.isfinite() and logp.grad.isfinite().all()
        return
    close(loss, theirs)
    close(logp.grad, case[f"out_grad_log_prob_{sign}"], mask)
    assert (logp.grad[~mask] == 0).all()


def test_temperature(case):
    stats = hapo.entropy_stats(case["in_entropy"], case["mask"], case["in_entropy_pivot"])
    logits = case["in_sampler_logits"]
    now = torch.distributions.Categorical(logits=logits.clamp_min(-1e30)).entropy()
    if logits.isfinite().all():
        now = from_logits(logits, torch.zeros(len(logits), dtype=torch.long))[1]
    base, tau = torch.as_tensor(case["in_base_temperature"]).double(), case["in_temperature_tau"]
    # near 0 nats the entropy of a float32 softmax, as the release computes it, is rounding noise
    compare = (now > 1e-5) & logits.isfinite().all(1)
    for sign in SIGNS:
        ours = hapo.adaptive_temperature(
            now, stats, base=base, tau=tau, released=sign == "released"
        )
        # and the release does not clamp h
        h_unclamped = (case[f"out_temp_{sign}_f64"] / base - 1) / tau
        limit = base * (1 + tau * h_unclamped.clamp(-1, 1))
        close(ours[compare], limit[compare], tolerance=1e-5)


def from_logits(logits, labels, **how):
    """Our chunked function at the logits themselves."""
    eye = torch.eye(logits.shape[-1], dtype=torch.float64)
    return losses.token_logprobs_and_entropy(logits, eye, labels, **how)


@pytest.mark.parametrize("case", [c for c in CASES if "in_logits" in c], ids=lambda c: c["id"])
def test_from_logits_down_to_the_logits(case):
    """Log-probability, entropy and the gradient of the loss."""
    logits = case["in_logits"].clone().requires_grad_()
    logp, entropy = from_logits(logits, torch.tensor(case["in_labels"]), chunk_tokens=3)
    close(logp, case["out_logprobs_from_logits"], case["mask"])
    close(entropy, case["out_entropy_from_logits"], case["mask"])
    loss, _ = loss_pass(case, "corrected", logp)
    loss.backward()
    close(logits.grad, case["out_grad_logits_corrected"])
