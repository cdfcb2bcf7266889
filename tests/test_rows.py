"""The row functions that CUDA compiles, and what the chunked loss keeps in float32."""

import functools

import pytest
import torch

from engine import rows
from engine.logprobs import chunked_logprobs_and_entropy


def logits_and_targets():
    generator = torch.Generator().manual_seed(0)
    logits = (
        torch.randn(6, 50, generator=generator) * torch.tensor([0.1, 1, 3, 10, 30, 60])[:, None]
    )
    return logits, torch.tensor([0, 49, 7, 7, 20, 3])


@pytest.fixture
def compiler(monkeypatch):
    """compiler(function): what torch.compile does, and rows ask it on the CPU."""

    def use(function):
        monkeypatch.setattr(torch, "compile", function)
        monkeypatch.setattr(rows, "COMPILED_ON", {"cpu"})
        rows._compile.cache_clear(), rows._compiler_works.cache_clear()

    yield use
    rows._compile.cache_clear(), rows._compiler_works.cache_clear()


def test_the_compiled_functions_are_the_eager_ones():
    """Their bodies, as a compiler gets them: the numbers of those that run in place."""
    logits, targets = logits_and_targets()
    logp, entropy, log_z = rows.row_scores(logits.clone(), targets)
    for ours, theirs in zip(rows._row_scores(logits, targets), (logp, entropy, log_z)):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-12)
    grad = torch.linspace(-1, 2, 6)
    eager = rows.row_gradients(logits.clone(), targets, log_z, entropy, grad, None)
    torch.testing.assert_close(rows._row_gradients(logits, targets, log_z, grad), eager)
    exact = logits.double().requires_grad_()
    logp = exact.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    (logp * grad).sum().backward()
    torch.testing.assert_close(eager.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_where_there_is_no_compiler_the_eager_way_is_taken(compiler):
    """As on a GPU without Triton: asked once, then never again."""
    asked = []

    def missing(function, **how):
        asked.append(function)
        raise RuntimeError("no compiler")

    compiler(missing)
    logits, targets = logits_and_targets()
    logp, _, _ = rows.row_scores(logits.clone(), targets)
    expected = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(logp, expected)
    rows.row_scores(logits.clone(), targets)
    assert len(asked) == 1


def test_what_the_compiler_returns_is_used(compiler):
    compiler(lambda function, **how: function)
    hidden, weight, targets = torch.randn(9, 4), torch.randn(20, 4), torch.arange(9)
    results = []
    chunked = functools.partial(chunked_logprobs_and_entropy, chunk_tokens=4)
    for scores in (chunked, chunked_logprobs_and_entropy):
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))
        logp, _ = scores(h, w, targets, 0.7, measure_entropy=False)
        logp.square().sum().backward()
        results.append((logp.detach(), h.grad, w.grad))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_no_entropy_where_nobody_reads_it(monkeypatch):
    """The same log-probabilities to the last bit, and no second sum over the vocabulary."""
    hidden, weight, targets = torch.randn(9, 4), torch.randn(20, 4), torch.arange(9)
    asked = []
    real = rows.scores
    spy = lambda *args, **how: asked.append(how["measure_entropy"]) or real(*args, **how)
    monkeypatch.setattr(rows, "scores", spy)
    logp, entropy = chunked_logprobs_and_entropy(hidden, weight, targets, chunk_tokens=5)
    alone, nothing = chunked_logprobs_and_entropy(
        hidden, weight, targets, chunk_tokens=5, measure_entropy=False
    )
    assert torch.equal(logp, alone) and nothing is None and entropy.isfinite().all()
    assert asked == [True, True, False, False]


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_unembedding_s_gradient_is_float32_under_autocast(chunk):
    """Products are bfloat16's; their sum over the chunks is not rounded again, and arrives in the
    weight's own dtype. Against float64 on the rounded numbers, one product a chunk."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (12, 30))
    targets, weight = torch.arange(12), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logp, _ = chunked_logprobs_and_entropy(hidden, weight, targets, chunk_tokens=chunk)
    logp.sum().backward()
    h, w = hidden.bfloat16(), weight.detach().bfloat16()
    p = (h @ w.T).float().softmax(-1)
    grad_logits = (torch.nn.functional.one_hot(targets, 30) - p).bfloat16()
    parts = [
        (grad_logits[i : i + chunk].T @ h[i : i + chunk]).double() for i in range(0, 12, chunk)
    ]
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad.double(), sum(parts), rtol=2e-2, atol=4e-3)
    if chunk == 1:  # bfloat16 would have lost what the later chunks add
        assert (weight.grad != weight.grad.bfloat16().float()).any()
        exact, _ = chunked_logprobs_and_entropy(h.float(), w.float().requires_grad_(), targets)
        torch.testing.assert_close(logp, exact, rtol=2e-2, atol=2e-2)
