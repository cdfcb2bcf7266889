"""Use oneDNN's matrix products for decoding on a CPU.

Decoding multiplies a few rows by large matrices. PyTorch's default product (MKL) is slow at this,
and oneDNN's takes half the time.
"""

import contextlib
import functools

import torch
from torch.nn.functional import linear

MOST_ROWS = 256  # with more rows, or smaller matrices, the two libraries are equally fast
LEAST_WEIGHTS = 2**15


@contextlib.contextmanager
def onednn_linear(model, rows):
    """While open, make a model's float32 linear layers on a CPU use oneDNN's product.

    It multiplies copies of the weights that are laid out for inputs of `rows` rows. The product has
    no gradient, and the copies do not change with the weights, so open this for one rollout only.
    """
    there = torch.backends.mkldnn.is_available()
    ops = torch.ops.mkldnn if there and hasattr(torch.ops.mkldnn, "_linear_pointwise") else None
    changed = [m for m in model.modules() if ops and _fits(m)]
    for m in changed:
        weight = ops._reorder_linear_weight(m.weight, min(rows, MOST_ROWS))
        m.forward = functools.partial(_forward, m, ops._linear_pointwise, weight)
    try:
        yield
    finally:
        for m in changed:
            del m.forward


def _fits(m):
    if type(m) is not torch.nn.Linear or "forward" in vars(m):
        return False
    w = m.weight
    return w.device.type == "cpu" and w.dtype == torch.float32 and w.numel() >= LEAST_WEIGHTS


def _forward(m, product, weight, x):
    if x.numel() > MOST_ROWS * x.shape[-1]:
        return linear(x, m.weight, m.bias)
    return product(x, weight, m.bias, "none", [], "")
