"""Build the attention masks for PyTorch's scaled_dot_product_attention.

By default transformers leaves the mask out where it can and uses grouped heads. This is best where
flash attention runs. Elsewhere (float32 on a GPU, or a GPU before Ampere) the only kernel with
grouped heads stores all S x S scores of every head. With a mask, PyTorch uses the memory-efficient
kernel instead. Positions of left padding would attend to nothing, and kernels then return zeros or
NaN. Here they attend to themselves; their outputs are not used.

Shapes: n rows, S positions.
"""

import functools

import torch

from common.devices import has_flash_attention


def takes_any_mask(config):
    """Return whether a model's attention applies any mask it is given.

    PyTorch's attention ("sdpa") does. Other implementations and sliding windows build their own
    masks.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = kinds != {"full_attention"} or getattr(config, "sliding_window", None)
    return config._attn_implementation == "sdpa" and not windowed


def install_mask_hook(model, device=None, dtype=None):
    """Return the model, with a hook that passes it this module's masks, except on a CPU.

    The hook acts in forward passes over whole sequences, not in decoding steps. dtype: the compute
    dtype of a sharded model, whose float32 weights do not show it.
    """
    if (device or model.device).type != "cpu" and takes_any_mask(model.config):
        hook = functools.partial(_give_mask, dtype=dtype)
        model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    return model


def _give_mask(body, args, kwargs, dtype=None):
    ids = args[0] if args else kwargs.get("input_ids")
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    if ids is None or (cache is not None and cache.get_seq_length()):
        return None  # no token ids, or the sequence continues one in the cache
    seen, S = kwargs.get("attention_mask"), ids.shape[1]
    if S == 1 or (seen is not None and seen.shape != ids.shape):
        return None  # a single token, or a mask that is complete already
    if seen is not None and bool(seen.all()):
        seen = None
    dtype = dtype or dtype_of(body)
    if seen is None and has_flash_attention(ids.device, dtype, head_size(body.config)):
        mask = None
    else:
        mask = causal(ids, seen)
    return args, {**kwargs, "attention_mask": mask}


def causal(ids, seen=None):
    """Return the causal mask, (n, 1, S, S) bool, true where a position may be attended to.

    A position attends to itself and to earlier positions where `seen` (n, S) is true; None: to all
    earlier positions.
    """
    n, S = ids.shape
    before = torch.ones(S, S, dtype=torch.bool, device=ids.device).tril()
    if seen is None:
        return before.expand(n, 1, S, S)
    itself = torch.eye(S, dtype=torch.bool, device=ids.device)
    return ((before & seen[:, None].bool()) | itself)[:, None]


def dtype_of(body):
    """Return the dtype in which a forward pass computes: autocast's, or the weights'."""
    weight = body.get_input_embeddings().weight
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def head_size(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
