"""--plain against fast/: the same tokens, log-probabilities, gradients and updates."""

import pytest
import torch
from conftest import ARCHITECTURES, random_model, sharpened

import losses
import train
from common.errors import UserError
from engine import decoding, fast, forward, logprobs, onednn, packing
from engine.logprobs import chunked_logprobs_and_entropy
from problems.grading import Grade
from sampling import generate

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]


def by_entropy(entropy, positions):
    return 0.8 + 0.3 * entropy.tanh()


def by_position(entropy, positions):
    return 0.5 + 0.1 * positions


CASES = [(name, tied, by_entropy) for name in ARCHITECTURES for tied in (True, False)]
CASES += [("Qwen3", True, temperature) for temperature in (0, 1.0, 0.7, by_position)]


@pytest.mark.parametrize("architecture, tied, temperature", CASES)
def test_the_same_tokens(architecture, tied, temperature):
    """Rows end at different steps, prompts are padded, the vocabulary is cut.

    (A random number that falls within rounding of a boundary, 3e-8 once with another seed, may give
    the next id.)
    """
    draws = torch.rand(12, 24, generator=torch.Generator().manual_seed(2))
    how = dict(eos_ids=[3, 7], temperature=temperature, vocab_size=48, uniform=draws)
    model = random_model(architecture, tied)
    ours, plain = (f(model, PROMPTS, 8, 12, **how) for f in (decoding.generate, generate))
    if temperature == by_position:
        expected = (0.5 + 0.1 * torch.arange(ours.mask.shape[1])) * ours.mask
        torch.testing.assert_close(ours.temperature, expected)
    if temperature:
        assert 1 < len(set(ours.lengths.tolist())) and ours.finished.any()
    assert ours.responses() == plain.responses() and torch.equal(ours.finished, plain.finished)
    for name in ("temperature", "logp", "entropy"):
        a, b = getattr(ours, name), getattr(plain, name)
        if name != "entropy" or callable(temperature):  # else the running one measures none
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_the_same_log_probabilities_and_gradients():
    hidden = torch.randn(6, 9, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    targets, a, b = torch.randint(0, 50, (6, 9)), *torch.randn(2, 6, 9, dtype=torch.float64)
    for temperature in (1.0, 0.7):
        chunked = chunked_logprobs_and_entropy(hidden, weight, targets, temperature, 7)
        plain = losses.token_logprobs_and_entropy(hidden, weight, targets, temperature)
        torch.testing.assert_close(chunked, plain, atol=1e-12, rtol=1e-12)
        ours, theirs = (
            torch.autograd.grad((a * l + b * e).sum(), (hidden, weight))
            for l, e in (chunked, plain)
        )
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


@pytest.fixture
def opened(opened, monkeypatch):
    """opened(*options): a run whose verdicts depend on the response only."""
    verdict = lambda problem, text, *more: Grade(*[sum(text.encode()) % 2 == 0] * 2)
    monkeypatch.setattr("train.grade", verdict)
    sizes = "--num-generations 4 --max-new-tokens 12 --lr 1e-5".split()
    return lambda *more: opened(*sizes, *more)


@pytest.mark.parametrize("more", ["dapo", "hapo", "hapo --bupo-layer 2 --bupo-steps 1"])
def test_the_same_step(opened, monkeypatch, more):
    """Every answer and every gradient of two steps of two updates."""
    grads, applied = {}, torch.optim.AdamW.step
    for way in ("--plain", "--no-plain"):
        seen = grads.setdefault(way, [])
        run = sharpened(opened(way, "--updates-per-rollout", "2", "--algo", *more.split()))

        def step(self, run=run, seen=seen):
            seen.append([p.grad.clone() for p in run.policy.parameters() if p.grad is not None])
            return applied(self)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        for number in (1, 2):
            seen.append(train.train_step(number, run).batch.rollout.responses())
    plain, fast = grads.values()
    assert len(plain) == len(fast) == 6
    for a, b in zip(plain, fast):
        if isinstance(a[0], list):
            assert a == b  # the same answers
        else:
            for x, y in zip(a, b):
                torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)


def test_fast_is_not_entered(opened, monkeypatch):
    """With --plain no fast version is called, nor by the self-check."""

    def never(*args, **kwargs):
        raise AssertionError("--plain has called a fast version")

    for module, names in (
        (onednn, "onednn_linear"),
        (decoding, "generate Draw repeat_cache drop_finished index_and_shares"),
        (forward, "prefill next_logits"),
        (packing, "choose_packing laid_out"),
        (logprobs, "_ChunkedLogProb"),
        (fast, "chunked_logprobs_and_entropy generate"),
    ):
        for name in names.split():
            monkeypatch.setattr(module, name, never)
    train.train_step(1, opened("--plain", "--self-check"))


def test_logits_that_do_not_fit_are_one_line(opened, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 100)  # 100 pages of 100 bytes
    message = "--plain: whole logits of a pass of 8 responses need .* leave --plain out"
    with pytest.raises(UserError, match=message) as error:
        opened("--plain", "--updates-per-rollout", "2")
    assert "\n" not in str(error.value)
