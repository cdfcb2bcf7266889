"""Log-probability and entropy of rows of logits, in place and without cancellation.

What losses.row_logprobs_and_entropy does in plain lines, for the scorer and the sampler alike.

Shapes: N rows, V vocabulary.
"""

import torch

NEVER = -1e30  # its exponential is 0 and 0 times it is 0, which 0 times -inf is not


def scores(z, top, targets=None, work=None):
    """(logp of the targets or None, entropy, log1p(s)), each (N,), of rows whose largest logit,
    at id `top` (N, 1), is 0. z (N, V) becomes finite; `work` has its shape.

    s is the sum of e^z over all ids but the likeliest: log Z = log1p(s), and the entropy,
    log1p(s) + sum p (-z), is a sum of terms that are never negative.
    """
    z.clamp_min_(NEVER)
    others = torch.exp(z, out=work).scatter_(-1, top, 0.0)
    s = others.sum(-1)
    log_z = log_of(s, z, top)
    entropy = log_z - others.mul_(z).sum(-1) / (1 + s)
    logp = None if targets is None else z.gather(-1, targets[:, None]).squeeze(-1) - log_z
    return logp, entropy, log_z


def log_of(s, z, top):
    """log1p(s), NaN where a row has no finite largest logit: z there is 0 or NaN."""
    return torch.log1p(s) + z.gather(-1, top).squeeze(-1)


def product(hidden, weight, dtype):
    """hidden @ weight.T, (N, D), (V, D) -> (N, V) in `dtype`; low-precision products on CUDA keep
    their float32 accumulator."""
    if hidden.is_cuda and hidden.dtype != dtype:
        return torch.mm(hidden, weight.T, out_dtype=dtype)
    return (hidden @ weight.T).to(dtype)
