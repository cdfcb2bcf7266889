"""BuPO: align a lower layer's policy first, then the whole model.

"Bottom-up Policy Optimization", Tan et al., arXiv 2512.19673, version 3. Phase 1 (steps 1 ...
s_inter) trains the internal policy of layer l on responses, rewards and advantages of the full
policy; phase 2 trains the full policy.

    Eq. 9   IPA loss: losses.clipped_surrogate, its ratio  pi_layer^l(o) / pi_layer,old^l(o)
    Eq. 10  the schedule: target_layer

Both phases use the same surrogate. `internals.response_states(..., layer=l, norm=False)` returns
layer l's states, and from there on phase 1 runs the same lines of train.py as phase 2. The
computation graph decides which weights change: in phase 1 the gradient reaches the embedding,
layers 1 ... l and the unembedding. Layers above l are not computed. They and the final norm have no
gradient at all (None, not zero), so AdamW leaves them unchanged to the last bit: no weight decay,
no moments.

The released code (Trae1ounG/BuPO, commit d3a85c6) counts layers from 0 (its 5 is layer 6 here),
computes all L layers and the vocabulary projection twice, and logs the last layer's entropy in
phase 1. Here the entropies of both policies are logged, under different names.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from internals import (
    Scorer,
    boundary_layer,
    chunked_scores,
    diagnostic_batch_size,
    internal_entropy,
)

AUTO = "auto"  # the boundary layer, which is measured in step 1


def target_layer(step: int, inter_steps: int, layer: int | str | None) -> int | str | None:
    """Return the layer whose policy is trained at `step` (from 1), Eq. 10; None: the full policy.

    `layer` is AUTO until the boundary layer has been measured, and None in a run without BuPO.
    """
    if layer is None:
        return None
    return layer if step <= inter_steps else None


class Boundary(NamedTuple):
    """The layer to align, and the measurement that found it."""

    layer: int
    found: bool  # False: no block raises entropy, and this is the one whose entropy falls least
    change: Tensor  # (L,) dH_ffn of every layer, in nats


def measure_boundary(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    vocab_size: int | None = None,
    dist: object | None = None,
    token_scores: Scorer = chunked_scores,
) -> Boundary:
    """Return the Boundary of a model, measured on N sequences; ids and masks are (N, S) each.

    dist: the processes of a sharded model, each with different responses (engine/engine.py).
    """
    width = input_ids.shape[1]
    batch = diagnostic_batch_size(width if dist is None else int(dist.all_reduce_max(width)))
    masks = (attention_mask, response_mask)
    entropy = internal_entropy(
        model, input_ids, *masks, vocab_size, batch, token_scores=token_scores
    )
    change = entropy.feed_forward_change.double()
    if dist is not None:  # entropies are means over the tokens of all processes
        dist.reshard(model)
        tokens = float(response_mask.sum())
        sums = dist.all_reduce_sum(*(entropy.feed_forward_change * tokens).tolist(), tokens)
        change = torch.tensor(sums[:-1], dtype=torch.float64) / sums[-1]
    layer, found = boundary_or_fallback(change)
    return Boundary(layer, found, change)


def boundary_or_fallback(ffn_entropy_change: Tensor | list[float]) -> tuple[int, bool]:
    """Return (boundary layer, True) from the changes dH_ffn of all layers, (L,).

    If no change is positive, return (layer with the largest change, False).
    """
    layer = boundary_layer(ffn_entropy_change)
    if layer:
        return layer, True
    return int(torch.as_tensor(ffn_entropy_change).argmax()) + 1, False
