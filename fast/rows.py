"""Log-probability and entropy of rows of logits, in place and without cancellation.

What losses.row_logprobs_and_entropy does in plain lines, for the scorer and the sampler alike.

Shapes: N rows, V vocabulary.
"""

import torch

NEVER = -1e30  # its exponential is 0 and 0 times it is 0, which 0 times -inf is not


def likeliest(logits):
    """The id of each row's largest logit, (N, 1); NaN counts as the largest. On a CPU in two
    levels, blocks first: there a maximum is ten times as fast as its place."""
    size = logits.shape[-1]
    block = 64 * max(1, round(size**0.5 / 64))  # whole vectors: three times as fast
    if logits.is_cuda or size <= block:
        return logits.argmax(-1, keepdim=True)
    whole = size // block * block
    best = logits[:, :whole].unflatten(-1, (-1, block)).amax(-1)
    if whole < size:
        best = torch.cat([best, logits[:, whole:].amax(-1, keepdim=True)], 1)
    first = best.argmax(-1, keepdim=True) * block
    inside = (first + torch.arange(block)).clamp_max(size - 1)  # the last id may come repeatedly
    return (first + logits.gather(1, inside).argmax(-1, keepdim=True)).clamp_max(size - 1)


def scores(z, top, targets=None, work=None):
    """(logp of the targets or None, entropy, log1p(s)), each (N,), of rows whose largest logit,
    at id `top` (N, 1), is 0. z (N, V) becomes finite; `work` has its shape.

    s is the sum of e^z over all ids but the likeliest: log Z = log1p(s), and the entropy,
    log1p(s) + sum p (-z), is a sum of terms that are never negative.
    """
    z.clamp_min_(NEVER)
    p = torch.softmax(z, -1, out=work)
    p_top = p.gather(-1, top).squeeze(-1)
    s = p.scatter_(-1, top, 0.0).sum(-1) / p_top
    log_z = torch.log1p(s)
    entropy = log_z - p.mul_(z).sum(-1)
    logp = None if targets is None else z.gather(-1, targets[:, None]).squeeze(-1) - log_z
    return logp, entropy, log_z


def product(hidden, weight, dtype):
    """hidden @ weight.T, (N, D), (V, D) -> (N, V) in `dtype`; low-precision products on CUDA keep
    their float32 accumulator."""
    if hidden.is_cuda and hidden.dtype != dtype:
        return torch.mm(hidden, weight.T, out_dtype=dtype)
    return (hidden @ weight.T).to(dtype)
