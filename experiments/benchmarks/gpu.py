"""Time whole training steps of train.py on models of real shapes with random weights: no download.

    python experiments/benchmarks/gpu.py --shape 0.5b [--gradient-checkpointing] [--json FILE]
    python experiments/benchmarks/gpu.py --shape 7b --split-master --gradient-checkpointing
    python experiments/benchmarks/gpu.py --shape 0.5b --profile         launches, waits, kernels
    python experiments/benchmarks/gpu.py --shape 0.5b --decode-alone    256 prompts, a response each
    python experiments/benchmarks/gpu.py --shape tiny --rehearse        the same code on a CPU

Prompts have unequal lengths, responses end at random, and verdicts are random. The optimizer, the
forward and backward passes and the decoder are those of a real run. Options that this program does
not have are passed on to train.py's parser.

The program prints the results of the last step:
  - tokens per second, and the share of the GPU's bfloat16 peak. Scoring counts as 2 x parameters x
    tokens operations, the update as 6 x; recomputation and padding do not count
  - the share of the memory bandwidth that decoding needs: it reads the weights once per step, and
    the keys and values of every row
  - the peak of memory, measured and estimated

--decode-alone uses sizes of published benchmarks of other engines: prompts and responses of 100 to
1,024 tokens each, drawn uniformly. It reports response tokens divided by the whole time.
"""

import argparse
import json
import pathlib
import platform
import random
import tempfile
import time

import phases
import torch
import transformers
from timing import AutoModelForCausalLM, Qwen2Config, peak_on_cpu

import train
from common.attention import head_size
from common.command import run_main
from common.errors import UserError
from engine import memory
from engine.engine import SingleProcess
from problems.grading import Grade
from run import option_checks
from run.build import build_engine, layer_of
from run.guard import Guard
from run.report import largest_ratios
from run.state import Run
from tasks import Problem

SHAPES = {  # hidden, feed-forward, layers, heads, key and value heads, tied embeddings
    "tiny": (64, 192, 3, 4, 2, True),
    "0.5b": (896, 4864, 24, 14, 2, True),
    "1.5b": (1536, 8960, 28, 12, 2, True),
    "7b": (3584, 18944, 28, 28, 4, False),
}
# dense bfloat16 operations per second, from the data sheets
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
# memory bandwidth in bytes per second, from the data sheets
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.0e12, "A800": 2.0e12, "L40S": 0.864e12}
BANDWIDTH |= {"4090": 1.008e12, "T4": 0.32e12}
SIZES = {"prompts": 64, "answers": 8, "answer": 512, "prompt": 128, "steps": 2}


class Words:
    """A minimal tokenizer with the methods that a step calls; a text is the list of its ids."""

    def __init__(self, size):
        self.size = size

    added_tokens_decoder = {}

    def get_vocab(self):
        return {str(i): i for i in range(self.size)}

    def decode(self, ids):
        return " ".join(map(str, ids))

    def batch_decode(self, answers):
        return [" ".join(map(str, ids)) for ids in answers]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--profile", action="store_true", help="one step more, watched")
    parser.add_argument("--decode-alone", action="store_true", help="answers of given lengths")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU")
    parser.add_argument("--json", help="append the figures to this file")
    return parser.parse_known_args()


def config_of(shape):
    hidden, inner, layers, heads, kv_heads, tied = SHAPES[shape]
    return Qwen2Config(
        vocab_size=1_000 if shape == "tiny" else 151_936,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )


def step_options(a, more):
    """Return train.py's Options for a step. Options in `more` override those set here."""
    given = " ".join(more)
    passes = [] if "--micro-" in given else ["--micro-tokens", "32768"]
    sizes = (
        f"--prompts-per-step {a.prompts} --num-generations {a.answers} --updates-per-rollout 1 "
        f"--max-new-tokens {a.answer} --lr 1e-6 --device {'cpu' if a.rehearse else 'cuda'}"
    ).split()
    with tempfile.TemporaryDirectory() as folder:
        return option_checks.parse(["--out", folder, *sizes, *passes, *more], "")


def make_run(a, config, o):
    """Return a Run like train.py's, but with random weights and random prompts."""
    dist = SingleProcess(o.device)
    torch.manual_seed(0)
    with dist.device:
        policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if o.gradient_checkpointing:
        # transformers 5.20 renamed this method
        older = policy.gradient_checkpointing_enable
        getattr(policy, "activation_checkpointing_enable", older)({"use_reentrant": False})
    policy.train()
    draw, known = random.Random(0), config.vocab_size - 271  # the last ids pad the vocabulary
    lengths = [draw.randint(a.prompt // 2, a.prompt) for _ in range(4 * a.prompts)]
    prompts = [[draw.randrange(known) for _ in range(n)] for n in lengths]
    eos_ids = list(range(0, known, a.answer))  # each token ends a response with probability 1 / cap
    run = Run(
        options=o,
        dist=dist,
        engine=build_engine(policy, o, dist, known, eos_ids),
        reference=None,
        reward_function=None,
        tokenizer=Words(known),
        train_examples=[(Problem("", "1"), prompt) for prompt in prompts],
        held_out=[],
        out=pathlib.Path(o.out),
        guard=Guard(print),
        mechanisms=o.hapo_mechanisms,
        layer=layer_of(o),
    )
    return run


def measured_step(number, run):
    """Take a step with random verdicts. Return (its StepRecord, largest number of bytes in use)."""
    coin = random.Random(number)
    train.grade = lambda problem, text, *more: Grade(*[coin.random() < 0.5] * 2)
    if run.dist.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return train.train_step(number, run), torch.cuda.max_memory_allocated()
    return peak_on_cpu(
        lambda: train.train_step(number, run), run.policy, run.engine.optimizer, sampling_model(run)
    )


def sampling_model(run):
    """Return the model that responses are drawn from: the policy or its replica."""
    replica = run.engine.replica
    return run.policy if replica is None else replica.model


def of_card(table, card):
    return next((v for k, v in table.items() if k in card), None)


def bytes_of_decoding(run, rollout):
    """Return the bytes that decoding must read.

    It reads the weights once per step, and a row's keys and values once per token.
    """
    config, actor = run.policy.config, sampling_model(run)
    width = next(actor.parameters()).element_size()
    heads = config.num_key_value_heads * head_size(config)
    a_position = 2 * config.num_hidden_layers * heads * width
    lengths, prompts = rollout.lengths.double(), rollout.prompt_mask.sum(1).double()
    prompts = prompts.repeat_interleave(rollout.group_size)
    read = ((lengths - 1) * (prompts + lengths / 2)).sum().item()  # prefill draws the first token
    steps = int(rollout.lengths.max()) - 1
    return steps * width * sum(p.numel() for p in actor.parameters()) + read * a_position


def decode_alone(a, run):
    """Draw one response of a fixed length to each of 256 prompts (--rehearse: 8), twice.

    Return (Rollout, response tokens, seconds) of the second time. A random number of 0 draws id 0,
    which ends the response; the other random numbers are at least 0.05 and cannot draw it.
    """
    rows, least, longest = (8, 10, 64) if a.rehearse else (256, 100, 1024)
    draw, known = random.Random(0), run.vocab_size
    sizes = [(draw.randint(least, longest), draw.randint(least, longest)) for _ in range(rows)]
    prompts = [[draw.randrange(1, known) for _ in range(p)] for p, _ in sizes]
    draws = torch.rand(longest, rows) * 0.9 + 0.05
    for row, (_, length) in enumerate(sizes):
        draws[length - 1, row] = 0.0
    for _ in range(2):
        started = time.perf_counter()
        run.engine.eos_ids = [0]
        rollout = run.engine.generate(prompts, 1, longest, 1.0, draws)
        tokens = int(rollout.lengths.sum())
        seconds = time.perf_counter() - started
    assert rollout.lengths.tolist() == [length for _, length in sizes]
    return rollout, tokens, seconds


def show_decoding(a, run, card):
    rollout, tokens, seconds = decode_alone(a, run)
    needed, bandwidth = bytes_of_decoding(run, rollout) / seconds, of_card(BANDWIDTH, card)
    share = f" = {needed / bandwidth:.0%} of the bandwidth" if bandwidth else ""
    print(
        f"{len(rollout.tokens)} answers, {tokens} tokens in {seconds:.2f} s: "
        f"{tokens / seconds:.0f} tokens/s; {needed / 1e9:.0f} GB/s{share}"
    )


def figures(a, o, run, step, peak, card):
    """Return the measured and estimated values that are printed and written, {name: value}."""
    parameters = sum(p.numel() for p in run.policy.parameters())
    rollout, seconds = step.batch.rollout, step.seconds
    answers = int(rollout.mask.sum())
    whole = answers + int(rollout.prompt_mask.sum()) * a.answers
    per_second, bandwidth = of_card(PEAK, card), of_card(BANDWIDTH, card)
    needed = bytes_of_decoding(run, rollout) / seconds["generate"]
    need = memory.estimate(run.policy.config, o, a.prompt, 1, not a.rehearse)

    def share(operations, time):
        return operations * parameters / time / per_second if per_second else None

    return {
        "shape": a.shape,
        "parameters": parameters,
        "rows": len(rollout.tokens),
        "answer_tokens": answers,
        "tokens": whole,
        "seconds": {name: round(s, 3) for name, s in seconds.items()},
        "decode_tokens_per_second": answers / seconds["generate"],
        "decode_bytes_per_second": needed,
        "decode_share_of_bandwidth": needed / bandwidth if bandwidth else None,
        "score_share_of_peak": share(2 * whole, seconds["score"]),
        "update_tokens_per_second": whole / seconds["update"],
        "update_share_of_peak": share(6 * whole, seconds["update"]),
        "updates": [u.outcome for u in step.updates],
        "ratio_off": largest_ratios(step.updates[:1], step.batch, run)[0][1],
        "peak_gib": peak / memory.GIB,
        "estimated_gib": need.peak / memory.GIB,
        "estimate_over_measured": need.peak / peak,
    }


def show(f, need):
    def percent(x, of="bfloat16 peak"):
        return "" if x is None else f" = {x:.0%} of the {of}"

    s = f["seconds"]
    print(
        f"decode: {f['decode_tokens_per_second']:.0f} tokens/s at {f['rows']} rows, "
        f"{f['decode_bytes_per_second'] / 1e9:.1f} GB/s"
        f"{percent(f['decode_share_of_bandwidth'], 'memory bandwidth')}"
    )
    print(f"score:  {s['score']:.2f} s{percent(f['score_share_of_peak'])}")
    print(
        f"update: {f['update_tokens_per_second']:.0f} tokens/s{percent(f['update_share_of_peak'])}"
    )
    print(f"step:   {sum(s.values()):.2f} s = {s}; largest |ratio - 1| {f['ratio_off']:g}")
    print(need)
    print(
        f"memory: {f['peak_gib']:.3f} GiB measured, {f['estimated_gib']:.3f} estimated "
        f"({f['estimate_over_measured'] - 1:+.0%})"
    )


def main():
    a, more = arguments()
    if not a.rehearse and not torch.cuda.is_available():
        raise UserError("needs a CUDA GPU and none is visible; --rehearse runs it on a CPU")
    o, config = step_options(a, more), config_of(a.shape)
    card = platform.processor() if a.rehearse else torch.cuda.get_device_name()
    run = make_run(a, config, o)
    print(
        f"{card or 'CPU'}, {a.shape}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {o.dtype}"
    )
    if a.decode_alone:
        return show_decoding(a, run, card)
    print(
        f"{a.prompts} prompts of up to {a.prompt} tokens x {a.answers} answers of up to {a.answer}"
    )
    for number in range(1, a.steps + 1):  # the first ones warm up
        step, peak = measured_step(number, run)
    f = figures(a, o, run, step, peak, card)
    need = memory.estimate(config, o, a.prompt, 1, not a.rehearse)
    show(f, memory.table(need, o, a.prompt))
    if a.profile:
        print(phases.table(phases.profiled_step(a.steps + 1, run)))
    if a.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        with open(a.json, "a", encoding="utf-8") as file:
            file.write(json.dumps({"card": card, "options": more, **versions, **f}) + "\n")


if __name__ == "__main__":
    run_main(main)
