"""Log-probability and entropy of tokens without ever holding all the logits.

The logits exist for one chunk of tokens at a time and are computed again in the backward pass, so
peak memory is chunk x V and not N x V. The gradients are exact; the plain three lines, which
autograd differentiates, are losses.plain_logprobs_and_entropy.

Shapes: N tokens, D hidden size, V vocabulary.
"""

import torch

from fast import rows as exact

LOGIT_CHUNK_BYTES = 2**27  # 128 MiB of float32 logits at a time


def chunked_logprobs_and_entropy(hidden, unembedding, targets, temperature=1.0, chunk_tokens=None):
    """As losses.token_logprobs_and_entropy: (..., D), (V, D), (...) -> two tensors (...)."""
    if chunk_tokens is None:
        chunk_tokens = max(1, LOGIT_CHUNK_BYTES // (4 * unembedding.shape[0]))
    if torch.is_autocast_enabled(hidden.device.type):
        compute = torch.get_autocast_dtype(hidden.device.type)
        hidden, unembedding = hidden.to(compute), unembedding.to(compute)
    flat, targets_flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    with torch.autocast(
        hidden.device.type, enabled=False
    ):  # nothing below runs in less than float32
        logp, entropy = _ChunkedLogProb.apply(
            flat, unembedding, targets_flat, float(temperature), chunk_tokens
        )
    return logp.view(targets.shape), entropy.view(targets.shape)


class _ChunkedLogProb(torch.autograd.Function):
    """Saves hidden, weights and one number a token; the backward recomputes the logits."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logp = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        entropy, logsumexp = torch.empty_like(logp), torch.empty_like(logp)
        for i in range(0, len(hidden), chunk):
            rows = slice(i, i + chunk)
            logits = _logits(hidden[rows], weight, temperature, dtype)
            top = exact.likeliest(logits)
            largest = logits.gather(-1, top)
            logp[rows], entropy[rows], log_z = exact.scores(
                logits.sub_(largest), top, targets[rows]
            )
            logsumexp[rows] = largest.squeeze(-1) + log_z
        ctx.save_for_backward(hidden, weight, targets, logsumexp, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)  # an output the loss does not use arrives as None
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
        for i in range(0, len(hidden), ctx.chunk):
            rows = slice(i, i + ctx.chunk)
            log_probs = _logits(hidden[rows], weight, ctx.temperature, dtype)
            log_probs.sub_(logsumexp[rows, None])
            # d logp / d logits = onehot - p        d H / d logits = -p (log p + H)
            if grad_entropy is not None:
                scale = log_probs.clamp_min(torch.finfo(dtype).min) + entropy[rows, None]
                scale.mul_(-grad_entropy[rows, None]).sub_(grad_logp[rows, None])
                grad_logits = log_probs.exp_().mul_(scale)
            else:
                grad_logits = log_probs.exp_().mul_(-grad_logp[rows, None])
            grad_logits.scatter_add_(-1, targets[rows, None], grad_logp[rows, None])
            if ctx.temperature != 1.0:
                grad_logits.div_(ctx.temperature)
            grad_logits = grad_logits.to(hidden.dtype)
            if need_hidden:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if need_weight and dtype == hidden.dtype:
                grad_weight.addmm_(grad_logits.T, hidden[rows])
            elif need_weight:  # low-precision products, summed over the chunks in float32
                grad_weight += grad_logits.T @ hidden[rows]
        if need_weight:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None


def _logits(hidden, weight, temperature, dtype):
    logits = exact.product(hidden, weight, dtype)
    return logits if temperature == 1.0 else logits.div_(temperature)
