"""Every layer is a policy: the residual stream of a decoder, its internal policies, and how their entropy flows.

"Bottom-up Policy Optimization", Tan et al., arXiv 2512.19673, equation numbers of version 3. A pre-norm decoder adds two
terms a layer to its residual stream (Eq. 4),

    H^l = H^(l-1) + A^l + F^l,     A^l from attention(LN_in(H^(l-1))),  F^l from mlp(LN_post(H^(l-1) + A^l))

and each of them, multiplied by the unembedding matrix E_u, is a policy of its own (Eq. 5-6): softmax(H^l E_u^T),
softmax(A^l E_u^T), softmax(F^l E_u^T). The model's own policy is softmax(norm(H^L) E_u^T).

Layers count 1 ... L as in the paper, H^0 is the embedding output, and every H here is taken *before* the final norm. (The last
entry of transformers' own `hidden_states` is already normed, the inner ones are not: a common trap.)

Shapes: B sequences, S positions, D hidden size, L layers, V vocabulary. Entropies in nats.
The released code (Trae1ounG/BuPO, commit d3a85c6) counts layers from 0, edits copies of three model files and always runs
all L layers; here nothing of transformers is copied or patched, and `layer_hidden` runs layers 1 ... l alone.

    python internals.py --model DIR     asks every layer of a model for its entropy (scripts/internal_report.py)
"""

import contextlib
import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from losses import token_logprobs_and_entropy
from scale.rollout import position_ids
from tasks import BadInput

# ------------------------------------------------------------------------------------------- the parts of a decoder


def decoder_body(model):
    """The module that holds `layers` and `norm` (Qwen2, Qwen3, Llama, Mistral, ...), or BadInput naming what is missing."""
    body = model.base_model
    name = type(model).__name__
    for part in ("layers", "norm", "embed_tokens"):
        if not hasattr(body, part):
            raise BadInput(f"{name}: no '{part}' in its decoder; internal policies need blocks laid out as in Qwen2, Qwen3 and Llama")
    for part in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
        if not hasattr(body.layers[0], part):
            raise BadInput(f"{name}: its blocks have no '{part}'; internal policies need pre-norm blocks as in Qwen2, Qwen3 and Llama")
    return body


def layer_count(model):
    return len(decoder_body(model).layers)


def check_layer(model, layer):
    if not 1 <= layer <= layer_count(model):
        raise BadInput(f"layer {layer}: this model has the layers 1 to {layer_count(model)}")


def unembedding(model):
    return model.get_output_embeddings().weight


# --------------------------------------------------------------------------------------------------- forward passes


@contextlib.contextmanager
def _cut(model, layer, norm):
    """While open, the model's forward runs layers 1 ... layer, norms if asked to, and returns hidden states as `logits`.

    Modules are swapped, not copied: masks, positions, rotary embeddings, gradient checkpointing and sharding hooks stay the
    model's own, for any architecture that walks through `layers`. All of it is undone on leaving.
    """
    body, head = decoder_body(model), model.get_output_embeddings()
    layers, final_norm = body.layers, body.norm
    layer = len(layers) if layer is None else layer
    check_layer(model, layer)
    try:
        if layer < len(layers):
            body.layers = layers[:layer]
        if not norm:
            body.norm = nn.Identity()
        model.set_output_embeddings(nn.Identity())
        yield
    finally:
        body.layers, body.norm = layers, final_norm
        model.set_output_embeddings(head)


def policy_hidden(model, input_ids, attention_mask, layer=None, norm=True):
    """The states a policy unembeds: layer `layer`'s (default: the last), normed or not, (B, S, D), differentiable.

    policy_hidden(model, ids, mask) @ unembedding(model).T are the model's own logits. The call goes through the model
    itself, so FSDP's root and checkpointing see an ordinary forward pass; no logits are made.
    """
    mask, positions = attention_mask, position_ids(attention_mask)
    if bool((mask[:, :-1] >= mask[:, 1:]).all()) and bool(mask[:, 0].all()):
        mask = positions = None  # padding on the right alone: a causal model never looks there, and its fast path is the one without either
    with _cut(model, layer, norm):
        return model(input_ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def answer_states(model, rollout, rows, layer=None, norm=True):
    """The states that predict the answer tokens of some rows of a Rollout, (N, D), in the order of rollout.mask[rows].

    The same function of the weights as `policy_hidden` on one line a row. Where answers are short, several to one prompt share
    a line with it, and a mask hides them from each other: the prompt is computed once for all of them.
    """
    S, T, D = rollout.prompt.shape[1], int(rollout.lengths[rows].max()), unembedding(model).shape[1]
    counts = Counter(row // rollout.group_size for row in rows).values()
    per_line = answers_to_a_line(counts, S, T, D) if takes_any_mask(model.config) else 1
    if per_line == 1:
        ids, attention, predicts = rollout.sequences(rows)
        # the last column predicts nothing; states of prompt tokens are computed and never projected
        return policy_hidden(model, ids[:, :-1], attention[:, :-1], layer, norm)[predicts[:, :-1]]
    ids, positions, mask, predecessors = rollout.shared_lines(rows, per_line)
    with _cut(model, layer, norm):
        return model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits.flatten(0, 1).index_select(0, predecessors)


def answers_to_a_line(counts, S, T, D):
    """How many answers of up to T tokens share a line with their prompt of S tokens; 1: each has a line of its own.

    With k answers to a line, an answer's part of it is S / k + T tokens. Each of them costs about 24 D^2 operations in the matrices
    of a layer, and 4 D in its attention for each of the S + k T tokens of the line, hidden ones too. The cost is in proportion to

        (S / k + T) (6 D + S + k T),    least at    k = sqrt(S (6 D + S)) / T

    A line ends at 1024 tokens, so that masks stay small. counts: how many answers each prompt has in this pass; where lines
    would stay so empty that they hold more tokens than lines of their own, no answers share any.
    """
    best = min(round((S * (6 * D + S)) ** 0.5 / T), (1024 - S) // T, max(counts))
    if best < 2:
        return 1
    per_line = math.ceil(max(counts) / math.ceil(max(counts) / best))  # no more lines than with `best`, equally full
    shared = sum(math.ceil(n / per_line) for n in counts) * (S + per_line * T)
    return per_line if shared < sum(counts) * (S + T) else 1


def takes_any_mask(config):
    """PyTorch's attention applies whatever mask it is given; other kinds build their own, and windows slide on theirs."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return config._attn_implementation == "sdpa" and kinds == {"full_attention"} and not getattr(config, "sliding_window", None)


def layer_hidden(model, input_ids, attention_mask, layer):
    """H^l, (B, S, D): layers 1 ... l are computed and nothing above; no final norm; differentiable."""
    return policy_hidden(model, input_ids, attention_mask, layer, norm=False)


def layer_logits(model, hidden, norm=False):
    """Eq. 5-6: hidden E_u^T, (..., D) -> (..., V). norm=True applies the final norm first (the paper's ablation, worse there)."""
    return (decoder_body(model).norm(hidden) if norm else hidden) @ unembedding(model).T


class ResidualStream(NamedTuple):
    """Eq. 4, all of shape (B, S, D). Layer l of the paper: hidden[l], and index l - 1 in the four others."""

    hidden: list  # H^0 ... H^L, before the final norm
    attention: list  # A^1 ... A^L
    feed_forward: list  # F^1 ... F^L
    attention_input: list  # LN_in(H^(l-1))
    feed_forward_input: list  # LN_post(H^(l-1) + A^l)


def residual_stream(model, input_ids, attention_mask):
    """One forward pass, the whole residual stream. BadInput if the blocks are not pre-norm residual (H^l != H^(l-1) + A^l + F^l)."""
    body = decoder_body(model)
    stream = ResidualStream([], [], [], [], [])
    first = lambda out: out[0] if isinstance(out, tuple) else out
    hooks = []
    for block in body.layers:
        hooks += [
            block.register_forward_pre_hook(lambda _, args, kwargs: stream.hidden.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True),
            block.input_layernorm.register_forward_hook(lambda _, args, out: stream.attention_input.append(out)),
            block.self_attn.register_forward_hook(lambda _, args, out: stream.attention.append(first(out))),
            block.post_attention_layernorm.register_forward_hook(lambda _, args, out: stream.feed_forward_input.append(out)),
            block.mlp.register_forward_hook(lambda _, args, out: stream.feed_forward.append(first(out))),
        ]
    try:
        stream.hidden.append(layer_hidden(model, input_ids, attention_mask, len(body.layers)))
    finally:
        for hook in hooks:
            hook.remove()
    for l, (a, f) in enumerate(zip(stream.attention, stream.feed_forward), 1):
        before, after = stream.hidden[l - 1], stream.hidden[l]
        error = (after - before - a - f).abs().max()
        if len(stream.feed_forward) != len(body.layers) or error > 0.02 * after.abs().max():
            raise BadInput(f"{type(model).__name__}: H^{l} is not H^{l - 1} + A^{l} + F^{l} (off by {error:.2g}); internal policies need pre-norm residual blocks")
    return stream


# -------------------------------------------------------------------------------------------------------- entropies


class InternalEntropy(NamedTuple):
    """Mean entropies over all response tokens, in nats, and their changes (Eq. 7-8, 11-13); 1-d tensors on the CPU."""

    layer: torch.Tensor  # (L + 1,) H(H^0) ... H(H^L)
    attention: torch.Tensor  # (L,) H(A^l)
    feed_forward: torch.Tensor  # (L,) H(F^l)
    attention_input: torch.Tensor  # (L,) H(LN_in(H^(l-1)))
    feed_forward_input: torch.Tensor  # (L,) H(LN_post(H^(l-1) + A^l))
    attention_cosine: torch.Tensor  # (L,) cos(A^l, H^(l-1))
    feed_forward_cosine: torch.Tensor  # (L,) cos(F^l, H^(l-1) + A^l)
    policy: torch.Tensor  # () the model's own policy, with the final norm

    @property
    def layer_change(self):
        """H(H^l) - H(H^(l-1)), (L,). Positive: the layer explores; negative: it converges."""
        return self.layer[1:] - self.layer[:-1]

    @property
    def attention_change(self):
        """H(A^l) - H(LN_in(H^(l-1))), (L,): against what the block was given."""
        return self.attention - self.attention_input

    @property
    def feed_forward_change(self):
        """H(F^l) - H(LN_post(H^(l-1) + A^l)), (L,)."""
        return self.feed_forward - self.feed_forward_input


def predicting(states, response_mask):
    """The states from which response tokens are predicted: one position to the left of each. (B, S, D) -> (N, D)."""
    return states[:, :-1][response_mask[:, 1:].bool()]


@torch.no_grad()
def internal_entropy(model, input_ids, attention_mask, response_mask, vocab_size=None, batch=8, progress=None):
    """Entropy of every internal policy, averaged over response tokens. All masks (B, S); `batch` sequences at a time;
    ids from vocab_size on (a padded vocabulary) do not count."""
    total, count = None, 0
    for i in tqdm(range(0, len(input_ids), batch), desc=progress, disable=progress is None, leave=False):
        rows = slice(i, i + batch)
        stream = residual_stream(model, input_ids[rows], attention_mask[rows])
        weight = unembedding(model)[:vocab_size]  # after the forward pass: a sharded model has gathered it by now
        parts = ResidualStream(*([predicting(x, response_mask[rows]) for x in part] for part in stream))
        own = predicting(decoder_body(model).norm(stream.hidden[-1]), response_mask[rows])
        del stream
        entropies = [torch.stack([_entropy_sum(x, weight) for x in part]) for part in parts]
        before_ffn = [h + a for h, a in zip(parts.hidden, parts.attention)]
        cosine = lambda xs, ys: torch.stack([nn.functional.cosine_similarity(x, y, dim=-1).double().sum() for x, y in zip(xs, ys)])
        sums = [*entropies, cosine(parts.attention, parts.hidden), cosine(parts.feed_forward, before_ffn), _entropy_sum(own, weight)]
        total = sums if total is None else [t + s for t, s in zip(total, sums)]
        count += len(own)
    if not count:
        raise ValueError("internal entropies need at least one response token behind another token")
    return InternalEntropy(*((t / count).cpu() for t in total))


def _entropy_sum(states, weight):
    _, entropy = token_logprobs_and_entropy(states, weight, torch.zeros(len(states), dtype=torch.long, device=states.device))
    return entropy.double().sum()


def boundary_layer(ffn_entropy_change):
    """The last layer l (counted from 1) whose feed-forward block raises entropy, dH_ffn^l > 0; None if there is none.

    BuPO aligns this layer: the last one that still explores before the model only converges.
    """
    positive = (torch.as_tensor(ffn_entropy_change) > 0).nonzero()
    return int(positive[-1]) + 1 if len(positive) else None


# ------------------------------------------------------------------------------------- comparing layers of one model


@torch.no_grad()
def layer_similarity(model, input_ids, attention_mask, response_mask, layer, vocab_size=None):
    """Against every later layer k = layer + 1 ... L, over response tokens: two tensors (L - layer,).

    cosine  mean cos(H^l, H^k)
    kl      mean KL(policy_l || policy_k) in nats, the internal policies of Eq. 5, in chunks of tokens
    """
    states = [predicting(h, response_mask) for h in residual_stream(model, input_ids, attention_mask).hidden[layer:]]
    if len(states) == 1:
        return torch.zeros(0), torch.zeros(0)
    weight = unembedding(model)[:vocab_size]
    cosine = torch.stack([nn.functional.cosine_similarity(states[0], h, dim=-1).mean() for h in states[1:]])
    return cosine.cpu(), torch.stack([policy_kl(states[0], h, weight) for h in states[1:]]).cpu()


@torch.no_grad()
def perplexity(model, input_ids, attention_mask, response_mask, vocab_size=None):
    """exp of the mean negative log-probability of the response tokens under the model's own policy."""
    states = predicting(policy_hidden(model, input_ids, attention_mask), response_mask)
    logp, _ = token_logprobs_and_entropy(states, unembedding(model)[:vocab_size], input_ids[:, 1:][response_mask[:, 1:].bool()])
    return float((-logp.mean()).exp())


@torch.no_grad()
def policy_kl(states, others, weight, chunk_tokens=None):
    """Mean KL(softmax(states E^T) || softmax(others E^T)) over N tokens, in nats; (N, D) twice -> ()."""
    chunk = chunk_tokens or max(1, 2**24 // weight.shape[0])
    total = 0.0
    for p, q in zip(states.split(chunk), others.split(chunk)):
        log_p, log_q = ((x @ weight.T).float().log_softmax(-1) for x in (p, q))
        total = total + (log_p.exp() * (log_p - log_q)).sum().double()
    return total / len(states)


if __name__ == "__main__":
    from scale.options import run_main
    from scripts.internal_report import main

    run_main(main)
