"""BuPO: align a lower layer's policy first, then the whole model.

"Bottom-up Policy Optimization", Tan et al., arXiv 2512.19673, version 3. Phase 1 (steps 1 ...
s_inter) trains the internal policy of layer l on answers, rewards and advantages of the full
policy; phase 2 trains the full policy as ever.

    Eq. 9   IPA loss: losses.clipped_surrogate, its ratio  pi_layer^l(o) / pi_layer,old^l(o)
    Eq. 10  the schedule

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

import torch
from torch import Tensor, nn

from internals import boundary_layer, check_layer, decoder_body


def target_layer(step: int, inter_steps: int, layer: int | None) -> int | None:
    """Eq. 10: the layer whose policy is trained at `step` (from 1), or None: the full policy."""
    return layer if layer is not None and step <= inter_steps else None


def boundary_or_fallback(ffn_entropy_change: Tensor | list[float]) -> tuple[int, bool]:
    """(layer, True) for the boundary layer; where no change is positive, (the layer whose entropy
    falls least, False)."""
    layer = boundary_layer(ffn_entropy_change)
    if layer:
        return layer, True
    return int(torch.as_tensor(ffn_entropy_change).argmax()) + 1, False


# ------------------------------------------------------------------------- the paper's comparisons


def lower_layers(model: nn.Module, layer: int) -> list[nn.Parameter]:
    """Layers 1 ... layer: those that the arm "freeze" keeps still in the first phase, while the
    full policy trains."""
    check_layer(model, layer)
    return [p for part in decoder_body(model).layers[:layer] for p in part.parameters()]


def all_but_layer(model: nn.Module, layer: int) -> list[nn.Parameter]:
    """Everything outside layer `layer`: what the arm "one-layer" keeps still in the first phase,
    while the full policy trains."""
    check_layer(model, layer)
    own = {id(p) for p in decoder_body(model).layers[layer - 1].parameters()}
    return [p for p in model.parameters() if id(p) not in own]


def layerwise_groups(model: nn.Module, layer: int, lr: float, scale: float = 0.1) -> list[dict]:
    """Optimiser groups of the arm "layer-lr": layers above `layer` learn at `scale` times lr."""
    upper = [p for part in decoder_body(model).layers[layer:] for p in part.parameters()]
    known = {id(p) for p in upper}
    rest = [p for p in model.parameters() if id(p) not in known]
    return [{"params": rest, "lr": lr}, {"params": upper, "lr": lr * scale}]
