"""Attend with one new token per row, with grouped heads folded into the query dimension.

Shapes: n rows, L keys.
"""

import contextlib

from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask


@contextlib.contextmanager
def packed_heads(model):
    """While open, compute the query heads that share keys as several queries of one head.

    Keys are then not copied for each query head, which halves the time of grouped heads on a CPU.
    It applies to models that use PyTorch's attention ("sdpa"); others are left unchanged.
    """
    before = model.config._attn_implementation
    if before == "sdpa":
        AttentionInterface.register("packed_heads", _packed_heads)
        AttentionMaskInterface.register("packed_heads", sdpa_mask)
        model.config._attn_implementation = "packed_heads"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _packed_heads(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Return the attention output, (n, 1, heads, size), and None in place of attention weights.

    query (n, heads, 1, size), key and value (n, kv_heads, L, size), mask (n, 1, 1, L).
    """
    n, heads, _, size = query.shape
    packed = query.reshape(n, key.shape[1], -1, size)
    out = scaled_dot_product_attention(packed, key, value, attention_mask, scale=scaling)
    return out.reshape(n, 1, heads, size), None
