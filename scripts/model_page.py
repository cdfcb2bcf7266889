"""Write the page of a model for `python internals.py`.

It shows each layer's likeliest tokens at every token of some responses. The template is
scripts/pages/model.html.
"""

import torch

from common.models import vocab_size_of
from internals import layer_logits, predicting, residual_stream
from losses import row_logprobs_and_entropy
from scripts.page import fill, short

MOST_CELLS = 16_000  # layers x tokens x policies on a page, which makes about 2 MB
ANSWERS = 4
KINDS = ("layer", "attention", "feed_forward")


@torch.no_grad()
def cells_of(model, ids, attention, response, vocab_size):
    """Return {policy: [[cell of every token] of every layer]} of one response.

    ids, attention and response are (1, S). Policies are those of the layer, its attention and its
    feed-forward block; names with "_norm" are policies after the final norm. `describe` defines a
    cell.
    """
    stream = residual_stream(model, ids, attention)
    states = dict(layer=stream.hidden[1:], attention=stream.attention)
    states["feed_forward"] = stream.feed_forward
    chosen = ids[:, 1:][response[:, 1:].bool()]
    own = policy(model, predicting(stream.hidden[-1], response), True, vocab_size)
    return {
        kind + ("_norm" if norm else ""): [
            describe(policy(model, predicting(x, response), norm, vocab_size), chosen, own)
            for x in states[kind]
        ]
        for kind in KINDS
        for norm in (False, True)
    }


def policy(model, states, norm, vocab_size):
    """Return the logits of an internal policy, (N, V), without ids that only pad the vocabulary."""
    return layer_logits(model, states, norm)[:, :vocab_size].float()


def describe(logits, chosen, own):
    """Return one cell per token, a dictionary of the policy's values at this token.

    They are the probability and rank of the chosen token, the policy's entropy and its KL to the
    model's own policy in nats, and the five likeliest tokens.
    """
    logp, entropy = row_logprobs_and_entropy(logits, chosen)
    all_logp = logits.log_softmax(-1)
    kl = (all_logp.exp() * (all_logp - own.log_softmax(-1))).sum(-1).clamp_min(0)
    rank = 1 + (logits > logits.gather(-1, chosen[:, None])).sum(-1)
    top = all_logp.exp().topk(min(5, logits.shape[-1]))
    columns = (logp.exp(), rank, entropy, kl, top.indices, top.values)
    return [
        {
            "probability": short(p),
            "rank": r,
            "entropy": short(h),
            "kl": short(k),
            "top": [[i, short(v)] for i, v in zip(ids, values)],
        }
        for p, r, h, k, ids, values in zip(*(x.tolist() for x in columns))
    ]


def shown_answers(rollout, layers, models):
    """Return (row, number of tokens) of the responses that fit on the page."""
    room = MOST_CELLS // (2 * len(KINDS) * layers * models)
    rows = []
    for row, length in enumerate(rollout.lengths.tolist()[:ANSWERS]):
        if length and room:
            rows.append((row, min(length, room)))
            room -= rows[-1][1]
    return rows


def write_model_page(out, named_models, tokenizer, questions, rollout, record):
    """Write out/page.html and return its path.

    named_models: an iterable of (name, model); record: the content of internals.json.
    """
    models, chosen, asked, used = [], [], [], set()
    for name, model in named_models:
        layers = len(record[name]["feed_forward_change"])
        shown, cells = shown_answers(rollout, layers, len(record)), []
        for row, length in shown:
            ids, attention, predicts = rollout.sequences([row])
            start = int(predicts[0].nonzero()[0]) + 1
            end, device = start + length, next(model.parameters()).device
            inputs = (x[:, :end].to(device) for x in (ids, attention, predicts.roll(1, 1)))
            cells.append(cells_of(model, *inputs, vocab_size_of(model, tokenizer)))
            if not models:
                chosen.append(ids[0, start:end].tolist())
                asked.append(questions[row])
        for one in cells:
            layers_of = [layer for policy_cells in one.values() for layer in policy_cells]
            used |= {i for layer in layers_of for cell in layer for i, _ in cell["top"]}
        kept = ("layer", "attention", "feed_forward", "feed_forward_change", "boundary_layer")
        numbers = {key: short(record[name][key]) for key in kept}
        models.append({"name": name, **numbers, "cells": cells})
    used |= {i for ids in chosen for i in ids}
    data = {
        "models": models,
        "chosen": chosen,
        "questions": asked,
        "texts": {i: tokenizer.decode([i]) for i in sorted(used)},
        "vocab": vocab_size_of(model, tokenizer),
        "answers": len(rollout.tokens),
        "tokens": int(rollout.mask.sum()),
    }
    (out / "page.html").write_text(fill("model.html", data), encoding="utf-8")
    return out / "page.html"
