"""Run a decoder's forward passes: prefill of many prompts, then one token per row.

Shapes: P prompts, R unfinished rows, V vocabulary.
"""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from engine.rows import product
from sampling import cache_argument, position_ids


def prefill(model, prompt, prompt_mask, tokens):
    """Run each prompt through the model once. Return (logits after each prompt, (P, V), KV cache).

    `tokens` prompt tokens, padding included, are run per pass. Without padding, no mask is needed.
    """
    padded, position = not bool(prompt_mask.all()), position_ids(prompt_mask)
    logits, caches, together = [], [], max(1, tokens // prompt.shape[1])
    for i in range(0, len(prompt), together):
        some, cache = slice(i, i + together), DynamicCache()
        cache.layers = [_FirstKeys() for _ in range(model.config.num_hidden_layers)]
        mask = prompt_mask[some] if padded else None
        logits.append(next_logits(model, prompt[some], mask, position[some], cache))
        caches.append(cache)
    for layers in zip(*(cache.layers for cache in caches)) if len(caches) > 1 else ():
        layers[0].keys = torch.cat([layer.keys for layer in layers])
        layers[0].values = torch.cat([layer.values for layer in layers])
    return torch.cat(logits), caches[0]


class _FirstKeys(DynamicLayer):
    """A cache layer that stores the first keys and values without copying them.

    transformers' own layer copies them.
    """

    def update(self, keys, values, *args, **kwargs):
        self.keys, self.values, self.is_initialized = keys, values, True
        return keys, values


def next_logits(model, ids, visible, position, cache):
    """Return the logits after the last of the new tokens `ids`, (R, V), and extend the cache."""
    inputs = {"attention_mask": visible, "position_ids": position, "use_cache": True}
    inputs[cache_argument(type(model))] = cache
    if model.get_input_embeddings().weight.dtype == torch.float32:
        return model(ids, logits_to_keep=1, **inputs).logits[:, -1]
    # for 16-bit weights, keep the float32 accumulator of the product that computes the logits
    states = model.base_model(ids, **inputs).last_hidden_state[:, -1]
    return product(states, model.get_output_embeddings().weight, torch.float32)
