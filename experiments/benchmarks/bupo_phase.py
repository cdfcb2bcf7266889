"""Time phase 1 of BuPO at every layer, against the released code's computation.

    python experiments/benchmarks/bupo_phase.py [--layers 12 --vocab 4096]

released  runs all L layers and multiplies both layer l's states and the last states by lm_head; the
          loss uses layer l's
ours      runs layers 1 ... l and multiplies only layer l's states by lm_head

The program times the update (forward and backward), and scoring of old log-probabilities plus the
update. It also prints the ratio of counted operations: multiply-adds of matrix products, where a
backward pass counts twice its forward pass.
"""

import argparse
from typing import NamedTuple

import torch
from timing import in_turn, qwen3, ratio
from torch import Tensor

from engine.logprobs import chunked_logprobs_and_entropy
from internals import layer_hidden, unembedding

SIZES = dict(layers=12, vocab=4096, hidden=256, rows=32, prompt=32, answer=32, rounds=5)


class PackedBatch(NamedTuple):
    """Prompts with their responses, all of one length."""

    ids: Tensor  # (rows, prompt + answer)
    mask: Tensor  # (rows, prompt + answer)
    targets: Tensor  # (rows, answer)
    predicts: slice  # the positions whose states predict the targets


def released(model, lines, l, grad):
    """Compute phase 1 as the released code does. Return the last layer's entropy, which it logs."""
    ids, mask, targets, predicts = lines
    with torch.set_grad_enabled(grad):
        # this computes the logits of the last state, too
        out = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        inner = model.lm_head(out.hidden_states[l])[:, predicts].float()
        log_probs = inner.log_softmax(-1)
        logp = log_probs.gather(-1, targets[..., None]).squeeze(-1)
        last_probs = out.logits[:, predicts].float().softmax(-1)
        last_log_probs = out.logits[:, predicts].float().log_softmax(-1)
        entropy = -(last_probs * last_log_probs).sum(-1).mean()
    if grad:
        (-logp.mean()).backward()
        model.zero_grad()
    return entropy


def ours(model, lines, l, grad):
    ids, mask, targets, predicts = lines
    with torch.set_grad_enabled(grad):
        states = layer_hidden(model, ids, mask, l)[:, predicts]
        logp, _ = chunked_logprobs_and_entropy(states, unembedding(model), targets)
    if grad:
        (-logp.mean()).backward()
        model.zero_grad()


def counted(a, per_layer, l):
    """Return the ratios of operations, ours / released, of an update and of scoring plus update."""
    tokens, head = a.prompt + a.answer, a.vocab * a.hidden
    # released runs all layers and two full projections; backward: l layers, the inner projection
    forward = tokens * a.layers * per_layer + 2 * tokens * head
    backward = 2 * (tokens * l * per_layer + tokens * head)
    # ours computes the logits once more in its backward pass
    our_forward = tokens * l * per_layer + a.answer * head
    our_backward = 2 * our_forward + a.answer * head
    update = (our_forward + our_backward) / (forward + backward)
    return update, (2 * our_forward + our_backward) / (2 * forward + backward)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    model = qwen3(vocab=a.vocab, hidden=a.hidden, layers=a.layers)
    ids = torch.randint(0, a.vocab, (a.rows, a.prompt + a.answer))
    lines = PackedBatch(ids, torch.ones_like(ids), ids[:, a.prompt :], slice(a.prompt - 1, -1))
    per_layer = sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() == 2)
    print(
        f"{a.layers} layers, hidden {a.hidden}, vocabulary {a.vocab}, "
        f"{a.rows} rows of {a.prompt} + {a.answer} tokens"
    )
    print(
        "layer   update, ours / released          counted   "
        "score + update, ours / released  counted"
    )
    ways = {"released": released, "ours": ours}
    for l in range(1, a.layers + 1):

        def update(way):
            return lambda: way(model, lines, l, True)

        def score_and_update(way):
            return lambda: (way(model, lines, l, False), way(model, lines, l, True))

        once = in_turn({name: update(way) for name, way in ways.items()}, a.rounds)
        both = in_turn({name: score_and_update(way) for name, way in ways.items()}, a.rounds)
        count_once, count_both = counted(a, per_layer, l)
        print(
            f"{l:>5}   {ratio(once, 'ours', 'released'):28s} {count_once:10.2f}   "
            f"{ratio(both, 'ours', 'released'):32s} {count_both:8.2f}"
        )


if __name__ == "__main__":
    main()
