"""Our decoder against transformers' generate (top_k=0), useful tokens a second, same weights and prompts, in turn.

    python benchmarks/decode.py                      unequal lengths; a vocabulary of 32,000; the price of adaptive temperature
    python benchmarks/decode.py --model DIR --data gsm8k.jsonl    a real model: 2 questions x 8 answers of up to 64 tokens

"Useful" are the tokens up to and including the first end-of-sequence token.
"""

import argparse

import torch
from common import AutoModelForCausalLM, AutoTokenizer, in_turn, median, qwen3, ratio

from hapo import EntropyStats, adaptive_temperature
from sampling import eos_ids_of, generate, pad_prompts
from tasks import read_problems, render_prompt

STATS = EntropyStats(*map(torch.tensor, (-0.5, 1.0, 1.0, -3.0)))


def compare(title, model, prompts, answers, cap, eos, rounds):
    model.eval()
    counts = {}

    def ours(name, temperature):
        def run():
            rollout = generate(
                model,
                prompts,
                answers,
                cap,
                eos,
                temperature,
                generator=torch.Generator().manual_seed(0),
            )
            counts.setdefault(name, []).append(int(rollout.mask.sum()))

        return run

    ids, mask = pad_prompts(prompts, "cpu")
    ids, mask = ids.repeat_interleave(answers, 0), mask.repeat_interleave(answers, 0).long()

    def theirs():
        torch.manual_seed(0)
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=cap,
            eos_token_id=eos or None,
            pad_token_id=0,
        )[:, ids.shape[1] :]
        ended = torch.isin(out, torch.tensor(eos)).long()
        counts.setdefault("generate", []).append(int((ended.cumsum(1) - ended == 0).sum()))

    seconds = in_turn(
        {
            "ours": ours("ours", 1.0),
            "generate": theirs,
            "ours, adaptive T": ours("ours, adaptive T", lambda h: adaptive_temperature(h, STATS)),
        },
        rounds,
    )
    print(f"\n{title}: {len(prompts)} prompts x {answers} answers of at most {cap} tokens")
    for name, values in seconds.items():
        print(
            f"  {name:18s}{median(values):8.3f} s {counts[name][-1] / median(values):10.0f} useful tokens/s"
        )
    per_token = {
        name: [s / n for s, n in zip(values, counts[name][-rounds:])]
        for name, values in seconds.items()
    }
    print(
        f"  speed-up over generate {ratio(per_token, 'generate', 'ours')}; adaptive temperature takes {ratio(per_token, 'ours, adaptive T', 'ours')} of the time without, a token"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.model:
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
            AutoTokenizer.from_pretrained(args.model),
        )
        prompts = [render_prompt(p.question, tokenizer)[1] for p in read_problems(args.data)[:2]]
        compare(args.model, model, prompts, 8, 64, eos_ids_of(model, tokenizer), args.rounds)
        return
    prompts = [list(range(10 + i % 3, 30)) for i in range(16)]
    compare(
        "very unequal lengths (0.84 M parameters, some 5 of 384 ids end an answer)",
        qwen3(),
        prompts,
        16,
        256,
        [5, 6, 7, 8, 9],
        args.rounds,
    )
    compare(
        "a vocabulary of 32,000 (4.9 M parameters)",
        qwen3(vocab=32_000),
        [list(range(10 + i % 5, 30)) for i in range(8)],
        8,
        32,
        [],
        args.rounds,
    )


if __name__ == "__main__":
    main()
