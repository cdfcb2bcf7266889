"""On a CUDA GPU: speed and memory of real shapes with random weights (no download).

    python benchmarks/gpu.py [--shape 0.5b|1.5b|7b]

update   a policy update of --prompts x --answers answers of --answer tokens: tokens a second and
         the share of the card's bfloat16 peak (6 x parameters x tokens operations; recomputation
         under gradient checkpointing does not count as useful work)
decode   all of them at once: tokens a second of our decoder on the bfloat16 replica
memory   the peak of a whole step against `--estimate`'s number
"""

import argparse
import pathlib
import tempfile
import time

import torch
from common import AutoModelForCausalLM, Qwen2Config

import hapo
import losses
import train
from run import options
from run.guard import Guard
from run.state import Run
from sampling import generate
from scale import memory, shard

SHAPES = {
    "0.5b": dict(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "1.5b": dict(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "7b": dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
}
# dense bfloat16, from the data sheets
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
SIZES = {"prompts": 64, "answers": 8, "answer": 512, "prompt": 128, "micro-tokens": 32_768}
TOKENS = 151_665  # ids from here on only pad Qwen2.5's vocabulary


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    return parser.parse_args()


def train_options(a):
    """The options of train.py for such a step."""
    flags = (
        f"--prompts-per-step {a.prompts} --answers-per-prompt {a.answers} --updates-per-rollout 1 "
        f"--max-new-tokens {a.answer} --micro-tokens {a.micro_tokens} --lr 1e-6"
    ).split()
    if a.gradient_checkpointing:
        flags.append("--gradient-checkpointing")
    with tempfile.TemporaryDirectory() as folder:
        return options.parse(["--out", folder, *flags], "")


def make_run(config, o, world):
    """A run as train.py opens one, but with random weights and without data."""
    torch.manual_seed(0)
    with world.device:
        policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if o.gradient_checkpointing:
        # its name from transformers 5.20 on
        older = policy.gradient_checkpointing_enable
        getattr(policy, "activation_checkpointing_enable", older)({"use_reentrant": False})
    policy.train()
    run = Run(
        options=o,
        world=world,
        policy=policy,
        actor=shard.make_actor(policy, world),
        reference=None,
        tokenizer=range(TOKENS),  # the run asks for its length only
        eos_ids=[],
        items=[],
        held_out=[],
        out=pathlib.Path(o.out),
        guard=Guard(print),
    )
    run.optimizer = run.make_optimizer()
    shard.refresh_actor(run.actor, policy)
    return run


def seconds_of(function):
    """(what the function returns, how long the device took for it)"""
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = function()
    torch.cuda.synchronize()
    return result, time.perf_counter() - started


def decode(a, run):
    """All answers at once; returns the rollout. The peak of memory counts from here on."""
    prompts = [torch.randint(10, 150_000, (a.prompt,)).tolist() for _ in range(a.prompts)]
    generate(run.actor, prompts[:2], 2, 4, vocab_size=run.vocab_size)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    rollout, seconds = seconds_of(
        lambda: generate(run.actor, prompts, a.answers, a.answer, vocab_size=run.vocab_size)
    )
    print(
        f"decode: {rollout.mask.sum().item() / seconds:.0f} tokens/s "
        f"at {len(rollout.tokens)} rows ({seconds:.1f} s)"
    )
    return rollout


def scored_batch(a, run, rollout):
    """The batch as an update needs it, with a coin for every answer's verdict."""
    mask = rollout.mask
    right = torch.rand(len(rollout.tokens), device=run.world.device) < 0.5
    batch = train.Batch(
        problems=[],
        texts=[],
        rollout=rollout,
        strict=right,
        lenient=right,
        right=right,
        rewards=right.float(),
        loss_mask=mask,
        in_loss=torch.ones_like(right),
    )
    parts = [list(range(len(right)))]  # one update
    batch.old_logp, batch.trained_entropy = train.score(run.policy, rollout, parts, None, run)
    batch.entropy = batch.trained_entropy
    batch.advantages = losses.grpo_advantages(batch.rewards, a.answers)[:, None] * mask
    batch.stats = train.statistics(batch.entropy, batch, run)
    batch.h = hapo.modulation(batch.entropy, batch.stats, mask)
    return batch


def update(a, run, batch, parameters, card):
    """Two updates, of which the second is measured."""
    rows = list(range(len(batch.rewards)))
    for _ in ("warm-up", "measured"):
        _, seconds = seconds_of(lambda: train.update(batch, rows, None, run))
    tokens = len(rows) * (a.prompt + a.answer)
    useful = 6 * parameters * tokens / seconds
    peak = next((v for k, v in PEAK.items() if k in card), None)
    share = f" = {useful / peak:.0%} of the bfloat16 peak" if peak else ""
    print(
        f"update: {seconds:.2f} s for {tokens} tokens, {tokens / seconds:.0f} tokens/s, "
        f"{useful / 1e12:.0f} TFLOP/s{share}"
    )


def compare_memory(a, config, o):
    measured = torch.cuda.max_memory_allocated()
    need = memory.estimate(config, o, a.prompt, 1, True)
    print(memory.table(need, o, a.prompt))
    print(
        f"memory: {measured / memory.GIB:.2f} GiB measured, {need.peak / memory.GIB:.2f} estimated "
        f"({need.peak / measured - 1:+.0%})"
    )


def main():
    a = arguments()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a CUDA GPU; none is visible")
    card, world, o = torch.cuda.get_device_name(), shard.World("cuda"), train_options(a)
    lengths = dict(max_position_embeddings=4096, bos_token_id=None, eos_token_id=None)
    config = Qwen2Config(vocab_size=151_936, **lengths, **SHAPES[a.shape])
    run = make_run(config, o, world)
    parameters = sum(p.numel() for p in run.policy.parameters())
    print(
        f"{card}, {a.shape}: {parameters / 1e6:.0f} M parameters, "
        f"{a.prompts} prompts x {a.answers} answers x {a.answer} tokens"
    )
    batch = scored_batch(a, run, decode(a, run))
    update(a, run, batch, parameters, card)
    compare_memory(a, config, o)


if __name__ == "__main__":
    main()
