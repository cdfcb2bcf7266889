"""Compute log-probability and entropy of tokens without ever holding all the logits.

Logits are held for one chunk of tokens at a time and computed again in the backward pass, so peak
memory is chunk x V and not N x V. The gradients are exact. losses.token_logprobs_and_entropy is the
plain version, which autograd differentiates.

Under autocast only the matrix products run in the compute dtype. Logits and everything computed
from them are float32. The gradient of float32 weights is summed over the chunks in float32.

Shapes: N tokens, D hidden size, V vocabulary.
"""

import torch

from engine import rows as exact

LOGIT_CHUNK_BYTES = {"cpu": 2**27, "mps": 2**27, "cuda": 2**30, "xpu": 2**30}  # of float32 logits
# GPUs use few, large chunks, since each chunk adds a gradient as large as the unembedding


def chunk_of(vocab, device_type):
    """Return how many tokens have their logits in memory at the same time."""
    return max(1, LOGIT_CHUNK_BYTES[device_type] // (4 * vocab))


def chunked_logprobs_and_entropy(
    hidden, unembedding, targets, temperature=1.0, chunk_tokens=None, measure_entropy=True
):
    """Return (log-probability of each target, entropy), (..., D), (V, D), (...) -> (...) twice.

    The values are those of losses.token_logprobs_and_entropy. The entropy is None if not
    measure_entropy.
    """
    kind = hidden.device.type
    if chunk_tokens is None:
        chunk_tokens = chunk_of(len(unembedding), kind)
    compute = hidden.dtype
    if torch.is_autocast_enabled(kind):
        compute = torch.get_autocast_dtype(kind)
    flat, targets_flat = hidden.reshape(-1, hidden.shape[-1]).to(compute), targets.reshape(-1)
    settings = (float(temperature), chunk_tokens, measure_entropy)
    with torch.autocast(kind, enabled=False):  # the code below chooses every dtype itself
        logp, entropy = _ChunkedLogProb.apply(flat, unembedding, targets_flat, *settings)
    return logp.view(targets.shape), entropy.view(targets.shape) if measure_entropy else None


class _ChunkedLogProb(torch.autograd.Function):
    """Save hidden states, weights and two numbers per token; the backward recomputes the logits."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk, measure_entropy):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logp = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        entropy, logsumexp = torch.empty_like(logp), torch.empty_like(logp)
        low = weight.to(hidden.dtype)
        for i in range(0, len(hidden), chunk):
            rows = slice(i, i + chunk)
            logits = _logits(hidden[rows], low, temperature, dtype)
            scored = exact.row_scores(logits, targets[rows], measure_entropy)
            logp[rows], entropy[rows], logsumexp[rows] = scored
        ctx.save_for_backward(hidden, weight, targets, logsumexp, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)  # the gradient of an unused output is None
        if not measure_entropy:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, targets, logsumexp, entropy = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dtype, grad_hidden, grad_weight = logsumexp.dtype, None, None
        if need_hidden:
            grad_hidden = torch.empty_like(hidden)
        if need_weight:
            grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        if grad_logp is None:
            grad_logp = torch.zeros_like(logsumexp)
        low = weight.to(hidden.dtype)
        for i in range(0, len(hidden), ctx.chunk):
            rows = slice(i, i + ctx.chunk)
            logits = _logits(hidden[rows], low, ctx.temperature, dtype)
            grad = None if grad_entropy is None else grad_entropy[rows]
            grad_logits = exact.row_gradients(
                logits, targets[rows], logsumexp[rows], entropy[rows], grad_logp[rows], grad
            )
            del logits  # the compiled function does not work in place: free the memory
            if ctx.temperature != 1.0:
                grad_logits.div_(ctx.temperature)
            grad_logits = grad_logits.to(hidden.dtype)
            if need_hidden:
                torch.mm(grad_logits, low, out=grad_hidden[rows])
            if need_weight and dtype == hidden.dtype:
                grad_weight.addmm_(grad_logits.T, hidden[rows])
            elif need_weight:  # low-precision products, summed over the chunks in float32
                grad_weight += exact.product(grad_logits.T, hidden[rows].T, dtype)
        if need_weight:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _logits(hidden, weight, temperature, dtype):
    logits = exact.product(hidden, weight, dtype)
    return logits if temperature == 1.0 else logits.div_(temperature)
