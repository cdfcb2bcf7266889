"""The signal: entropies one can trust, first ratios of one, whole steps against a naive one."""

import copy
import math
import zlib

import pytest
import torch
from conftest import changed_scores, drawn, given_batch, random_model, sharpened, verdicts

import losses
import sampling
import train
from common.errors import UserError
from engine import decoding, forward
from engine.logprobs import chunked_logprobs_and_entropy
from problems.grading import Grade
from run import baselines, option_checks, report

# --------------------------------------------------------------------------- entropies, row by row


def rows_of_entropy(vocab=1000):
    """Logits whose entropies run from about 1e-8 nats to ln V, as a lone peak over noise."""
    noise = torch.randn(400, vocab, generator=torch.Generator().manual_seed(0))
    noise[:, 7] = torch.linspace(36.0, 2.0, 400)  # the height of the peak
    shift = 20 * torch.randn(400, 1, generator=torch.Generator().manual_seed(1))
    flat = torch.zeros(1, vocab)
    return torch.cat([noise + shift, flat])


def exact(logits, targets):
    """log p[target] and entropy in float64."""
    log_probs = logits.double().log_softmax(-1)
    probs = log_probs.exp()
    # 1 - p of the likeliest id is the sum of the others, which loses nothing
    top = logits.argmax(-1, keepdim=True)
    rest = probs.scatter(-1, top, 0).sum(-1)
    log_probs = log_probs.scatter(-1, top, torch.log1p(-rest)[:, None])
    entropy = -(probs * log_probs).sum(-1)
    return log_probs.gather(-1, targets[:, None]).squeeze(-1), entropy


def sampled(draw):
    def scores(logits, targets):
        # u picks the likeliest id, which is the target here
        one = draw(logits, 1.0, torch.full((len(logits),), 0.5))
        return losses.row_logprobs_and_entropy(logits, targets)[0], one.entropy

    return scores


SCORERS = (chunked_logprobs_and_entropy, losses.token_logprobs_and_entropy)
WAYS = {
    "scorer": lambda z, targets: SCORERS[0](z, torch.eye(z.shape[1]), targets),
    "plain scorer": lambda z, targets: SCORERS[1](z, torch.eye(z.shape[1]), targets),
    "sampler": sampled(lambda *args: decoding.Draw()(*args, measure_entropy=True)),
    "plain sampler": sampled(sampling.draw),
}


@pytest.mark.parametrize("way", WAYS)
def test_entropies_from_nothing_to_everything(way):
    logits = rows_of_entropy()
    targets = logits.argmax(-1)
    logp, entropy = WAYS[way](logits, targets)
    expected_logp, expected = exact(logits, targets)
    assert expected.min() < 2e-8 and expected.max() == pytest.approx(math.log(1000))
    assert ((entropy - expected).abs() / expected).max() < 1e-4
    assert ((logp - expected_logp).abs() / expected_logp.abs()).max() < 1e-4
    assert (entropy >= 0).all()


@pytest.mark.parametrize("scorer", SCORERS)
def test_entropies_under_autocast_are_those_of_its_own_logits(scorer):
    """bfloat16 products, and nothing else in bfloat16."""
    hidden, weight = torch.randn(300, 32), torch.randn(500, 32)
    hidden *= torch.linspace(0.1, 4, 300)[:, None]
    targets = torch.randint(0, 500, (300,))
    with torch.autocast("cpu", torch.bfloat16):
        got = scorer(hidden, weight, targets, 0.8)
        logits = hidden @ weight.T
    assert logits.dtype == torch.bfloat16 and got[1].dtype == torch.float32
    logp, entropy = exact(logits.float() / 0.8, targets)
    seen = entropy > 1e-7
    assert seen.sum() > 200 and (entropy < 1e-3).any()
    assert ((got[1] - entropy).abs() / entropy)[seen].max() < 1e-2
    torch.testing.assert_close(got[0].double(), logp, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_rows_without_a_choice(way):
    # the scorer's logits are products: no infinity there
    lone = torch.full((2, 9), -3e38 if "scorer" in way else -torch.inf)
    lone[:, 3] = torch.tensor([-5.0, 1e4])
    for logits in (lone, torch.tensor([[2.5], [-1e30]])):  # all but one hidden; a single id
        targets = logits.argmax(-1)
        logp, entropy = WAYS[way](logits, targets)
        assert (logp == 0).all() and (entropy == 0).all()


@pytest.mark.parametrize("make", [decoding.Draw, lambda: sampling.draw], ids=["fast", "plain"])
def test_a_bad_logit_shows_and_a_drawn_log_probability_is_exact(make):
    """NaN must not travel: `generate` looks at what is drawn and names the position."""
    for bad in (math.nan, math.inf):
        logits = torch.randn(3, 9)
        logits[1, 4] = bad
        logp = make()(logits, 1.0, torch.full((3,), 0.3)).logp
        assert logp.isfinite().tolist() == [True, False, True]
    logits = rows_of_entropy()
    one = make()(logits, 0.7, torch.full((len(logits),), 1e-9))
    expected, _ = exact(logits / 0.7, one.tokens)
    assert ((one.logp - expected).abs() / expected.abs()).max() < 1e-4


def test_a_low_precision_replica_is_sampled_at_its_products():
    """A bfloat16 model's logits in the sampler: hidden states times unembedding, float32."""
    model = random_model().bfloat16().eval()
    ids = torch.tensor([[5, 6, 7]])
    cache, position = sampling.DynamicCache(), torch.arange(3)[None]
    with torch.no_grad():
        logits = forward.next_logits(model, ids, None, position, cache)
        states = model.model(ids).last_hidden_state[:, -1]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, (states @ model.lm_head.weight.T).float())


# ------------------------------------------------------------------------------------------ ratios


def test_a_wild_log_ratio_neither_overflows_nor_leaves_a_nan():
    logp = torch.tensor([[100.0, -100.0, 0.5]], requires_grad=True)
    ratio = losses.likelihood_ratio(logp, torch.zeros(1, 3))
    assert ratio.tolist()[0] == pytest.approx([math.exp(20), math.exp(-20), math.exp(0.5)])
    advantages = torch.tensor([[1.0, -1.0, -1.0]])
    loss = losses.clipped_surrogate(ratio, advantages, 0.2, 0.2)
    (loss + losses.kl_k3(logp, torch.zeros(1, 3))).sum().backward()
    assert logp.grad.isfinite().all() and (logp.grad[0, :2] == 0).all()
    assert losses.kl_k3(torch.tensor(-100.0), torch.tensor(0.0)).isfinite()


@pytest.fixture
def opened(opened, monkeypatch):
    """opened(*options): a run on a random model with sharp logits, its verdicts invented."""
    verdict = lambda problem, text, *more: Grade(*[zlib.crc32(text.encode()) % 3 == 0] * 2)
    monkeypatch.setattr("train.grade", verdict)
    sizes = "--prompts-per-step 2 --num-generations 6 --max-new-tokens 8 --grad-clip 1e6 --lr 1e-4"
    return lambda *more: sharpened(opened(*sizes.split(), *more))


PASSES = """ | --micro-batch 6 | --micro-tokens 120 | --gradient-checkpointing | --plain
 | --dtype bfloat16 | --dtype bfloat16 --micro-tokens 120""".replace("\n", "").split(" | ")


@pytest.mark.parametrize("more", PASSES)
def test_the_first_ratios_are_exactly_one(opened, monkeypatch, more):
    verdicts(monkeypatch, True, False)
    run = opened(*more.split())
    for number in (1, 2):
        step = train.train_step(number, run)
        metrics = report.step_metrics(step, report.weight_sample(run), run)
        assert metrics["updates"] == 1 and metrics["ratio_max"] == 1
        assert metrics["outside_before_update"] == metrics["ratio_off_before_update"] == 0


def test_the_first_ratios_of_several_updates(opened):
    run = opened("--prompts-per-step", "4", "--updates-per-rollout", "2")
    step = train.train_step(1, run)
    (_, first), (_, second) = report.largest_ratios(step.updates, step.batch, run)
    assert first == 0 and second > 0
    metrics = report.step_metrics(step, report.weight_sample(run), run)
    assert metrics["ratio_off_before_update"] == 0 and metrics["ratio_max"] > 1


def test_ratios_beyond_the_limit_are_counted(opened, monkeypatch):
    run = opened("--algo", "dapo")
    changed_scores(monkeypatch, run, lambda s, model: s._replace(logp=s.logp - 30.0))
    step = train.train_step(1, run)
    counts = report.clip_counts(step.updates, step.batch)
    assert counts["clamped"] == counts["tokens"] > 0 and step.updates[0].outcome == "applied"


# ------------------------------------------------------------------- a whole step, against a naive


def naive_scores(model, rollout, T, layer=None, vocab=None):
    """Log-probabilities and entropies, (B, T), from one unpadded float64 pass an answer."""
    logp, entropy = [], []
    for row, answer in enumerate(rollout.responses()):
        g = row // rollout.group_size
        prompt = rollout.prompt[g][rollout.prompt_mask[g]].tolist()
        out = model(torch.tensor([prompt + answer]), output_hidden_states=True)
        states = model.lm_head(out.hidden_states[layer]) if layer else out.logits
        log_probs = (states[0, len(prompt) - 1 : -1, :vocab] / T).log_softmax(-1)
        logp.append(log_probs[range(len(answer)), answer])
        entropy.append(-(log_probs.exp() * log_probs).sum(-1).detach())
    width = rollout.mask.shape[1]
    return tuple(
        torch.stack([torch.nn.functional.pad(x, (0, width - len(x))) for x in values])
        for values in (logp, entropy)
    )


def naive_h(entropy, mask, released):
    x = entropy.clamp_min(1e-8).log()
    values = sorted(x[mask].tolist())
    pivot = values[round(0.8 * (len(values) - 1))]
    h = torch.zeros_like(x)
    for b, t in mask.nonzero().tolist():
        d = x[b, t].item() - pivot
        h[b, t] = d / (values[-1] - pivot) if d > 0 else d / (pivot - values[0])
        if released and d <= 0:
            h[b, t] = -h[b, t]
    return h


def naive_advantages(rewards, mask, G, by_token, released):
    """Eq. 9 or GRPO's, group by group; the release replaces a group with some |A| >= 5."""
    result = torch.zeros(mask.shape, dtype=torch.float64)
    for g in range(0, len(rewards), G):
        rows = slice(g, g + G)
        r, lengths = rewards[rows], mask[rows].sum(1)
        grpo = (r - r.mean()) / (r.std() + 1e-6)
        every = torch.repeat_interleave(r, lengths)
        token = (r - every.mean()) / (every.std(correction=0) + 1e-6)
        values = token if by_token and not (released and (token.abs() >= 5).any()) else grpo
        if r.max() > r.min():
            result[rows] = values[:, None] * mask[rows]
    return result


def naive_loss(run, batch, noise, layer):
    """The loss of a step's one update from its definition; gradients flow into a float64 copy."""
    o, rollout, G = run.options, batch.rollout, run.options.num_generations
    policy = copy.deepcopy(run.policy).double().eval()
    for module in policy.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
    logp, entropy = naive_scores(policy, rollout, o.temperature, layer, run.vocab_size)
    old = logp.detach() + noise[: len(logp), : logp.shape[1]]
    mask, loss_mask = rollout.mask, rollout.mask & batch.in_loss[:, None]
    by_token = o.algo == "hapo"
    advantages = naive_advantages(batch.rewards.double(), loss_mask, G, by_token, o.released)
    ratio, low, high = (logp - old).exp(), o.clip_low, o.clip_high
    if o.algo == "hapo":
        full = entropy
        if layer:  # in BuPO's phase 1 the full policy's entropy steers
            full = naive_scores(policy, rollout, 1.0, None, run.vocab_size)[1]
        h = naive_h(full, mask, o.released)
        wide_low = low * (1 - h.clamp_max(0)) if not o.released else low * torch.ones_like(h)
        wide_high = high * (1 + h.clamp_min(0))
        zone = (wide_low, wide_high) if o.released else (low, high)
        inside = (ratio > 1 - zone[0] / 2) & (ratio < 1 + zone[1] / 2)
        advantages = torch.where((h > 0) ^ inside, advantages * (1 + h), advantages)
        low, high = wide_low, wide_high
    clipped = torch.minimum(torch.maximum(ratio, 1 - low + 0 * ratio), 1 + high + 0 * ratio)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if o.kl:
        reference = copy.deepcopy(run.reference).double()
        d = naive_scores(reference, rollout, o.temperature, None, run.vocab_size)[0] - logp
        loss = loss + o.kl * (d.exp() - d - 1)
    if o.loss_mean == "sequence":
        loss = ((loss * loss_mask).sum(1) / mask.sum(1)).sum() / batch.in_loss.sum()
    else:
        loss = (loss * loss_mask).sum() / loss_mask.sum()
    loss.backward()
    return loss.item(), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}


SETTINGS = """grpo | dapo | hapo | hapo --temperature 0.8 | hapo --temperature 1.3
 | hapo --released | hapo --micro-batch 3 | hapo --micro-tokens 150
 | hapo --gradient-checkpointing | grpo --dynamic-sampling --max-rounds 2 | dapo --kl 0.3
 | grpo --bupo-layer 1 --bupo-steps 2 | hapo --bupo-layer 2 --bupo-steps 2"""


@pytest.mark.parametrize("setting", SETTINGS.replace("\n", "").split(" | "))
def test_a_whole_step_against_a_naive_one(opened, monkeypatch, setting):
    run, seen = opened("--algo", *setting.split()), {}
    noise = 0.25 * torch.randn(48, 12, generator=torch.Generator().manual_seed(5))
    if run.reference is not None:
        with torch.no_grad():
            run.reference.model.norm.weight.mul_(1.2)

    def off(scores, model):
        """The old policy is a little off, so that ratios are anywhere around 1."""
        logp = scores.logp + noise[: len(scores.logp), : scores.logp.shape[1]] * (scores.logp != 0)
        return scores if model is run.reference else scores._replace(logp=logp)

    def step(optimizer):
        named = run.policy.named_parameters()
        seen.update({n: p.grad.clone() for n, p in named if p.grad is not None})

    changed_scores(monkeypatch, run, off)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    done = train.train_step(1, run)
    (update,) = done.updates
    loss, gradients = naive_loss(run, done.batch, noise, done.layer)
    counts = report.clip_counts([update], done.batch)
    assert update.outcome == "applied" and counts["clip_low"] + counts["clip_high"] > 0
    assert update.loss == pytest.approx(loss, abs=1e-5, rel=1e-5)
    ours = torch.cat([seen[name].flatten() for name in seen]).double()
    theirs = torch.cat([gradients[name].flatten() for name in seen])
    assert (ours - theirs).norm() / theirs.norm() < 1e-4
    for name in gradients.keys() - seen.keys():  # above the aligned layer
        assert (gradients[name] == 0).all()


def test_a_fifth_of_the_tokens_is_heated_at_any_temperature(opened):
    """The sampler compares entropies of raw logits with statistics of entropies of raw logits."""
    for T in (0.6, 1.3):
        run = opened("--temperature", str(T), "--prompts-per-step", "16", "--lr", "0")
        train.train_step(1, run)
        rollout = train.train_step(2, run).batch.rollout
        heated = (rollout.temperature > T)[rollout.mask].float().mean().item()
        assert 0.14 < heated < 0.26, T


def test_statistics_are_logged_and_the_sampler_against_scorer(opened):
    run = opened()
    step = train.train_step(1, run)
    rollout, sample = step.batch.rollout, report.weight_sample(run)
    metrics = report.step_metrics(step, sample, run)
    x = step.batch.full.entropy[rollout.mask].clamp_min(1e-8).log()
    assert metrics["h_max"] == pytest.approx((x.max() - metrics["pivot"]).item(), rel=1e-5)
    assert metrics["h_min"] == pytest.approx((x.min() - metrics["pivot"]).item(), rel=1e-5)
    assert 0 <= metrics["at_floor"] <= 1 and metrics["sigma"] > 0
    assert metrics["sampler_off"] < 1e-4 and abs(metrics["sampler_kl"]) < 1e-8
    rollout.logp -= 0.1 * rollout.mask  # a sampler that is off by 0.1 nats
    metrics = report.step_metrics(step, sample, run)
    assert metrics["sampler_off"] == pytest.approx(0.1, rel=1e-3)
    assert metrics["sampler_kl"] == pytest.approx(math.exp(0.1) - 1.1, rel=1e-2)
    assert metrics["sampler_gap"] == pytest.approx(-0.1, rel=1e-3)


def test_the_correction_weighs_tokens(opened, monkeypatch):
    monkeypatch.setattr(losses, "grpo_advantages", lambda rewards, size: torch.ones_like(rewards))
    verdicts(monkeypatch, True, False)
    for excess, weight in ((0.0, 1.0), (0.5, math.exp(0.5)), (3.0, 2.0)):
        run = opened("--algo", "dapo", "--sampler-correction")
        batch = drawn(run)
        rows = [slice(0, len(batch.texts))]
        scores = run.engine.batch_logprobs(run.policy, batch.rollout, rows, None)
        batch.rollout.logp = scores.logp - excess
        with monkeypatch.context() as patch:
            given_batch(patch, batch)
            (update,) = train.train_step(1, run).updates
        assert update.loss == pytest.approx(-weight, rel=1e-5)
    with pytest.raises(UserError, match="--sampler-correction True: the sampler does not"):
        option_checks.parse("--estimate --sampler-correction --bupo-layer 1".split(), "")


def test_the_correction_undoes_the_sampler_s_heat(opened):
    """With A, tokens are drawn at T: their weight is p / p_T, at most 2. By hand, for logits z: one
    token in two is the first; p = softmax(z), p_T = softmax(z / T)."""
    z, T = torch.tensor([1.0, 0.0]), 1.5
    p, tempered = z.softmax(0), (z / T).softmax(0)
    weight = baselines.truncated_weight(p.log(), tempered.log())
    assert weight.tolist() == pytest.approx([0.73106 / 0.66076, 0.26894 / 0.33924], rel=1e-4)
    assert (weight * tempered).sum().item() == pytest.approx(1.0)  # unbiased where nothing is cut
    run = opened("--sampler-correction", "--tau", "0.9")
    train.train_step(1, run)
    batch = train.train_step(2, run).batch
    heated = batch.rollout.temperature[batch.rollout.mask] != 1
    off = (batch.importance_weights[batch.rollout.mask] - 1).abs()
    assert heated.any() and off[heated].max() > 1e-3 and batch.importance_weights.max() <= 2


def test_cudnn_attention_is_off():
    cuda = torch.backends.cuda
    assert not cuda.cudnn_sdp_enabled()
    assert cuda.flash_sdp_enabled() and cuda.mem_efficient_sdp_enabled()


def test_no_comparison_wakes_a_dead_group(opened, monkeypatch):
    verdicts(monkeypatch, False)
    for arm in ("entropy-advantage", "edge", "forking", "archer"):
        run = opened("--algo", "dapo", "--baseline", arm, "--temperature", "0.8")
        assert train.train_step(1, run).updates == [train.Update()]
