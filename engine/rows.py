"""Compute log-probability and entropy of rows of logits, in place and without cancellation.

losses.row_logprobs_and_entropy is the plain version. The scorer and the sampler both use these
functions. On CUDA, if a compiler is installed, the two functions that the scorer calls for every
chunk of logits are compiled into single kernels, which read the logits once instead of ten times.

Shapes: N rows, V vocabulary.
"""

import functools

import torch

NEVER = -1e30  # a finite stand-in for -inf: exp(NEVER) and 0 * NEVER are both 0


def likeliest(logits):
    """Return the id of each row's largest logit, (N, 1); NaN counts as the largest.

    On a CPU the search has two levels, first over blocks: max is ten times as fast as argmax there.
    """
    size = logits.shape[-1]
    block = 64 * max(1, round(size**0.5 / 64))  # a multiple of 64 is three times as fast
    if logits.device.type != "cpu" or size <= block:
        return logits.argmax(-1, keepdim=True)
    whole = size // block * block
    best = logits[:, :whole].unflatten(-1, (-1, block)).amax(-1)
    if whole < size:
        best = torch.cat([best, logits[:, whole:].amax(-1, keepdim=True)], 1)
    first = best.argmax(-1, keepdim=True) * block
    inside = (first + torch.arange(block)).clamp_max(size - 1)  # the last id may be repeated
    return (first + logits.gather(1, inside).argmax(-1, keepdim=True)).clamp_max(size - 1)


def scores(z, top, targets=None, work=None, measure_entropy=True):
    """Return (logp of the targets or None, entropy or None, log Z), each (N,), of logits z (N, V).

    The largest logit of each row, at id `top` (N, 1), must be 0. z is changed in place: -inf
    becomes finite. `work` is a buffer of z's shape.

    s is the sum of e^z over all ids except `top`. log Z is log1p(s). The entropy is
    log1p(s) + sum p (-z), a sum of terms that are never negative.
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
    """Return hidden @ weight.T in `dtype`, (N, D), (V, D) -> (N, V).

    On CUDA, the float32 accumulator of a low-precision product is not rounded in between.
    """
    if hidden.is_cuda and hidden.dtype != dtype:
        return torch.mm(hidden, weight.T, out_dtype=dtype)
    return (hidden @ weight.T).to(dtype)


# ------------------------------------------------ called by the scorer for each chunk of logits


def row_scores(logits, targets, measure_entropy=True):
    """Return (logp of the targets, entropy, log Z) of logits (N, V), which are overwritten.

    The entropy may be NaN if not measure_entropy.
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
    """Return the gradient of the logits, (N, V), which may overwrite them.

    d logp / d logits = onehot - p        d H / d logits = -p (log p + H)

    All other arguments are (N,); grad_entropy may be None.
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
    """Return the compiled function, or None if these logits' device uses the eager version."""
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
    """Return whether torch.compile works on a device; tested once per process and device.

    The test compiles a separate function: one compiled for two rows of eight would keep block sizes
    for them on real logits.
    """
    try:
        torch.compile(_probe, dynamic=True)(torch.zeros(2, 8, device=kind))
    except Exception:  # noqa: BLE001 - no Triton, no C compiler or an old version: run eagerly
        return False
    return True
