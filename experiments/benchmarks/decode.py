"""Time our decoder against transformers' generate (top_k=0), in useful tokens per second.

    python experiments/benchmarks/decode.py
        unequal lengths; a vocabulary of 32,000; the cost of the adaptive temperature
    python experiments/benchmarks/decode.py --model DIR --data gsm8k.jsonl
        a real model: 2 questions x 8 responses of up to 64 tokens

Both decoders have the same weights and prompts and run in turn. Useful tokens are those up to and
including the first end-of-sequence token.
"""

import argparse
from typing import NamedTuple

import torch
from timing import AutoModelForCausalLM, AutoTokenizer, in_turn, median, qwen3, ratio

from engine.decoding import generate
from hapo import EntropyStats, adaptive_temperature
from problems.prompts import render_prompt
from sampling import eos_ids_of, pad_prompts
from tasks import read_problems

STATS = EntropyStats(*map(torch.tensor, (-0.5, 1.0, 1.0, -3.0)))
ADAPTIVE = "ours, adaptive T"


class Work(NamedTuple):
    """The work of each decoder: `answers` responses to each prompt, of at most `cap` tokens."""

    model: torch.nn.Module
    prompts: list
    answers: int
    cap: int
    eos: list


def ours(work, temperature):
    """Draw responses with our decoder. Return the number of useful tokens."""
    shape = (work.cap, len(work.prompts) * work.answers)
    draws = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    rollout = generate(*work, temperature, uniform=draws)
    return int(rollout.mask.sum())


def theirs(work, ids, mask):
    """Draw responses with transformers' generate. Return the number of useful tokens."""
    torch.manual_seed(0)
    sampling = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0)
    ends = dict(max_new_tokens=work.cap, eos_token_id=work.eos or None, pad_token_id=0)
    out = work.model.generate(ids, attention_mask=mask, **sampling, **ends)[:, ids.shape[1] :]
    ended = torch.isin(out, torch.tensor(work.eos)).long()
    return int((ended.cumsum(1) - ended == 0).sum())


def compare(title, work, rounds):
    work.model.eval()
    ids, mask = (x.repeat_interleave(work.answers, 0) for x in pad_prompts(work.prompts, "cpu"))
    mask = mask.long()
    rule = lambda entropy, position: adaptive_temperature(entropy, STATS)
    ways = {
        "ours": lambda: ours(work, 1.0),
        "generate": lambda: theirs(work, ids, mask),
        ADAPTIVE: lambda: ours(work, rule),
    }
    counts = {name: [] for name in ways}

    def counted(name):
        return lambda: counts[name].append(ways[name]())

    seconds = in_turn({name: counted(name) for name in ways}, rounds)
    print(
        f"\n{title}: {len(work.prompts)} prompts x {work.answers} answers "
        f"of at most {work.cap} tokens"
    )
    show(seconds, counts, rounds)


def show(seconds, counts, rounds):
    """Print useful tokens per second, and ratios of the time per useful token."""
    per_token = {}
    for name, values in seconds.items():
        rate = counts[name][-1] / median(values)
        print(f"  {name:18s}{median(values):8.3f} s {rate:10.0f} useful tokens/s")
        per_token[name] = [s / n for s, n in zip(values, counts[name][-rounds:])]
    print(
        f"  speed-up over generate {ratio(per_token, 'generate', 'ours')}; adaptive temperature "
        f"takes {ratio(per_token, ADAPTIVE, 'ours')} of the time without, a token"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        prompts = [render_prompt(p.question, tokenizer)[1] for p in read_problems(args.data)[:2]]
        work = Work(model, prompts, 8, 64, eos_ids_of(model, tokenizer))
        compare(args.model, work, args.rounds)
        return
    title = "very unequal lengths (0.84 M parameters, some 5 of 384 ids end an answer)"
    prompts = [list(range(10 + i % 3, 30)) for i in range(16)]
    compare(title, Work(qwen3(), prompts, 16, 256, [5, 6, 7, 8, 9]), args.rounds)
    title = "a vocabulary of 32,000 (4.9 M parameters)"
    prompts = [list(range(10 + i % 5, 30)) for i in range(8)]
    compare(title, Work(qwen3(vocab=32_000), prompts, 8, 32, []), args.rounds)


if __name__ == "__main__":
    main()
