"""run/baselines.py: what is only there to be compared with, each by hand and in a step."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model, verdicts

import losses
import train
from common.errors import UserError
from hapo import EntropyStats
from run import baselines, option_checks, report
from run.options import Options

# ------------------------------------------------------------------------------ what entropy steers


def test_no_function_changes_its_inputs(unchanged):
    logp, entropy, mask = torch.randn(4, 5), torch.rand(4, 5), torch.rand(4, 5) < 0.7
    unchanged(baselines.forking_token_mask, entropy, mask, 0.2, torch.rand(4))
    unchanged(baselines.archer_bounds, entropy, mask, 0.8, 0.5, 0.2)
    unchanged(baselines.entropy_advantage, logp, entropy)
    unchanged(baselines.edge_weight, torch.rand(4), 2)
    unchanged(baselines.truncated_weight, logp, entropy)


def test_forking_tokens_keep_the_top_share(unchanged):
    entropy = torch.tensor([[0.1, 0.9, 0.2, 7.0], [0.8, 0.3, 7.0, 7.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    kept = unchanged(baselines.forking_token_mask, entropy, mask, 0.4)  # 5 valid tokens: 2 stay
    assert kept.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    pool = torch.tensor([0.25, 0.1, 0.1, 0.1, 0.1])
    kept = baselines.forking_token_mask(entropy, mask, 0.2, pool=pool)
    assert kept.tolist() == [[0, 1, 0, 0], [1, 1, 0, 0]]
    assert baselines.forking_token_mask(entropy, mask * 0).sum() == 0


def test_equal_contexts_have_equal_entropies(unchanged):
    """Two groups of three answers: a token behind the same text as one before has its entropy."""
    tokens = torch.tensor([[5, 6, 7], [5, 6, 8], [5, 9, 7], [5, 6, 7], [4, 6, 7], [5, 6, 9]])
    entropy = torch.arange(18.0).view(6, 3)
    same = unchanged(baselines.of_equal_contexts, entropy, tokens, 3)
    first, second = [[0, 1, 2], [0, 1, 2], [0, 1, 8]], [[9, 10, 11], [9, 13, 14], [9, 10, 11]]
    assert same.tolist() == first + second


def test_forking_parts_no_equal_tokens(opened, monkeypatch):
    """The first tokens of a group have one entropy, whatever rounding makes of it: they all learn
    or none does, also where the threshold falls among them."""
    verdicts(monkeypatch, True, False, False)
    sizes = "--num-generations 8 --max-new-tokens 3".split()
    run = opened("--algo", "dapo", "--baseline", "forking", *sizes)
    batch = train.train_step(1, run).batch
    noise = 1e-6 * torch.arange(32.0)[:, None]
    entropy = torch.full_like(batch.full.entropy, 0.1) + noise
    entropy[:, 0] += 1 + torch.arange(4.0).repeat_interleave(8)
    batch.full = batch.full._replace(entropy=entropy)
    keep = round(0.2 * int(batch.loss_mask.sum()))
    assert keep < 32 and keep % 8 > 0, "the threshold lies within a group's first tokens"
    advantages = baselines.change_advantages(torch.ones_like(entropy), batch, run)
    kept = (advantages[:, 0] != 0).view(4, 8)
    assert kept.sum() == 8 * (keep // 8 + 1) and torch.equal(kept, kept[:, :1].expand(4, 8))


def test_archer_has_two_classes_within_each_answer():
    # medians 2 and 20; the third entry of the second row is padding
    entropy = torch.tensor([[1.0, 2.0, 3.0], [20.0, 30.0, 99.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    bounds = baselines.archer_bounds(entropy, mask, 0.5, 0.9, 0.1)
    assert bounds[0].tolist() == pytest.approx([0.1, 0.1, 0.9])
    assert bounds[1, :2].tolist() == pytest.approx([0.1, 0.9])


def test_entropy_advantage_cannot_turn_a_sign():
    advantages, entropy = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([0.5, 100.0, 5.0])
    result = baselines.entropy_advantage(advantages, entropy, alpha=0.4, kappa=2.0)
    assert result.tolist() == pytest.approx([1.2, -0.5, 0.0])


def test_edge_divides_by_relative_entropy_at_most_to_a_bound():
    # entropies 1 and 3, mean 2: relative 0.5 and 1.5
    weight = baselines.edge_weight(torch.tensor([1.0, 3.0, 0.0, 4.0]), 2)
    assert weight.tolist() == pytest.approx([2.0, 1 / 1.5, 10, 0.5])
    assert baselines.edge_weight(torch.zeros(2), 2).isfinite().all()


def test_forking_divides_by_all_tokens(opened, monkeypatch):
    """Wang et al.: tokens below the threshold add nothing, and stay in the mean."""
    verdicts(monkeypatch, True, False)
    run = opened("--algo", "dapo", "--baseline", "forking")
    step = train.train_step(1, run)
    batch = step.batch
    keeps = baselines.forking_token_mask(batch.full.entropy, batch.loss_mask.float())
    assert torch.equal(batch.advantages != 0, keeps.bool())
    tokens = report.clip_counts(step.updates[:1], batch)["tokens"]
    assert tokens == int(batch.rollout.mask.sum()) > 3 * int(keeps.sum())
    # before the first update every ratio is 1: the loss is minus the mean of A over all tokens
    expected = -(batch.advantages.sum() / batch.rollout.mask.sum()).item()
    assert step.updates[0].loss == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------------- which layers move, when


def a_run(baseline, model, layer):
    """What set_trainable_weights reads of a run, and its optimizer's groups."""
    groups = [{"peak_lr": 1e-3, **g} for g in baselines.groups_by_layer(model)]
    options = dict(bupo_baseline=baseline, bupo_layer="2", bupo_steps=1, bupo_norm=False, lr=1e-3)
    engine = SimpleNamespace(policy=model, optimizer=SimpleNamespace(param_groups=groups))
    return SimpleNamespace(engine=engine, layer=layer, options=SimpleNamespace(**options)), groups


def test_layers_above_the_layer_learn_at_a_tenth():
    model = random_model(layers=3)
    run, groups = a_run("layer-lr", model, 1)
    assert [g["layer"] for g in groups] == [0, 1, 2, 3]
    everything = [id(p) for g in groups for p in g["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())
    baselines.set_trainable_weights(1, run)
    assert [g["peak_lr"] for g in groups] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])


def test_what_keeps_still_in_the_first_phase():
    model = random_model(layers=3)
    layers = [set(map(id, block.parameters())) for block in model.model.layers]
    for baseline, still in (("freeze", {0, 1}), ("one-layer", {0, 2, None})):
        run, _ = a_run(baseline, model, 2)
        baselines.set_trainable_weights(1, run)
        for name, p in model.named_parameters():
            home = next((i for i, own in enumerate(layers) if id(p) in own), None)
            assert p.requires_grad == (home not in still), name
        baselines.set_trainable_weights(2, run)
        assert all(p.requires_grad for p in model.parameters())


def test_two_temperatures_by_hand():
    x = torch.tensor([-3.0, -1.0, 0.5])  # of a pivot at -1
    stats = EntropyStats(torch.tensor(-1.0), None, None, None)
    heat = baselines.two_temperatures(x.exp(), stats, base=2.0, tau=0.1)
    assert heat.tolist() == pytest.approx([1.8, 2.0, 2.2])
    heat = baselines.two_temperatures(x.exp(), None, base=0.7, tau=0.1)
    assert heat.tolist() == pytest.approx([0.7] * 3)


def test_every_arm_is_an_option_and_every_option_an_arm():
    choices = Options.__dataclass_fields__["baseline"].metadata["choices"]
    known = {*baselines.ADVANTAGE_BASELINES, *baselines.LOSS_BASELINES}
    assert set(choices) == known | {"none"}


def test_a_default_run_enters_no_baseline(opened, monkeypatch):
    for name, value in vars(baselines).copy().items():
        if getattr(value, "__module__", None) == "run.baselines":
            monkeypatch.setattr(baselines, name, None)  # a call is a TypeError
    run = opened()
    train.train_step(1, run)
    train.train_step(2, run)


# ----------------------------------------------------------------------------- the field's rivals


def test_divergence_bounds_by_hand():
    """delta / p_old: a token of 1 % may become 16 times as likely, one of 60 % lose a quarter."""
    old = torch.tensor([[0.01, 0.6, 1.0]])
    bounds = baselines.divergence_bounds(old.log())
    assert bounds[0].tolist() == pytest.approx([15.0, 0.25, 0.15], rel=1e-5)
    # the surrogate's gradient stops where p - p_old passes delta the way the advantage asks for
    logp = torch.tensor([0.74, 0.76, 0.46, 0.44, 0.76]).log().requires_grad_()  # the last: back
    advantages, old = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0]), torch.full((5,), 0.6).log()
    bound = baselines.divergence_bounds(old)
    ratio = losses.likelihood_ratio(logp, old)
    losses.clipped_surrogate(ratio, advantages, bound, bound).sum().backward()
    assert (logp.grad != 0).tolist() == [True, False, True, False, True]


def test_quantile_advantages_by_hand():
    """K = 0.4 of eight: the fourth smallest. Two right of eight: Q = 0, the right ones alone learn;
    six of eight: Q = 1, the wrong ones do. Sample deviations 0.4629."""
    hard, easy, dead = [1, 0, 0, 1, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1, 0, 1], [1] * 8
    rewards = torch.tensor(hard + easy + dead, dtype=torch.float)
    found = baselines.quantile_advantages(rewards, 8).view(3, 8)
    a = 1 / 0.46291
    assert found[0].tolist() == pytest.approx([a, 0, 0, a, 0, 0, 0, 0], rel=1e-4)
    assert found[1].tolist() == pytest.approx([0, -a, 0, 0, 0, 0, -a, 0], rel=1e-4)
    assert found[2].tolist() == [0] * 8
    # at p = 1 - K exactly, three right of five, the quantile is still 0
    boundary = baselines.quantile_advantages(torch.tensor([1.0, 1, 1, 0, 0]), 5)
    assert (boundary > 0).tolist() == [True, True, True, False, False]


def a_rival(name, ratios, advantages, mask=True):
    """(gradient of logp, ratio) of one answer of some tokens."""
    logp = torch.tensor([ratios]).log().requires_grad_()
    batch = SimpleNamespace(
        old=SimpleNamespace(logp=torch.zeros_like(logp)),
        advantages=torch.tensor([advantages]),
        loss_mask=torch.tensor([mask]).bool().expand_as(logp),
    )
    options = SimpleNamespace(clip_high=0.28, baseline=name, dual_clip=0.0, loss_mean="token")
    loss, ratio, low, high, _, mean = baselines.policy_loss(logp, batch, slice(0, 1), options)
    assert mean == ("sequence" if name == "gspo" else "token")
    bounds = {"gspo": (3e-4, 4e-4), "cispo": (math.inf, math.inf)}[name]
    assert (low.mean().item(), high.mean().item()) == pytest.approx(bounds)
    loss.sum().backward()
    return logp.grad[0].tolist(), ratio


def test_cispo_by_hand():
    """Gradient of log p: minus A times the ratio, at most 1.28; no token is left out."""
    gradient, _ = a_rival("cispo", [0.5, 1.0, 2.0, 2.0], [1.0, 1.0, 1.0, -1.0])
    assert gradient == pytest.approx([-0.5, -1.0, -1.28, 1.28])


def test_gspo_by_hand():
    """Ratios 2 and 1/2 make 1; 1.21 and 1 make 1.1; padding counts nothing. Inside the bounds each
    token's gradient is -A s / n; outside, the way the advantage asks for, it is none."""
    gradient, ratio = a_rival("gspo", [2.0, 0.5, 7.0], [1.0, 1.0, 0.0], [1, 1, 0])
    assert ratio[0].tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert gradient == pytest.approx([-1.0, -1.0, 0.0])  # two tokens, each by both losses' halves
    for advantage, expected in ((1.0, [0.0, 0.0]), (-1.0, [1.1, 1.1])):
        gradient, ratio = a_rival("gspo", [1.21, 1.0], [advantage] * 2)
        assert ratio[0].tolist() == pytest.approx([1.1, 1.1])
        assert gradient == pytest.approx(expected)


@pytest.mark.parametrize("name", ["dppo", "quantile", "cispo", "gspo", "archer"])
def test_a_rival_s_step_learns_within_its_own_bounds(opened, monkeypatch, name):
    verdicts(monkeypatch, True, False)
    run = opened("--algo", "dapo", "--baseline", name)
    step = train.train_step(1, run)
    (update,), batch, mask = step.updates, step.batch, step.batch.loss_mask
    assert update.outcome == "applied" and update.grad_norm > 0
    metrics = report.step_metrics(step, report.weight_sample(run), run)
    assert metrics["ratio_off_before_update"] == 0
    assert run.options.loss_mean == ("sequence" if name == "gspo" else "token")
    if name == "cispo":
        assert metrics["clip_low"] == metrics["clip_high"] == metrics["outside_before_update"] == 0
    lows = {"quantile": 0.2, "cispo": math.inf, "gspo": 3e-4, "dppo": 0.15 / batch.old.logp.exp()}
    lows["archer"] = baselines.archer_bounds(batch.full.entropy, mask)
    expected = torch.as_tensor(lows[name]).expand(mask.shape)[mask]
    torch.testing.assert_close(update.micro_batches[0].loss.clip_low[mask], expected)
    shown = train.inspect_group(step, run)
    if name == "gspo":  # one ratio an answer
        ratio = shown["ratio"]
        assert (ratio[:, 0] - 1).abs().max() > 4e-4 and torch.equal(ratio[:, 0], ratio[:, 1])
        assert shown["clipped"].any()


def test_one_layer_for_a_whole_run(opened):
    """--bupo-baseline one-layer with as many steps as the run has: nothing else ever moves."""
    how = "--algo grpo --bupo-layer 2 --bupo-baseline one-layer --steps 3 --bupo-steps 3"
    run = opened(*how.split())
    before = {n: p.detach().clone() for n, p in run.policy.named_parameters()}
    for step in (1, 2, 3):
        train.train_step(step, run)
    for name, p in run.policy.named_parameters():
        assert "layers.1." in name or torch.equal(p, before[name]), name


MISTAKES = """
gspo --clip-high 0.3 | --baseline gspo: has its own bounds
dppo --clip-low 0.1 | --baseline dppo: has its own bounds
cispo --clip-low 0.1 | --clip-low 0.1: does nothing with
cispo --kl 0.1 | --kl 0.1: does nothing with --baseline cispo
gspo --dual-clip 3 | --dual-clip 3.0: does nothing with --baseline gspo
gspo --sampler-correction | --sampler-correction True: does nothing with
gspo --loss-mean token | --loss-mean token: --baseline gspo averages over
quantile --advantage rloo | --baseline quantile replaces it
"""


def test_what_a_rival_has_of_its_own_is_not_set_twice():
    for line in MISTAKES.strip().splitlines():
        given, message = line.split(" | ")
        with pytest.raises(UserError) as error:
            option_checks.parse(f"--estimate --algo dapo --baseline {given}".split(), "")
        assert message in str(error.value)
