"""Log-probability and entropy of rows of logits, in place and without cancellation.

What losses.row_logprobs_and_entropy does in plain lines, for the scorer and the sampler alike. On
CUDA the two functions that the scorer calls for every chunk of logits are compiled into single
kernels where a compiler is there: they pass over the logits once instead of ten times.

Shapes: N rows, V vocabulary.
"""

import functools

import torch

NEVER = -1e30  # its exponential is 0 and 0 times it is 0, which 0 times -inf is not


def likeliest(logits):
    """Return the id of each row's largest logit, (N, 1); NaN counts as the largest.

    On a CPU in two levels, blocks first: there max is ten times as fast as argmax.
    """
    size = logits.shape[-1]
    block = 64 * max(1, round(size**0.5 / 64))  # whole vectors: three times as fast
    if logits.device.type != "cpu" or size <= block:
        return logits.argmax(-1, keepdim=True)
    whole = size // block * block
    best = logits[:, :whole].unflatten(-1, (-1, block)).amax(-1)
    if whole < size:
        best = torch.cat([best, logits[:, whole:].amax(-1, keepdim=True)], 1)
    first = best.argmax(-1, keepdim=True) * block
    inside = (first + torch.arange(block)).clamp_max(size - 1)  # the last id may come repeatedly
    return (first + logits.gather(1, inside).argmax(-1, keepdim=True)).clamp_max(size - 1)


def scores(z, top, targets=None, work=None, measure_entropy=True):
    """(logp of the targets or None, entropy or None, log1p(s)), each (N,), of rows whose largest
    logit, at id `top` (N, 1), is 0. z (N, V) becomes finite; `work` has its shape.

    s is the sum of e^z over all ids but the likeliest: log Z = log1p(s), and the entropy,
    log1p(s) + sum p (-z), is a sum of terms that are never negative.
    """
    z.clamp_min_(NEVER)
    p = torch.softmax(z, -1, out=work)
    p_top = p.gather(-1, top).squeeze(-1)
    s = p.scatter_(-1, top, 0.0).sum(-1) / p_top
    log_z = torch.log1p(s)
    entropy = log_z - p.mul_(z).sum(-1) if measure_entropy else None
    logp = None if targets is None else z.gather(-1, targets[:, None]).squeeze(-1) - log_z
    return logp, entropy, log_z


def product(hidden, weight, dtype):
    """hidden @ weight.T, (N, D), (V, D) -> (N, V) in `dtype`; low-precision products on CUDA keep
    their float32 accumulator."""
    if hidden.is_cuda and hidden.dtype != dtype:
        return torch.mm(hidden, weight.T, out_dtype=dtype)
    return (hidden @ weight.T).to(dtype)


# -------------------------------------------------------------- of the scorer, one chunk at a time


def row_scores(logits, targets, measure_entropy=True):
    """Return (logp of the targets, entropy, log Z) of logits (N, V), which are overwritten.

    The entropy is NaN without measure_entropy.
    """
    if (fused := compiled(_row_scores, logits)) is not None:
        return fused(logits, targets)
    top = likeliest(logits)
    largest = logits.gather(-1, top)
    logp, entropy, log_z = scores(
        logits.sub_(largest), top, targets, measure_entropy=measure_entropy
    )
    return logp, torch.nan if entropy is None else entropy, largest.squeeze(-1) + log_z


def row_gradients(logits, targets, logsumexp, entropy, grad_logp, grad_entropy):
    """Gradient of the logits (N, V), in their place; all others (N,), grad_entropy may be None.

    d logp / d logits = onehot - p        d H / d logits = -p (log p + H)
    """
    if grad_entropy is None and (fused := compiled(_row_gradients, logits)) is not None:
        return fused(logits, targets, logsumexp, grad_logp)
    log_probs = logits.sub_(logsumexp[:, None])
    if grad_entropy is not None:
        scale = log_probs.clamp_min(torch.finfo(logits.dtype).min) + entropy[:, None]
        scale.mul_(-grad_entropy[:, None]).sub_(grad_logp[:, None])
        grad = log_probs.exp_().mul_(scale)
    else:
        grad = log_probs.exp_().mul_(-grad_logp[:, None])
    return grad.scatter_add_(-1, targets[:, None], grad_logp[:, None])


def _row_scores(logits, targets):
    top = logits.argmax(-1, keepdim=True)
    largest = logits.gather(-1, top)
    z = (logits - largest).clamp_min(NEVER)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    others = torch.where(ids == top, 0.0, z.exp())
    s = others.sum(-1)
    log_z = torch.log1p(s)
    entropy = log_z - (others * z).sum(-1) / (1 + s)
    logp = z.gather(-1, targets[:, None]).squeeze(-1) - log_z
    return logp, entropy, largest.squeeze(-1) + log_z


def _row_gradients(logits, targets, logsumexp, grad_logp):
    p = (logits - logsumexp[:, None]).exp()
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return ((ids == targets[:, None]).to(p.dtype) - p) * grad_logp[:, None]


COMPILED_ON = {"cuda"}


def compiled(function, logits):
    """The function, compiled; None where logits of this kind take the eager way."""
    if logits.device.type not in COMPILED_ON or not _compiler_works(logits.device.type):
        return None
    return _compile(function)


@functools.cache
def _compile(function):
    return torch.compile(function, dynamic=True)


def _probe(logits):
    return logits.exp().sum(-1)


@functools.cache
def _compiler_works(kind):
    """Whether a compiler is there, asked once a process and device of a function of its own: what
    is compiled on two rows of eight would keep their block sizes for real ones."""
    try:
        torch.compile(_probe, dynamic=True)(torch.zeros(2, 8, device=kind))
    except Exception:  # noqa: BLE001 - no Triton, no C compiler, a version too old: eager is right
        return False
    return True
