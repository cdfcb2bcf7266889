"""bridges/vllm_temperature.py without an engine: requests, both interfaces, Eq. 8, the probe.

vLLM's two base classes are stood in for where vLLM is not installed. In a real engine it is tested
by tests/engines/test_vllm.py.
"""

import enum
import importlib
import math
import sys
import types

import pytest
import torch
from conftest import TINY

import hapo
from losses import row_logprobs_and_entropy

STATS = hapo.EntropyStats(*torch.tensor([-1.0, 2.0, 0.5, -3.0]))
V = 40


class Direction(enum.Enum):
    UNIDIRECTIONAL = 1
    SWAP = 2


@pytest.fixture
def bridge(monkeypatch):
    """The module, on stand-ins for both base classes."""
    for name in ("vllm.v1.sample", "vllm.v1.worker.gpu.sample"):
        module = types.ModuleType(f"{name}.logits_processor")
        module.LogitsProcessor = type("LogitsProcessor", (), {})
        for parent in [name.rsplit(".", n)[0] for n in range(name.count(".") + 1)]:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "bridges.vllm_temperature", raising=False)
    yield importlib.import_module("bridges.vllm_temperature")
    sys.modules.pop("bridges.vllm_temperature", None)


def request(given=None, temperature=1.0):
    extra = None if given is None else {"hapo": given}
    return types.SimpleNamespace(extra_args=extra, temperature=temperature)


def an_engine(slots=6, tokenizer=str(TINY)):
    model = types.SimpleNamespace(
        skip_tokenizer_init=tokenizer is None,
        tokenizer=tokenizer,
        tokenizer_revision=None,
        trust_remote_code=False,
    )
    scheduler = types.SimpleNamespace(max_num_seqs=slots)

    class Config(types.SimpleNamespace):
        pass

    return Config(scheduler_config=scheduler, model_config=model)


def expected(logits, at=1.0, **rule):
    """Eq. 8's temperatures of rows of logits, from entropies of logits / at in float64."""
    p = (logits.double() / at).softmax(-1)
    entropy = -(p * p.log()).sum(-1).float()
    return hapo.adaptive_temperature(entropy, STATS, **rule)


FORMS = [
    dict(tau=0.3, at=0.7),
    dict(tau=0.05),
    dict(tau=0.6),
    dict(tau=0.3, form="zscore"),
    dict(tau=0.4, released=True),
]


@pytest.mark.parametrize("rule", FORMS, ids=str)
def test_both_interfaces_divide_by_eq_8(bridge, rule):
    """Rows in every order, several rows of a slot; plain and greedy rows keep every bit."""
    logits = 4 * torch.randn(6, V) * torch.linspace(0.1, 2, 6)[:, None]
    broken = logits[:4].clone()
    broken[1, 5] = torch.inf  # of a plain row: its entropy is NaN, its factor is 1
    form = "released" if rule.get("released") else rule.get("form", "bounded")
    given = bridge.request_arguments(STATS, rule["tau"], form, rule.get("at", 1.0))
    hot = request(given["hapo"])
    cold = request(hot.extra_args["hapo"], temperature=0.0)
    T = expected(logits, **rule)
    assert (T - 1).abs().max() > 0.01
    first = bridge.AdaptiveTemperature(an_engine(tokenizer=None), torch.device("cpu"))
    added = [(0, hot), (1, request()), (2, hot), (3, cold)]
    update = types.SimpleNamespace(removed=[], added=[(i, p, [], []) for i, p in added], moved=[])
    first.update_state(update)
    found = first.apply(broken.clone())
    torch.testing.assert_close(found[[0, 2]], logits[[0, 2]] / T[[0, 2], None])
    assert torch.equal(found[[1, 3]], broken[[1, 3]])

    state = types.SimpleNamespace(device=torch.device("cpu"), max_num_reqs=6)
    second = bridge.AdaptiveTemperature(an_engine(tokenizer=None), state)
    assert [second.add_request(i, p) for i, p in added] == [True, False, True, False]
    for order in ([3, 0, 1, 2], [2, 2, 1, 0, 0, 3], [1, 3]):
        context = types.SimpleNamespace(expanded_idx_mapping=torch.tensor(order))
        rows = logits[: len(order)]
        found = second.apply(rows.clone(), context)
        heated = torch.tensor([slot in (0, 2) for slot in order])
        factor = torch.where(heated, T[: len(order)], 1.0)
        torch.testing.assert_close(found, rows / factor[:, None])
        assert torch.equal(found[~heated], rows[~heated])


def test_requests_leave_move_and_change_places(bridge):
    """By hand, in vLLM's order: removed, added, moved."""
    processor = bridge.AdaptiveTemperature(an_engine(tokenizer=None), torch.device("cpu"))
    one, two = (request(bridge.request_arguments(STATS, tau)["hapo"]) for tau in (0.1, 0.2))
    taus = lambda: [round(x, 3) for x in processor.numbers[:4, bridge.TAU].tolist()]

    def update(removed=(), added=(), moved=()):
        added = [(place, params, [], []) for place, params in added]
        processor.update_state(types.SimpleNamespace(removed=removed, added=added, moved=moved))
        return taus()

    assert update(added=[(0, one), (2, two)]) == [0.1, 0, 0.2, 0]
    assert update(moved=[(2, 1, Direction.UNIDIRECTIONAL)]) == [0.1, 0.2, 0, 0]
    assert update(moved=[(0, 1, Direction.SWAP)]) == [0.2, 0.1, 0, 0]
    assert update(removed=[0], added=[(3, two)]) == [0, 0.1, 0, 0.2]
    assert update(removed=[1], added=[(1, request())]) == [0, 0, 0, 0.2]
    processor.update_state(None)
    assert taus() == [0, 0, 0, 0.2]
    logits = torch.randn(4, V)
    assert not torch.equal(processor.apply(logits.clone()), logits)
    update(removed=[3])
    assert torch.equal(processor.apply(logits.clone()), logits)


def test_ids_that_pad_the_vocabulary_are_not_in_the_entropy(bridge):
    """The shipped tokenizer knows 284 ids; one of the others has by far the largest logit here."""
    processor = bridge.AdaptiveTemperature(an_engine(), torch.device("cpu"))
    params = request(bridge.request_arguments(STATS, 0.5)["hapo"])
    processor.add_request(0, request())
    processor.apply(torch.randn(1, 320))
    assert processor.vocab_size is None  # an engine that heats nothing reads no tokenizer
    processor.add_request(0, params)
    logits = torch.randn(1, 320)
    logits[0, 284] = 50
    T = expected(logits[:, :284], tau=0.5)
    torch.testing.assert_close(processor.apply(logits.clone()), logits / T[:, None])
    assert processor.vocab_size == 284


def test_entropies_are_exact(bridge):
    """From 1e-8 nats to log V; hidden ids count nothing."""
    logits = torch.randn(200, V)
    logits[:, 7] += torch.linspace(30, 0, 200)
    logits[:, 3] = -torch.inf
    wide = logits.double()
    _, exact = row_logprobs_and_entropy(wide, wide.argmax(-1))
    found = bridge.row_entropy(logits, torch.ones(200))
    cooler = bridge.row_entropy(3 * logits, torch.full((200,), 3.0))  # of logits / at
    torch.testing.assert_close(cooler, found)
    assert exact.min() < 1e-7 and exact.max() > 2
    assert ((found - exact).abs() / exact).max() < 1e-4


def test_loaded_twice_it_acts_once(bridge):
    config = an_engine(tokenizer=None)
    one, two = (bridge.AdaptiveTemperature(config, torch.device("cpu")) for _ in range(2))
    params = request(bridge.request_arguments(STATS, 0.5)["hapo"])
    assert one.add_request(0, params) and not two.add_request(0, params)
    logits = torch.randn(1, V)
    assert torch.equal(two.apply(logits.clone()), logits)
    assert not torch.equal(one.apply(logits.clone()), logits)
    other = bridge.AdaptiveTemperature(an_engine(tokenizer=None), torch.device("cpu"))
    assert other.acts and not other.is_argmax_invariant()
    del one, two  # an engine that is gone leaves its place to a new one
    assert bridge.AdaptiveTemperature(config, torch.device("cpu")).acts


GOOD = [-1.0, 2.0, 0.5, -3.0, 0.05, 1.0, "bounded"]
WRONG = [
    ([1, 2], "must be a list of pivot, sigma, h_max, h_min, tau, at, form, not"),
    ({"pivot": 1}, "must be a list"),
    ("hot", "must be a list"),
    ([*GOOD[:6], "warm"], "one of bounded, zscore"),
    ([math.nan, *GOOD[1:]], "six finite numbers"),
    (["-1", *GOOD[1:]], "six finite numbers"),
    ([True, *GOOD[1:]], "six finite numbers"),
    ([-1.0, 0.0, *GOOD[2:]], "sigma, h_max and at must be above 0"),
    ([-1.0, 2.0, 0.5, 3.0, *GOOD[4:]], "h_min below 0"),
    ([*GOOD[:4], -0.1, 1.0, "bounded"], "tau must be at least 0"),
    ([*GOOD[:5], 0.0, "bounded"], "sigma, h_max and at must be above 0"),
    ([*GOOD[:4], 1.0, 1.0, "bounded"], "below 1 in the bounded form"),
]


@pytest.mark.parametrize("given, message", WRONG)
def test_a_malformed_request_is_named_in_one_line(bridge, given, message):
    for temperature in (1.0, 0.0):  # a greedy one, too
        with pytest.raises(ValueError, match=message) as error:
            bridge.AdaptiveTemperature.validate_params(request(given, temperature))
        assert "\n" not in str(error.value)
    bridge.AdaptiveTemperature.validate_params(request(GOOD, temperature))
    assert bridge.read_request(request()) == bridge.NO_CHANGE


def test_the_probe_by_hand(bridge):
    """At T_base 2: one id alone when cold, nearly all ids when hot; neither without A."""
    processor = bridge.AdaptiveTemperature(an_engine(tokenizer=None), torch.device("cpu"))
    logits, ends = 4 * torch.randn(1, V), []
    for probe in bridge.probe_requests():
        processor.add_request(0, request(probe["extra_args"]["hapo"], probe["temperature"]))
        heated = processor.apply(logits.clone()) / probe["temperature"]
        ends.append(heated.softmax(-1).max().item())
    assert ends[0] > 0.999 and ends[1] < 0.1 < (logits / 2).softmax(-1).max() < 0.9
    many = list(range(8)) * 8
    bridge.check_draws([3] * 64, many)
    for cold, hot in (([3] * 63 + [4], many), ([3] * 64, [3] * 57 + many[:7]), ([], many)):
        with pytest.raises(ValueError, match="does not apply HAPO's adaptive temperature"):
            bridge.check_draws(cold, hot)


def test_a_client_without_vllm_makes_requests(monkeypatch):
    """As a trainer does whose engine runs elsewhere."""
    monkeypatch.delitem(sys.modules, "bridges.vllm_temperature", raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)
    module = importlib.import_module("bridges.vllm_temperature")
    given = [-1.0, 2.0, 0.5, -3.0, 0.1, 0.7, "zscore"]
    assert module.request_arguments(STATS, 0.1, "zscore", 0.7) == {"hapo": given}
    sys.modules.pop("bridges.vllm_temperature", None)
