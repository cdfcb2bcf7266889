"""Decoding on static buffers, as a GPU replays it, here uncaptured: the plain loop's tokens, and no
question to the device between two looks at which rows have ended."""

import functools

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, Asks, random_model

import hapo
import sampling
from engine import cuda_graphs
from engine.decoding import generate
from sampling import NonFinite

PROMPTS = [[5, 6, 7, 8], [9], [10, 11], [4, 12, 4, 4, 13, 4]]
FIELDS = ("tokens", "mask", "finished", "logp", "entropy", "temperature")


@pytest.fixture(autouse=True)
def static(monkeypatch):
    """Small blocks, so that rows move and blocks of keys grow often, and no GPU needed."""
    monkeypatch.setattr(cuda_graphs, "why_not", lambda config, device: None)
    monkeypatch.setattr(cuda_graphs, "CHECK", 4)
    monkeypatch.setattr(cuda_graphs, "KEYS_STEP", 8)
    monkeypatch.setattr(cuda_graphs, "BUCKETS", (16, 8, 4, 2))


def same_as_plain(model, prompts=PROMPTS, answers=5, tokens=24, eos=(3, 4), **how):
    """The rollout, after a comparison with the plain loop's, which draws all rows at once."""
    draws = torch.rand(tokens, len(prompts) * answers, generator=torch.Generator().manual_seed(5))
    size = (prompts, answers, tokens, eos)
    whole = {k: v for k, v in how.items() if k not in ("decode_rows", "prefill_tokens")}
    plain = sampling.generate(model, *size, uniform=draws, **whole)
    ours = generate(model, *size, uniform=draws, **how)
    measured = callable(how.get("temperature")) or how.get("measure_entropy")
    for name in FIELDS:
        a, b = getattr(plain, name), getattr(ours, name)
        if name == "entropy" and not measured:  # the plain sampler always measures it
            assert b[ours.mask].isnan().all()
            continue
        torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-5, equal_nan=True, msg=name)
    assert torch.equal(ours.prompt, plain.prompt)
    assert model.config._attn_implementation == "sdpa"  # put back
    return ours


def spiky(entropy, positions):
    return 1 + 0.3 * torch.tanh(entropy - 1)


def test_a_rule_receives_positions():
    """Across blocks of recorded steps and moves of rows."""
    rule = lambda entropy, positions: 0.5 + 0.02 * positions
    rollout = same_as_plain(random_model(), temperature=rule)
    expected = (0.5 + 0.02 * torch.arange(rollout.mask.shape[1])) * rollout.mask
    torch.testing.assert_close(rollout.temperature, expected)
    assert rollout.mask.shape[1] > 8


CASES = [(architecture, tied, spiky) for architecture in ARCHITECTURES for tied in (True, False)]
CASES += [("Qwen3", True, temperature) for temperature in (1.0, 0.7, 0.0)]


@pytest.mark.parametrize("architecture, tied, temperature", CASES)
def test_the_plain_loop_s_tokens(architecture, tied, temperature):
    """Grouped heads, left padding, several ids that end, adaptive temperature; sharp rows."""
    rollout = same_as_plain(random_model(architecture, tied), temperature=temperature)
    assert temperature == 0 or rollout.finished.any() and len(set(rollout.lengths.tolist())) > 3


@pytest.mark.parametrize("how", [dict(decode_rows=12), dict(prefill_tokens=7), dict(vocab_size=40)])
def test_the_plain_loop_s_tokens_in_parts(how):
    same_as_plain(random_model(), measure_entropy=True, **how)


WINDOWS = [
    ("Qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=2)),
    ("Mistral", dict(sliding_window=5, head_dim=8)),
    ("Mistral", dict(sliding_window=None, head_dim=8)),
]


@pytest.mark.parametrize("architecture, settings", WINDOWS)
def test_sliding_windows(architecture, settings, monkeypatch):
    name = f"{architecture}Config"
    with_window = functools.partial(getattr(transformers, name), **settings)
    monkeypatch.setattr(transformers, name, with_window)
    same_as_plain(random_model(architecture, layers=4))


def test_all_rows_end_in_one_step_or_none_does():
    model = random_model()
    rollout = same_as_plain(model, eos=range(50))
    assert rollout.tokens.shape == (20, 1) and rollout.finished.all()
    assert not same_as_plain(model, eos=(), tokens=9).finished.any()
    same_as_plain(model, tokens=1)


def test_one_row_outlives_the_others_by_a_hundred_steps(monkeypatch):
    """Draws near 0 end every row but one, whose draws are in the middle."""
    model = random_model(
        layers=2, scale=1.0
    )  # near uniform: id 0 is drawn at 0, an id around 25 at 1/2
    draws = torch.full((100, 12), 0.0)
    draws[:, 7] = 0.5
    shapes = []
    show = cuda_graphs._StaticLayer.show
    spy = lambda self, rows, length: (shapes.append((rows, length)), show(self, rows, length))
    monkeypatch.setattr(cuda_graphs._StaticLayer, "show", spy)
    both = [f(model, PROMPTS, 3, 100, [0], uniform=draws) for f in (sampling.generate, generate)]
    assert torch.equal(both[0].tokens, both[1].tokens)
    lengths = both[1].lengths.tolist()
    assert lengths[7] == 100 and sum(lengths) == 100 + 11
    # the last keys: 6 of a prompt, 100, up to a multiple of 8
    assert shapes[0][0] == 12 and shapes[-1] == (2, 112)


@pytest.mark.parametrize("rule", [1.0, "hapo"])
def test_no_question_between_looks(rule):
    """40 steps with one look in 20: what is asked does not grow with the steps between."""
    model, asked = random_model(layers=1), []
    stats = hapo.EntropyStats(*map(torch.tensor, (-1.0, 1.0, 1.5, -6.0)))
    temperature = (lambda h, t: hapo.adaptive_temperature(h, stats)) if rule == "hapo" else rule
    for check in (5, 20):
        cuda_graphs.CHECK = check
        with Asks() as asks:
            generate(model, PROMPTS, 2, 41, [], temperature=temperature)
        asked.append(asks.count)
    # before and behind the loop: is there padding, how long is the longest answer; a look itself
    # is one copy, which is no question here
    assert asked[0] == asked[1] <= 12
    with Asks() as asks:  # and the loop that asks at every step is seen
        generate(model, PROMPTS, 2, 41, [], temperature=temperature, capture=False)
    assert asks.count > 80


def test_a_nan_is_named_with_its_position(monkeypatch):
    """The rows' logits turn NaN at response position 5: said as the plain loop says it."""
    model, calls = random_model(), [0]

    def broken(module, args, out):
        calls[0] += 1
        return out * (torch.nan if calls[0] >= 6 else 1.0)

    model.lm_head.register_forward_hook(broken)
    for decode in (sampling.generate, generate):
        calls[0] = 0
        with pytest.raises(NonFinite, match="response position 5"):
            decode(model, PROMPTS, 2, 20, [])


def test_what_cannot_be_captured_says_why(monkeypatch):
    monkeypatch.undo()
    rope = lambda kind: dict(rope_parameters={"rope_type": kind, "rope_theta": 1e4})
    nested = {"full_attention": {"rope_type": "longrope"}, "sliding_attention": {}}
    for change, reason in (
        ({}, None),
        (dict(_attn_implementation="eager"), "its attention is eager"),
        (rope("default"), None),
        (rope("dynamic"), "rope scaling (dynamic)"),
        (dict(rope_parameters=nested), "rope scaling (longrope)"),
        (dict(layer_types=["full_attention", "linear_attention"]), "linear_attention"),
        (dict(num_local_experts=8), "experts"),
    ):
        config = random_model().config
        for name, value in change.items():
            setattr(config, name, value)
        assert cuda_graphs.why_not(config, "cpu") == "graphs are CUDA's"
        why = cuda_graphs.why_not(config, "cuda")
        assert why is None if reason is None else reason in why, change
