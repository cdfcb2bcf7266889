"""BuPO: align a lower layer's policy first, then the whole model.

"Bottom-up Policy Optimization", Tan et al., arXiv 2512.19673, version 3. Phase 1 (steps 1 ...
s_inter) trains the internal policy of layer l on answers, rewards and advantages of the full
policy; phase 2 trains the full policy as ever.

    Eq. 9   IPA loss: losses.clipped_surrogate, its ratio  pi_layer^l(o) / pi_layer,old^l(o)
    Eq. 10  the schedule: target_layer, which every part of a run asks

There is no second surrogate here: `internals.answer_states(..., layer=l, norm=False)` gives the
states, and from there on phase 1 runs through the very lines of train.py that phase 2 does. Who
moves follows from the graph: in phase 1 the gradient reaches the embedding, layers 1 ... l and the
unembedding; nothing above layer l is even computed. Layers above l and the final norm have no
gradient at all (None, not zero), so AdamW passes them by: no weight decay, no moments,
bit-identical.

The released code (Trae1ounG/BuPO, commit d3a85c6) counts layers from 0 (its 5 is layer 6 here),
computes all L layers and the vocabulary projection twice, and logs the last layer's entropy in
phase 1; here both entropies have their own names.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from internals import boundary_layer, internal_entropy, together

AUTO = "auto"  # a layer that will be known once it has been measured


def target_layer(step: int, inter_steps: int, layer: int | str | None) -> int | str | None:
    """Eq. 10: the layer whose policy is trained at `step` (from 1), or None: the full policy.

    layer may be AUTO while it is not measured yet; None: a run without BuPO.
    """
    if layer is None:
        return None
    return layer if step <= inter_steps else None


class Boundary(NamedTuple):
    """The layer to align, and what it was found by."""

    layer: int
    found: bool  # False: no block raises entropy, and this is the one whose entropy falls least
    change: Tensor  # (L,) dH_ffn of every layer, in nats


def measure_boundary(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    vocab_size: int,
    ranks: object,
) -> Boundary:
    """The boundary layer of a model on some answers, (N, S) each; on those of all processes."""
    batch = together(int(ranks.max(input_ids.shape[1])))
    entropy = internal_entropy(model, input_ids, attention_mask, response_mask, vocab_size, batch)
    ranks.reshard(model)
    # entropies are means over tokens, so they are over processes
    tokens = float(response_mask.sum())
    sums = ranks.total(*(entropy.feed_forward_change * tokens).tolist(), tokens)
    change = torch.tensor(sums[:-1], dtype=torch.float64) / sums[-1]
    layer, found = boundary_or_fallback(change)
    return Boundary(layer, found, change)


def boundary_or_fallback(ffn_entropy_change: Tensor | list[float]) -> tuple[int, bool]:
    """(layer, True) for the boundary layer; where no change is positive, (the layer whose entropy
    falls least, False)."""
    layer = boundary_layer(ffn_entropy_change)
    if layer:
        return layer, True
    return int(torch.as_tensor(ffn_entropy_change).argmax()) + 1, False
