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

# ------------------------------------------------------------------------------ what entropy steers


@pytest.mark.parametrize(
    "name, args",
    [
        ("forking_token_mask", ("entropy", "mask", 0.2, "pool")),
        ("archer_bounds", ("entropy", "mask", 0.8, 0.5, 0.2)),
        ("entropy_advantage", ("logp", "entropy")),
        ("edge_weight", ("pool", 2)),
        ("truncated_weight", ("logp", "entropy")),
    ],
)
def test_no_function_changes_its_inputs(unchanged, name, args):
    tensors = {
        "logp": torch.randn(4, 5),
        "entropy": torch.rand(4, 5),
        "mask": torch.rand(4, 5) < 0.7,
        "pool": torch.rand(4),
    }
    args = [tensors[a] if isinstance(a, str) else a for a in args]
    unchanged(getattr(baselines, name), *args)


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


def test_archer_has_two_classes():
    entropy, classes = torch.arange(5.0)[None], dict(clip_high_entropy=0.5, clip_low_entropy=0.2)
    bounds = baselines.archer_bounds(entropy, torch.ones(1, 5), quantile=0.5, **classes)
    assert bounds.tolist() == [pytest.approx([0.2, 0.2, 0.2, 0.5, 0.5])]


def test_entropy_advantage_cannot_turn_a_sign():
    advantages, entropy = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([0.5, 100.0, 5.0])
    result = baselines.entropy_advantage(advantages, entropy, alpha=0.4, kappa=2.0)
    assert result.tolist() == pytest.approx([1.2, -0.5, 0.0])


def test_edge_divides_by_relative_entropy():
    # entropies 1 and 3, mean 2: relative 0.5 and 1.5
    weight = baselines.edge_weight(torch.tensor([1.0, 3.0]), 2)
    assert weight.tolist() == pytest.approx([2.0, 1 / 1.5])


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


def test_archer_compares_a_token_with_its_own_answer():
    # medians 2 and 20; the third entry of the second row is padding
    entropy = torch.tensor([[1.0, 2.0, 3.0], [20.0, 30.0, 99.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    bounds = baselines.archer_bounds(entropy, mask, 0.5, 0.9, 0.1)
    assert bounds[0].tolist() == pytest.approx([0.1, 0.1, 0.9])
    assert bounds[1, :2].tolist() == pytest.approx([0.1, 0.9])


def test_edge_is_bounded_where_an_entropy_vanishes():
    weight = baselines.edge_weight(torch.tensor([0.0, 3.0, 3.0]), 3)
    assert weight.tolist() == pytest.approx([10, 2 / 3, 2 / 3])
    assert baselines.edge_weight(torch.zeros(2), 2).isfinite().all()


# ------------------------------------------------------------------------- which layers move, when


def bupo_options(baseline):
    return SimpleNamespace(
        bupo_baseline=baseline, bupo_layer="2", bupo_steps=1, bupo_norm=False, lr=1e-3
    )


def test_layers_above_the_layer_learn_at_a_tenth():
    model = random_model(layers=3)
    groups = baselines.groups_by_layer(model)
    assert [g["layer"] for g in groups] == [0, 1, 2, 3]
    everything = [p for g in groups for p in g["params"]]
    assert {id(p) for p in everything} == {id(p) for p in model.parameters()}
    assert len(everything) == len(list(model.parameters()))
    for g in groups:
        g["peak_lr"] = 1e-3
    optimizer = SimpleNamespace(param_groups=groups)
    run = SimpleNamespace(layer=1, options=bupo_options("layer-lr"))
    run.engine = SimpleNamespace(optimizer=optimizer, policy=model)
    baselines.set_trainable_weights(1, run)
    assert [g["peak_lr"] for g in groups] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])


def test_what_keeps_still_in_the_first_phase():
    model = random_model(layers=3)
    layers = [set(map(id, block.parameters())) for block in model.model.layers]
    for baseline, still in (("freeze", {0, 1}), ("one-layer", {0, 2, None})):
        engine = SimpleNamespace(policy=model)
        run = SimpleNamespace(engine=engine, layer=2, options=bupo_options(baseline))
        baselines.set_trainable_weights(1, run)
        for name, p in model.named_parameters():
            home = next((i for i, own in enumerate(layers) if id(p) in own), None)
            assert p.requires_grad == (home not in still), name
        baselines.set_trainable_weights(2, run)
        assert all(p.requires_grad for p in model.parameters())


# --------------------------------------------------------------------------------------- the others


def test_two_temperatures_by_hand():
    x = torch.tensor([-3.0, -1.0, 0.5])  # of a pivot at -1
    stats = EntropyStats(torch.tensor(-1.0), None, None, None)
    heat = baselines.two_temperatures(x.exp(), stats, base=2.0, tau=0.1)
    assert heat.tolist() == pytest.approx([1.8, 2.0, 2.2])
    assert baselines.two_temperatures(x.exp(), None, base=0.7, tau=0.1).tolist() == pytest.approx(
        [0.7] * 3
    )


def test_every_arm_is_an_option_and_every_option_an_arm():
    from run.options import Options

    choices = lambda name: set(Options.__dataclass_fields__[name].metadata["choices"])
    known = {*baselines.ADVANTAGE_BASELINES, *baselines.LOSS_BASELINES}
    assert choices("baseline") == known | {"none"}


def test_a_default_run_enters_no_baseline(opened, monkeypatch):
    def never(*args):
        raise AssertionError("a default step has called a baseline")

    for name, value in vars(baselines).items():
        if getattr(value, "__module__", None) == "run.baselines":
            monkeypatch.setattr(baselines, name, never)
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
    for new, advantage, learns in (
        (0.74, 1.0, True),
        (0.76, 1.0, False),
        (0.46, -1.0, True),
        (0.44, -1.0, False),
        (0.76, -1.0, True),  # back again
    ):
        logp = torch.tensor(new).log().requires_grad_()
        ratio = losses.likelihood_ratio(logp, torch.tensor(0.6).log())
        bound = baselines.divergence_bounds(torch.tensor(0.6).log())
        losses.clipped_surrogate(ratio, torch.tensor(advantage), bound, bound).backward()
        assert bool(logp.grad != 0) == learns


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


def a_rival(name, ratios, advantages, mask=None, high=0.28):
    """(loss, gradient of logp, ratio) of one answer of some tokens."""
    logp = torch.tensor([ratios]).log().requires_grad_()
    ones = torch.ones_like(logp)
    batch = SimpleNamespace(
        old=SimpleNamespace(logp=torch.zeros_like(logp)),
        advantages=torch.tensor([advantages]),
        loss_mask=ones.bool() if mask is None else torch.tensor([mask]).bool(),
    )
    options = SimpleNamespace(clip_high=high, baseline=name, dual_clip=0.0, loss_mean="token")
    found = baselines.policy_loss(logp, batch, slice(0, 1), options)
    loss, ratio, low, high, _, mean = found
    assert mean == ("sequence" if name == "gspo" else "token")
    bounds = {"gspo": (3e-4, 4e-4), "cispo": (math.inf, math.inf)}[name]
    assert (low.mean().item(), high.mean().item()) == pytest.approx(bounds)
    loss.sum().backward()
    return loss, logp.grad[0].tolist(), ratio


def test_cispo_by_hand():
    """Gradient of log p: minus A times the ratio, at most 1.28; no token is left out."""
    _, gradient, _ = a_rival("cispo", [0.5, 1.0, 2.0, 2.0], [1.0, 1.0, 1.0, -1.0])
    assert gradient == pytest.approx([-0.5, -1.0, -1.28, 1.28])


def test_gspo_by_hand():
    """Ratios 2 and 1/2 make 1; 1.21 and 1 make 1.1; padding counts nothing. Inside the bounds each
    token's gradient is -A s / n; outside, the way the advantage asks for, it is none."""
    _, gradient, ratio = a_rival("gspo", [2.0, 0.5, 7.0], [1.0, 1.0, 0.0], [1, 1, 0])
    assert ratio[0].tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert gradient == pytest.approx([-1.0, -1.0, 0.0])  # two tokens, each by both losses' halves
    for advantage, expected in ((1.0, [0.0, 0.0]), (-1.0, [1.1, 1.1])):
        _, gradient, ratio = a_rival("gspo", [1.21, 1.0], [advantage] * 2)
        assert ratio[0].tolist() == pytest.approx([1.1, 1.1])
        assert gradient == pytest.approx(expected)


@pytest.mark.parametrize("name", ["dppo", "quantile", "cispo", "gspo"])
def test_a_rival_s_step_learns(opened, monkeypatch, name):
    verdicts(monkeypatch, True, False)
    run = opened("--algo", "dapo", "--baseline", name)
    step = train.train_step(1, run)
    assert step.updates[0].outcome == "applied" and step.updates[0].grad_norm > 0
    metrics = report.step_metrics(step, report.weight_sample(run), run)
    assert metrics["ratio_off_before_update"] == 0
    assert run.options.loss_mean == ("sequence" if name == "gspo" else "token")
    if name == "cispo":
        assert metrics["clip_low"] == metrics["clip_high"] == metrics["outside_before_update"] == 0
    shown = train.inspect_group(step, run)
    if name == "gspo":  # one ratio an answer, and its own bounds
        assert (shown["ratio"].max(1).values - 1).abs().max() > 4e-4 and shown["clipped"].any()


def test_one_layer_for_a_whole_run(opened):
    """--bupo-baseline one-layer with as many steps as the run has: nothing else ever moves."""
    how = "--algo grpo --bupo-layer 2 --bupo-baseline one-layer --steps 3 --bupo-steps 3"
    run = opened(*how.split())
    before = {n: p.detach().clone() for n, p in run.policy.named_parameters()}
    for step in (1, 2, 3):
        train.train_step(step, run)
    for name, p in run.policy.named_parameters():
        assert "layers.1." in name or torch.equal(p, before[name]), name


@pytest.mark.parametrize(
    "given, message",
    [
        ("--baseline gspo --clip-high 0.3", "--baseline gspo: has its own bounds"),
        ("--baseline dppo --clip-low 0.1", "--baseline dppo: has its own bounds"),
        (
            "--baseline cispo --clip-low 0.1",
            "--clip-low 0.1: does nothing with",
        ),
        ("--baseline cispo --kl 0.1", "--kl 0.1: does nothing with --baseline cispo"),
        ("--baseline gspo --dual-clip 3", "--dual-clip 3.0: does nothing with --baseline gspo"),
        ("--baseline gspo --sampler-correction", "--sampler-correction True: does nothing with"),
        ("--baseline gspo --loss-mean token", "--loss-mean token: --baseline gspo averages over"),
        ("--baseline quantile --advantage rloo", "--baseline quantile replaces it"),
    ],
)
def test_what_a_rival_has_of_its_own_is_not_set_twice(given, message):
    with pytest.raises(UserError, match=message):
        option_checks.parse(["--estimate", "--algo", "dapo", *given.split()], "")
