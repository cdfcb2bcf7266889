"""Every layer is a policy: residual stream, internal policies, and how their entropy flows.

"Bottom-up Policy Optimization", Tan et al., arXiv 2512.19673, equation numbers of version 3. A
pre-norm decoder adds two terms a layer to its residual stream (Eq. 4),

    H^l = H^(l-1) + A^l + F^l
    A^l from attention(LN_in(H^(l-1))),    F^l from mlp(LN_post(H^(l-1) + A^l))

and each of them, multiplied by the unembedding matrix E_u, is a policy of its own (Eq. 5-6):
softmax(H^l E_u^T), softmax(A^l E_u^T), softmax(F^l E_u^T). The model's own is
softmax(norm(H^L) E_u^T).

Layers count 1 ... L as in the paper, H^0 is the embedding output, and every H here is taken
*before* the final norm. (The last entry of transformers' own `hidden_states` is already normed, the
inner ones are not: a common trap.)

Shapes: B sequences, S positions, D hidden size, L layers, V vocabulary. Entropies in nats.
The released code (Trae1ounG/BuPO, commit d3a85c6) counts layers from 0, edits copies of three model
files and always runs all L layers; here nothing of transformers is copied or patched, and
`layer_hidden` runs layers 1 ... l alone.

    python internals.py --model DIR     prints the entropy of every layer's policy
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

if __name__ == "__main__":  # before torch, whose import takes seconds: mistakes are named at once
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
    """Return the module that holds `layers` and `norm`; ValueError names what is missing."""
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
    """Raise ValueError if the model has no such layer."""
    if not 1 <= layer <= layer_count(model):
        raise ValueError(f"{name} {layer}: this model has the layers 1 to {layer_count(model)}")


def unembedding(model: nn.Module) -> Tensor:
    """Return E_u, (V, D)."""
    return model.get_output_embeddings().weight


# ----------------------------------------------------------------------------------- forward passes


@contextlib.contextmanager
def first_layers(model: nn.Module, layer: int | None, norm: bool, head: bool = False) -> Iterator:
    """While open, the model runs layers 1 ... layer, norms if asked to; without its head, `logits`
    are hidden states. Modules are swapped, not copied: masks, positions, sharding stay its own."""
    body, unembed = model.base_model, model.get_output_embeddings()
    layers, final_norm = body.layers, body.norm
    try:
        if layer is not None:  # BuPO 5: nothing above layer l runs, nor gets a gradient
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
    """The states a policy unembeds: layer `layer`'s (default: the last), normed or not, (B, S, D).
    policy_hidden(model, ids, mask) @ unembedding(model).T are the model's own logits."""
    mask, positions = attention_mask, position_ids(attention_mask)
    if bool((mask[:, :-1] >= mask[:, 1:]).all()) and bool(mask[:, 0].all()):
        mask = positions = None  # padding on the right alone: causal attention ignores it
    with first_layers(model, layer, norm):
        return model(input_ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


class PackedBatch(NamedTuple):
    """Some responses with their prompts, laid out in rows for one forward pass."""

    ids: Tensor  # (rows, width)
    mask: Tensor | None  # of the attention; None: causal, with padding on the right alone
    positions: Tensor | None  # None: 0, 1, 2, ...
    predecessors: Tensor  # (N,) for each response token the flat index of the state before it
    tokens: Tensor  # (N,) the response tokens themselves, one response after the other


def unpacked(rollout: Rollout, rows: Rows) -> PackedBatch:
    """Return the plain layout: one response per row, after its prompt."""
    ids, _, predicts = rollout.sequences(rows)
    # the last column predicts nothing; states of prompt tokens are computed and never projected
    predecessors = predicts[:, :-1].flatten().nonzero().squeeze(1)
    tokens = ids[:, 1:].flatten()[predecessors]
    return PackedBatch(ids[:, :-1], None, None, predecessors, tokens)


def response_states(
    model: nn.Module, packed: PackedBatch, layer: int | None = None, norm: bool = True
) -> Tensor:
    """Return the states that predict the response tokens, (N, D), in the order of packed.tokens.

    layer None: of the model's last layer. The layout changes none of them.
    """
    with first_layers(model, layer, norm):
        out = model(
            packed.ids,
            attention_mask=packed.mask,
            position_ids=packed.positions,
            use_cache=False,
        )
    # first_layers has taken the head off: what the model calls logits are states
    return out.logits.flatten(0, 1).index_select(0, packed.predecessors)


def layer_hidden(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layer: int) -> Tensor:
    """H^l, (B, S, D): layers 1 ... l are computed, nothing above; no final norm; differentiable."""
    return policy_hidden(model, input_ids, attention_mask, layer, norm=False)


def layer_logits(model: nn.Module, hidden: Tensor, norm: bool = False) -> Tensor:
    """Eq. 5-6: hidden E_u^T, (..., D) -> (..., V). norm=True applies the final norm first."""
    return (decoder_body(model).norm(hidden) if norm else hidden) @ unembedding(model).T


class ResidualStream(NamedTuple):
    """Eq. 4, all of shape (B, S, D). Layer l of the paper: hidden[l], and index l - 1 elsewhere."""

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
    """Return the residual stream of one forward pass, keep(state) of every state, (..., D).

    ValueError if the blocks are not pre-norm.
    """
    body, stream, hooks = decoder_body(model), ResidualStream([], [], [], [], []), []

    def keep_input(block, args, kwargs):
        stream.hidden.append(keep(args[0] if args else kwargs["hidden_states"]))

    def keep_output(into):
        # attention returns a tuple, whose first part is what it adds
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
    """Mean entropies over all response tokens and their changes (Eq. 7-8, 11-13); on the CPU."""

    layer: Tensor  # (L + 1,) H(H^0) ... H(H^L)
    attention: Tensor  # (L,) H(A^l)
    feed_forward: Tensor  # (L,) H(F^l)
    attention_input: Tensor  # (L,) H(LN_in(H^(l-1)))
    feed_forward_input: Tensor  # (L,) H(LN_post(H^(l-1) + A^l))
    attention_cosine: Tensor  # (L,) cos(A^l, H^(l-1))
    feed_forward_cosine: Tensor  # (L,) cos(F^l, H^(l-1) + A^l)
    policy: Tensor  # () the model's own policy, with the final norm

    @property
    def layer_change(self) -> Tensor:
        """H(H^l) - H(H^(l-1)), (L,). Positive: the layer explores; negative: it converges."""
        return self.layer[1:] - self.layer[:-1]

    @property
    def attention_change(self) -> Tensor:
        """H(A^l) - H(LN_in(H^(l-1))), (L,): against what the block was given."""
        return self.attention - self.attention_input

    @property
    def feed_forward_change(self) -> Tensor:
        """H(F^l) - H(LN_post(H^(l-1) + A^l)), (L,)."""
        return self.feed_forward - self.feed_forward_input


DIAGNOSED_TOKENS = 2**12  # measured in one pass, padding included; at least one sequence
LOGITS_CHUNK = 2**24  # logits that exist at a time


def diagnostic_batch_size(width: int) -> int:
    """Return how many sequences of a width are measured in one pass.

    The processes of a sharded model must agree on it: every pass is a collective call.
    """
    return max(1, DIAGNOSED_TOKENS // width)


def chunked_scores(states: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return token_logprobs_and_entropy of many tokens, with bounded memory."""
    chunk = max(1, LOGITS_CHUNK // len(weight))
    return token_logprobs_and_entropy(states, weight, targets, chunk_tokens=chunk)


def predicting(states: Tensor, response_mask: Tensor) -> Tensor:
    """The states that predict response tokens: one position to their left. (B, S, D) -> (N, D)."""
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

    All masks (B, S); `batch` sequences at a time; ids from vocab_size on (a padded vocabulary) do
    not count. `progress` names a bar. `token_scores` may be a faster function with the same result.
    """
    total, count = None, 0
    batch = batch or diagnostic_batch_size(input_ids.shape[1])
    starts = range(0, len(input_ids), batch)
    for i in tqdm(starts, desc=progress, disable=not progress or None, leave=False):
        rows = slice(i, i + batch)
        of_responses = functools.partial(predicting, response_mask=response_mask[rows])
        parts = residual_stream(model, input_ids[rows], attention_mask[rows], of_responses)
        weight = unembedding(model)[:vocab_size]  # a sharded model has gathered it by now
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
    """The last layer l (from 1) whose feed-forward block raises entropy, dH_ffn^l > 0; or None.

    BuPO aligns this layer: the last one that still explores before the model only converges.
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
    """Against every later layer k = layer + 1 ... L, over response tokens: two (L - layer,), on the
    CPU. `batch` sequences at a time.

    cosine  mean cos(H^l, H^k)
    kl      mean KL(policy_l || policy_k) in nats, the internal policies of Eq. 5
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
    """Return exp of the mean negative log-probability of the response tokens, full policy.

    `batch` sequences at a time; `token_scores` as in internal_entropy.
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
    """Mean KL(softmax(states E^T) || softmax(others E^T)) over N tokens; (N, D) twice -> ()."""
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
