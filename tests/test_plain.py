"""--plain against fast/: the same tokens, log-probabilities, gradients and updates."""

import json

import pytest
import torch
from conftest import TINY

import losses
import train
from common.errors import UserError
from engine import decoding
from engine.engine import SingleProcess
from engine.logprobs import chunked_logprobs_and_entropy
from problems.grading import Grade
from run import option_checks
from run.setup import open_run
from sampling import generate

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]


def by_entropy(entropy, positions):
    return 0.8 + 0.3 * entropy.tanh()


def by_position(entropy, positions):
    return 0.5 + 0.1 * positions


@pytest.mark.parametrize("temperature", [0, 1.0, 0.7, by_entropy, by_position])
def test_the_same_tokens(any_model, temperature):
    """Rows end at different steps, prompts are padded, the vocabulary is cut.

    (A random number that falls within rounding of a boundary, 3e-8 once with another seed, may give
    the next id.)
    """
    draws = torch.rand(12, 24, generator=torch.Generator().manual_seed(2))
    how = dict(eos_ids=[3, 7], temperature=temperature, vocab_size=48, uniform=draws)
    fast, plain = (f(any_model, PROMPTS, 8, 12, **how) for f in (decoding.generate, generate))
    if temperature == by_position:
        expected = (0.5 + 0.1 * torch.arange(fast.mask.shape[1])) * fast.mask
        torch.testing.assert_close(fast.temperature, expected)
    if temperature:
        assert 1 < len(set(fast.lengths.tolist())) and fast.finished.any()
    assert fast.responses() == plain.responses() and torch.equal(fast.finished, plain.finished)
    for name in ("temperature", "logp", "entropy"):
        a, b = getattr(fast, name), getattr(plain, name)
        if name != "entropy" or callable(temperature):  # else the running one measures none
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_same_log_probabilities_and_gradients(temperature):
    hidden = torch.randn(6, 9, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    targets, a, b = torch.randint(0, 50, (6, 9)), *torch.randn(2, 6, 9, dtype=torch.float64)
    chunked = chunked_logprobs_and_entropy(hidden, weight, targets, temperature, 7)
    plain = losses.token_logprobs_and_entropy(hidden, weight, targets, temperature)
    ways = [chunked, plain]
    for x, y in zip(*ways):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)
    grads = [torch.autograd.grad((a * l + b * e).sum(), (hidden, weight)) for l, e in ways]
    for x, y in zip(*grads):
        torch.testing.assert_close(x, y, atol=1e-11, rtol=1e-11)


@pytest.fixture(autouse=True)
def verdicts(monkeypatch):
    """Verdicts that depend on the answer only, so that every group has something to learn."""
    verdict = lambda text: Grade(*[sum(text.encode()) % 2 == 0] * 2)
    monkeypatch.setattr("train.grade", lambda problem, text, *more: verdict(text))


STEP = (
    "--prompts-per-step 4 --num-generations 8 --updates-per-rollout 2 --lr 1e-5 --device cpu "
    "--eval-prompts 4 --warmup-steps 1 --max-new-tokens 16 --steps 3"
).split()


def questions(folder):
    """A file of questions of the shipped model's kind: other runs need not render thousands."""
    game = "Use {0}, {1}, 2 once each with + - * / to make {2}. Reply with the expression only."
    rows = [
        {"question": game.format(a, b, a * b % 9 + 1), "answer": str(a)}
        for a in range(1, 7)
        for b in range(7, 12)
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("more", ["dapo", "grpo", "hapo", "hapo --bupo-layer 2 --bupo-steps 1"])
def test_the_same_step(tmp_path, monkeypatch, more):
    """Every answer and every gradient of two steps."""
    grads, applied = {}, torch.optim.AdamW.step
    for way in ("--plain", "--no-plain"):
        seen = grads.setdefault(way, [])
        out = ["--model", str(TINY), "--data", questions(tmp_path), "--out", str(tmp_path / way)]
        run, _ = open_run(
            option_checks.parse([*STEP, *out, way, "--algo", *more.split()], ""),
            SingleProcess("cpu"),
        )

        def step(self, run=run, seen=seen):
            seen.append([p.grad.clone() for p in run.policy.parameters() if p.grad is not None])
            return applied(self)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        for number in (1, 2):
            seen.append(train.train_step(number, run).batch.rollout.responses())
    plain, fast = grads.values()
    assert len(plain) == len(fast) >= 4
    for a, b in zip(plain, fast):
        if isinstance(a[0], list):
            assert a == b  # the same answers
        else:
            for x, y in zip(a, b):
                torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)


def test_fast_is_not_entered(tmp_path, monkeypatch):
    """With --plain no fast version is called."""
    from engine import forward, logprobs, onednn, packing

    def never(*args, **kwargs):
        raise AssertionError("--plain has called a fast version")

    for module, names in (
        (onednn, ["onednn_linear"]),
        (decoding, ["generate", "Draw", "repeat_cache", "drop_finished", "index_and_shares"]),
        (forward, ["prefill", "next_logits"]),
        (packing, ["choose_packing", "laid_out"]),
        (logprobs, ["_ChunkedLogProb"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, never)
    monkeypatch.setattr("engine.fast.chunked_logprobs_and_entropy", never)
    monkeypatch.setattr("engine.fast.generate", never)
    arguments = [*STEP, "--data", questions(tmp_path), "--out", str(tmp_path / "run"), "--plain"]
    run, _ = open_run(option_checks.parse(arguments, ""), SingleProcess("cpu"))
    train.train_step(1, run)


def test_logits_that_do_not_fit_are_one_line(tmp_path, monkeypatch):

    monkeypatch.setattr("os.sysconf", lambda name: 100)  # 100 pages of 100 bytes
    arguments = [*STEP, "--data", questions(tmp_path), "--out", str(tmp_path / "run"), "--plain"]
    message = "--plain: whole logits of a pass of 16 responses need .* leave --plain out"
    with pytest.raises(UserError, match=message) as error:
        open_run(option_checks.parse(arguments, ""), SingleProcess("cpu"))
    assert "\n" not in str(error.value)
