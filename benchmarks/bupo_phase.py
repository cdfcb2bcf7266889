"""Phase 1 of BuPO at every layer, against the released way: a full forward pass, then the vocabulary twice.

    python benchmarks/bupo_phase.py [--layers 12 --vocab 4096]

released  all L layers run, lm_head on the inner state and on the last one; the loss is on the inner one
ours      layers 1 ... l run, one projection in chunks
For the update (forward and backward) and for scoring old log-probabilities plus update, beside the count of operations
(multiply-adds of matrix products; a backward pass counts twice its forward).
"""

import argparse

import torch
from common import in_turn, qwen3, ratio

from internals import layer_hidden, unembedding
from losses import token_logprobs_and_entropy


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("layers", 12),
        ("vocab", 4096),
        ("hidden", 256),
        ("rows", 32),
        ("prompt", 32),
        ("answer", 32),
        ("rounds", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    model = qwen3(vocab=a.vocab, hidden=a.hidden, layers=a.layers)
    ids = torch.randint(0, a.vocab, (a.rows, a.prompt + a.answer))
    mask, targets = torch.ones_like(ids), ids[:, a.prompt :]

    def released(l, grad):
        with torch.set_grad_enabled(grad):
            out = model(
                ids, attention_mask=mask, output_hidden_states=True, use_cache=False
            )  # logits of the last state
            inner = model.lm_head(out.hidden_states[l] if l < a.layers else out.hidden_states[-1])[
                :, a.prompt - 1 : -1
            ].float()
            log_probs = inner.log_softmax(-1)
            logp = log_probs.gather(-1, targets[..., None]).squeeze(-1)
            entropy = (
                -(
                    out.logits[:, a.prompt - 1 : -1].float().softmax(-1)
                    * out.logits[:, a.prompt - 1 : -1].float().log_softmax(-1)
                )
                .sum(-1)
                .mean()
            )  # the last layer's is what gets logged
        if grad:
            (-logp.mean()).backward()
            model.zero_grad()
        return entropy

    def ours(l, grad):
        with torch.set_grad_enabled(grad):
            logp, _ = token_logprobs_and_entropy(
                layer_hidden(model, ids, mask, l)[:, a.prompt - 1 : -1], unembedding(model), targets
            )
        if grad:
            (-logp.mean()).backward()
            model.zero_grad()

    per_layer = sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() == 2)
    tokens, answer_tokens, head = a.prompt + a.answer, a.answer, a.vocab * a.hidden
    print(
        f"{a.layers} layers, hidden {a.hidden}, vocabulary {a.vocab}, {a.rows} rows of {a.prompt} + {a.answer} tokens"
    )
    print(
        "layer   update, ours / released          counted   score + update, ours / released  counted"
    )
    for l in range(1, a.layers + 1):
        seconds = in_turn(
            {"released": lambda: released(l, True), "ours": lambda: ours(l, True)}, a.rounds
        )
        both = in_turn(
            {
                "released": lambda: (released(l, False), released(l, True)),
                "ours": lambda: (ours(l, False), ours(l, True)),
            },
            a.rounds,
        )
        # forward: released runs all layers and two full projections; backward: l layers and the inner projection
        forward, theirs = (
            tokens * a.layers * per_layer + 2 * tokens * head,
            2 * (tokens * l * per_layer + tokens * head),
        )
        mine, back = (
            tokens * l * per_layer + answer_tokens * head,
            2 * (tokens * l * per_layer + answer_tokens * head) + answer_tokens * head,
        )  # one more: logits recomputed
        print(
            f"{l:>5}   {ratio(seconds, 'ours', 'released'):28s} {(mine + back) / (forward + theirs):10.2f}   {ratio(both, 'ours', 'released'):32s} {(2 * mine + back) / (2 * forward + theirs):8.2f}"
        )


if __name__ == "__main__":
    main()
