"""Compute the internal policies of a model's layers: residual stream, logits and entropies.

"Bottom-up Policy Optimization", Tan et al., arXiv 2512.19673, equation numbers of version 3. A
pre-norm decoder adds two terms per layer to its residual stream (Eq. 4),

    H^l = H^(l-1) + A^l + F^l
    A^l from attention(LN_in(H^(l-1))),    F^l from mlp(LN_post(H^(l-1) + A^l))

and each of H^l, A^l and F^l, multiplied by the unembedding matrix E_u, defines an internal policy
(Eq. 5-6): softmax(H^l E_u^T), softmax(A^l E_u^T), softmax(F^l E_u^T). The model's own policy is
softmax(norm(H^L) E_u^T).

Layers count 1 ... L as in the paper, H^0 is the embedding output, and every H here is taken
*before* the final norm. (In transformers' own `hidden_states`, the last entry is taken after the
final norm and the others are not, which is easily overlooked.)

Shapes: B sequences, S positions, D hidden size, L layers, V vocabulary. Entropies in nats.
The released code (Trae1ounG/BuPO, commit d3a85c6) counts layers from 0, edits copies of three model
files and always runs all L layers. Here no code of transformers is copied or patched, and
`layer_hidden` runs only layers 1 ... l.

    python internals.py --model DIR     prints the entropy of every layer's policy
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

if __name__ == "__main__":  # before torch, whose import takes seconds: report mistakes at once
    import common.threads  # noqa: F401
    from common.command import run_main
    from scripts.internal_options import read_command_line

    run_main(read_command_line)

import torch
from torch import Tensor, nn
from tqdm import tqdm

from losses import token_logprobs_and_entropy
from sampling import Rollout, Rows, position_ids

# (states (N, D), weight (V, D), targets (N,)) -> (log-probabilities, entropies), (N,) each
Scorer = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# --------------------------------------------------------------------------- the parts of a decoder


def decoder_body(model: nn.Module) -> nn.Module:
    """Return the module that holds `layers` and `norm`.

    ValueError if the model is not built as expected; it names the missing part.
    """
    body = model.base_model
    name = type(model).__name__
    for part in ("layers", "norm", "embed_tokens"):
        if not hasattr(body, part):
            raise ValueError(
                f"{name}: no '{part}' in its decoder; "
                "internal policies need blocks laid out as in Qwen2, Qwen3 and Llama"
            )
    for part in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
        if not hasattr(body.layers[0], part):
            raise ValueError(
                f"{name}: its blocks have no '{part}'; "
                "internal policies need pre-norm blocks as in Qwen2, Qwen3 and Llama"
            )
    return body


def layer_count(model: nn.Module) -> int:
    """Return L, the number of decoder layers."""
    return len(decoder_body(model).layers)


def check_layer(model: nn.Module, layer: int, name: str = "layer") -> None:
    """Raise ValueError if the model has no layer of this number (from 1)."""
    if not 1 <= layer <= layer_count(model):
        raise ValueError(f"{name} {layer}: this model has the layers 1 to {layer_count(model)}")


def unembedding(model: nn.Module) -> Tensor:
    """Return E_u, the output embedding, (V, D)."""
    return model.get_output_embeddings().weight


@torch.no_grad()
def check_logits(model: nn.Module, name: str) -> None:
    """Raise ValueError unless the logits are hidden states times the output embedding.

    Entropies and internal policies are computed from that product. A model that scales or caps its
    logits, or adds a bias, would be scored as another one. `name` begins the message.
    """
    ids = torch.tensor([[1, 2, 3]], device=model.device)  # 0 may be padding, with states of 0
    training = model.training
    model.eval()
    logits = model(ids, use_cache=False).logits.float()
    states = model.base_model(ids, use_cache=False).last_hidden_state
    model.train(training)
    product = (states @ unembedding(model).T).float()
    if not logits.isfinite().all():
        return  # the first response will name it
    largest = (logits - product).abs().max().item()
    allowed = 1e-4 if states.dtype == torch.float32 else 0.05
    if not largest <= allowed * (1 + product.abs().max().item()):
        raise ValueError(
            f"{name}: its logits are more than hidden states times the output embedding (they "
            f"differ by {largest:.2g}: scaled, capped or with a bias); scoring would disagree with "
            "sampling"
        )


# ----------------------------------------------------------------------------------- forward passes


@contextlib.contextmanager
def first_layers(model: nn.Module, layer: int | None, norm: bool, head: bool = False) -> Iterator:
    """Make a model run only layers 1 ... layer (None: all) while open.

    Its final norm is applied if `norm`. Its output embedding is applied if `head`; otherwise the
    model's `logits` are hidden states. Modules are exchanged and not copied, so the model keeps its
    masks, positions and sharding.
    """
    body, unembed = model.base_model, model.get_output_embeddings()
    layers, final_norm = body.layers, body.norm
    try:
        if layer is not None:  # BuPO 5: no layer above l runs or gets a gradient
            check_layer(model, layer)
            body.layers = layers[:layer]
        if not norm:
            body.norm = nn.Identity()
        model.set_output_embeddings(unembed if head else nn.Identity())
        yield
    finally:
        body.layers, body.norm = layers, final_norm
        model.set_output_embeddings(unembed)


def policy_hidden(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    layer: int | None = None,
    norm: bool = True,
) -> Tensor:
    """Return the hidden states of layer `layer` (default: the last), (B, S, D).

    norm=True applies the final norm. policy_hidden(model, ids, mask) @ unembedding(model).T are the
    model's own logits.
    """
    mask, positions = attention_mask, position_ids(attention_mask)
    if bool((mask[:, :-1] >= mask[:, 1:]).all()) and bool(mask[:, 0].all()):
        mask = positions = None  # only right padding: causal attention needs no mask for it
    with first_layers(model, layer, norm):
        return model(input_ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


class PackedBatch(NamedTuple):
    """Some responses with their prompts, laid out in rows for one forward pass."""

    ids: Tensor  # (rows, width)
    mask: Tensor | None  # attention mask; None: causal attention, and padding only on the right
    positions: Tensor | None  # position ids, (rows, width); None: 0, 1, 2, ...
    predecessors: Tensor  # (N,) for each response token, the flat index of the state predicting it
    tokens: Tensor  # (N,) the response tokens, one response after the other


def unpacked(rollout: Rollout, rows: Rows) -> PackedBatch:
    """Return the plain layout: one response per row, after its prompt."""
    ids, _, predicts = rollout.sequences(rows)
    # the last column predicts nothing; prompt states are computed but not multiplied by E_u
    predecessors = predicts[:, :-1].flatten().nonzero().squeeze(1)
    tokens = ids[:, 1:].flatten()[predecessors]
    return PackedBatch(ids[:, :-1], None, None, predecessors, tokens)


def response_states(
    model: nn.Module, packed: PackedBatch, layer: int | None = None, norm: bool = True
) -> Tensor:
    """Return the states that predict the response tokens, (N, D), in the order of packed.tokens.

    layer: None for the model's last layer. The states do not depend on the layout.
    """
    with first_layers(model, layer, norm):
        out = model(
            packed.ids,
            attention_mask=packed.mask,
            position_ids=packed.positions,
            use_cache=False,
        )
    # first_layers has removed the output embedding, so `logits` are hidden states
    return out.logits.flatten(0, 1).index_select(0, packed.predecessors)


def layer_hidden(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layer: int) -> Tensor:
    """Return H^l, (B, S, D), before the final norm; differentiable. Only layers 1 ... l are run."""
    return policy_hidden(model, input_ids, attention_mask, layer, norm=False)


def layer_logits(model: nn.Module, hidden: Tensor, norm: bool = False) -> Tensor:
    """Return the logits hidden E_u^T of Eq. 5-6, (..., D) -> (..., V).

    norm=True applies the final norm first.
    """
    return (decoder_body(model).norm(hidden) if norm else hidden) @ unembedding(model).T


class ResidualStream(NamedTuple):
    """The terms of Eq. 4, each (B, S, D). Layer l is hidden[l], and index l - 1 in the other lists.

    If residual_stream was given a `keep`, each term has the shape that `keep` returns.
    """

    hidden: list  # H^0 ... H^L, before the final norm
    attention: list  # A^1 ... A^L
    feed_forward: list  # F^1 ... F^L
    attention_input: list  # LN_in(H^(l-1))
    feed_forward_input: list  # LN_post(H^(l-1) + A^l)


def residual_stream(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    keep: Callable[[Tensor], Tensor] = lambda states: states,
) -> ResidualStream:
    """Return the residual stream of one forward pass.

    keep: applied to every state, (B, S, D), to store only a part of it. ValueError if the blocks
    are not pre-norm.
    """
    body, stream, hooks = decoder_body(model), ResidualStream([], [], [], [], []), []

    def keep_input(block, args, kwargs):
        stream.hidden.append(keep(args[0] if args else kwargs["hidden_states"]))

    def keep_output(into):
        # attention returns a tuple whose first item is added to the residual stream
        first = lambda out: out[0] if isinstance(out, tuple) else out
        return lambda module, args, out: into.append(keep(first(out)))

    for block in body.layers:
        hooks += [
            block.register_forward_pre_hook(keep_input, with_kwargs=True),
            block.input_layernorm.register_forward_hook(keep_output(stream.attention_input)),
            block.self_attn.register_forward_hook(keep_output(stream.attention)),
            block.post_attention_layernorm.register_forward_hook(
                keep_output(stream.feed_forward_input)
            ),
            block.mlp.register_forward_hook(keep_output(stream.feed_forward)),
        ]
    try:
        last = layer_hidden(model, input_ids, attention_mask, len(body.layers))
        stream.hidden.append(keep(last))
    finally:
        for hook in hooks:
            hook.remove()
    _check_sum(stream, type(model).__name__, len(body.layers))
    return stream


def _check_sum(stream, name, layers):
    if not stream.hidden[0].numel():
        return
    for l, (a, f) in enumerate(zip(stream.attention, stream.feed_forward), 1):
        before, after = stream.hidden[l - 1], stream.hidden[l]
        error = (after - before - a - f).abs().max()
        if len(stream.feed_forward) != layers or error > 0.02 * after.abs().max():
            raise ValueError(
                f"{name}: H^{l} is not H^{l - 1} + A^{l} + F^{l} (off by {error:.2g}); "
                "internal policies need pre-norm residual blocks"
            )


# ---------------------------------------------------------------------------------------- entropies


class InternalEntropy(NamedTuple):
    """Mean entropies in nats over all response tokens, and their changes (Eq. 7-8, 11-13).

    All tensors are on the CPU.
    """

    layer: Tensor  # (L + 1,) H(H^0) ... H(H^L)
    attention: Tensor  # (L,) H(A^l)
    feed_forward: Tensor  # (L,) H(F^l)
    attention_input: Tensor  # (L,) H(LN_in(H^(l-1)))
    feed_forward_input: Tensor  # (L,) H(LN_post(H^(l-1) + A^l))
    attention_cosine: Tensor  # (L,) cos(A^l, H^(l-1))
    feed_forward_cosine: Tensor  # (L,) cos(F^l, H^(l-1) + A^l)
    policy: Tensor  # () entropy of the model's own policy, with the final norm

    @property
    def layer_change(self) -> Tensor:
        """Return H(H^l) - H(H^(l-1)), (L,): positive if the layer explores, negative if not."""
        return self.layer[1:] - self.layer[:-1]

    @property
    def attention_change(self) -> Tensor:
        """Return H(A^l) - H(LN_in(H^(l-1))), (L,): output minus input."""
        return self.attention - self.attention_input

    @property
    def feed_forward_change(self) -> Tensor:
        """Return H(F^l) - H(LN_post(H^(l-1) + A^l)), (L,): output minus input."""
        return self.feed_forward - self.feed_forward_input


DIAGNOSED_TOKENS = 2**12  # tokens per forward pass, padding included; at least one sequence
LOGITS_CHUNK = 2**24  # logits that are in memory at a time


def diagnostic_batch_size(width: int) -> int:
    """Return how many sequences of `width` tokens are measured in one forward pass.

    The processes of a sharded model must use the same number, since every forward pass is a
    collective call.
    """
    return max(1, DIAGNOSED_TOKENS // width)


def chunked_scores(states: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses.token_logprobs_and_entropy, computed in chunks of bounded memory."""
    chunk = max(1, LOGITS_CHUNK // len(weight))
    return token_logprobs_and_entropy(states, weight, targets, chunk_tokens=chunk)


def predicting(states: Tensor, response_mask: Tensor) -> Tensor:
    """Return the states that predict response tokens, (B, S, D) -> (N, D).

    Each is one position to the left of its token.
    """
    return states[:, :-1][response_mask[:, 1:].bool()]


@torch.no_grad()
def internal_entropy(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    vocab_size: int | None = None,
    batch: int | None = None,
    progress: str | None = None,
    token_scores: Scorer = chunked_scores,
) -> InternalEntropy:
    """Return the entropy of every internal policy, averaged over response tokens.

    Ids and masks are (B, S). `batch` sequences are run at a time. Ids from vocab_size on (a padded
    vocabulary) are left out. `progress` is the title of a progress bar, None for no bar.
    `token_scores` may be a faster function with the same result.
    """
    total, count = None, 0
    batch = batch or diagnostic_batch_size(input_ids.shape[1])
    starts = range(0, len(input_ids), batch)
    for i in tqdm(starts, desc=progress, disable=not progress or None, leave=False):
        rows = slice(i, i + batch)
        of_responses = functools.partial(predicting, response_mask=response_mask[rows])
        parts = residual_stream(model, input_ids[rows], attention_mask[rows], of_responses)
        weight = unembedding(model)[:vocab_size]  # a sharded model gathers it in its forward pass
        own = decoder_body(model).norm(parts.hidden[-1])
        before_ffn = [h + a for h, a in zip(parts.hidden, parts.attention)]
        entropy_sum = lambda states: _entropy_sum(states, weight, token_scores)
        sums = [torch.stack([entropy_sum(states) for states in part]) for part in parts]
        sums += [_cosine_sums(parts.attention, parts.hidden)]
        sums += [_cosine_sums(parts.feed_forward, before_ffn), entropy_sum(own)]
        total = sums if total is None else [t + s for t, s in zip(total, sums)]
        count += len(own)
    if not count:
        raise ValueError("internal entropies need at least one response token behind another")
    return InternalEntropy(*((t / count).cpu() for t in total))


def _entropy_sum(states, weight, token_scores):
    targets = torch.zeros(len(states), dtype=torch.long, device=states.device)
    _, entropy = token_scores(states, weight, targets)
    return entropy.cpu().double().sum()


def _cosine_sums(xs, ys):
    cosine = nn.functional.cosine_similarity
    return torch.stack([cosine(x, y, dim=-1).cpu().double().sum() for x, y in zip(xs, ys)])


def boundary_layer(ffn_entropy_change: Tensor | list[float]) -> int | None:
    """Return the last layer l (from 1) whose feed-forward block raises entropy, dH_ffn^l > 0.

    Return None if there is no such layer. The input is (L,). BuPO aligns this layer: no
    feed-forward block above it raises entropy.
    """
    positive = (torch.as_tensor(ffn_entropy_change) > 0).nonzero()
    return int(positive[-1]) + 1 if len(positive) else None


# -------------------------------------------------------------------- comparing layers of one model


@torch.no_grad()
def layer_similarity(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    layer: int,
    vocab_size: int | None = None,
    batch: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compare layer l = `layer` with every later layer k. Return (cosine, kl), (L - l,) each.

    cosine  mean cos(H^l, H^k)
    kl      mean KL(policy_l || policy_k) in nats, of the internal policies of Eq. 5

    Means are over response tokens; the results are on the CPU. `batch` sequences are run at a time.
    """
    count, sums = 0, torch.zeros(2, layer_count(model) - layer, dtype=torch.float64)
    batch = batch or diagnostic_batch_size(input_ids.shape[1])
    for i in range(0, len(input_ids) if sums.numel() else 0, batch):
        rows = slice(i, i + batch)
        of_responses = functools.partial(predicting, response_mask=response_mask[rows])
        stream = residual_stream(model, input_ids[rows], attention_mask[rows], of_responses)
        own, *others = stream.hidden[layer:]
        weight = unembedding(model)[:vocab_size]
        kl = torch.stack([policy_kl(own, h, weight) * len(own) for h in others])
        sums += torch.stack([_cosine_sums([own] * len(others), others), kl])
        count += len(own)
    cosine, kl = (sums / max(1, count)).float()
    return cosine, kl


@torch.no_grad()
def perplexity(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    vocab_size: int | None = None,
    batch: int | None = None,
    token_scores: Scorer = chunked_scores,
) -> float:
    """Return the perplexity of the response tokens under the full policy.

    It is exp of their mean negative log-probability. `batch` sequences are run at a time;
    `token_scores` is as in internal_entropy.
    """
    total, count = 0.0, 0
    batch = batch or diagnostic_batch_size(input_ids.shape[1])
    for i in range(0, len(input_ids), batch):
        ids, response = input_ids[i : i + batch], response_mask[i : i + batch]
        states = predicting(policy_hidden(model, ids, attention_mask[i : i + batch]), response)
        tokens = ids[:, 1:][response[:, 1:].bool()]
        logp, _ = token_scores(states, unembedding(model)[:vocab_size], tokens)
        total, count = total + logp.cpu().double().sum(), count + len(logp)
    return float((-total / count).exp())


@torch.no_grad()
def policy_kl(
    states: Tensor, others: Tensor, weight: Tensor, chunk_tokens: int | None = None
) -> Tensor:
    """Return the mean KL(softmax(states E^T) || softmax(others E^T)) over N tokens, in nats.

    (N, D), (N, D), (V, D) -> (). Logits are computed for `chunk_tokens` tokens at a time.
    """
    chunk = chunk_tokens or max(1, LOGITS_CHUNK // weight.shape[0])
    total = 0.0
    with torch.autocast(states.device.type, enabled=False):
        for p, q in zip(states.split(chunk), others.split(chunk)):
            both = ((x.to(weight.dtype) @ weight.T).float() for x in (p, q))
            log_p, log_q = (x.log_softmax(-1) for x in both)
            total = total + (log_p.exp() * (log_p - log_q)).sum().cpu().double()
    return total / max(1, len(states))


if __name__ == "__main__":
    from scripts.internal_report import main

    run_main(main)
