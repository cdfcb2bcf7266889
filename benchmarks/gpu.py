"""On a CUDA GPU: speed and memory of real shapes with random weights (no download): python benchmarks/gpu.py [--shape 0.5b|1.5b|7b]

update   a policy update of --prompts x --answers answers of --answer tokens: tokens a second and the share of the card's bfloat16 peak
         (6 x parameters x tokens operations; recomputation under gradient checkpointing does not count as useful work)
decode   all of them at once: tokens a second of our decoder on the bfloat16 replica
memory   the peak of a whole step against `--estimate`'s number
"""

import argparse
import tempfile
import time

import torch
from common import Qwen2Config

import train
from run import options
from sampling import generate
from scale import memory

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
PEAK = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
}  # dense bfloat16, from the data sheets


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    for name, default in (
        ("prompts", 64),
        ("answers", 8),
        ("answer", 512),
        ("prompt", 128),
        ("micro-tokens", 32_768),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    a = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a CUDA GPU; none is visible")
    from transformers import AutoModelForCausalLM

    from scale import shard

    device, name = torch.device("cuda"), torch.cuda.get_device_name()
    config = Qwen2Config(
        vocab_size=151_936,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        **SHAPES[a.shape],
    )
    torch.manual_seed(0)
    with device:
        policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    parameters = sum(p.numel() for p in policy.parameters())
    print(
        f"{name}, {a.shape}: {parameters / 1e6:.0f} M parameters, {a.prompts} prompts x {a.answers} answers x {a.answer} tokens"
    )
    if a.gradient_checkpointing:
        getattr(policy, "activation_checkpointing_enable", policy.gradient_checkpointing_enable)(
            {"use_reentrant": False}
        )
    with tempfile.TemporaryDirectory() as folder:
        o = options.parse(
            [
                "--out",
                folder,
                "--prompts-per-step",
                str(a.prompts),
                "--answers-per-prompt",
                str(a.answers),
                "--updates-per-rollout",
                "1",
                "--max-new-tokens",
                str(a.answer),
                "--micro-tokens",
                str(a.micro_tokens),
                "--lr",
                "1e-6",
            ]
            + (["--gradient-checkpointing"] if a.gradient_checkpointing else []),
            "",
        )
    world = shard.World("cuda")
    actor = shard.make_actor(policy, world)
    shard.refresh_actor(actor, policy)

    prompts = [torch.randint(10, 150_000, (a.prompt,)).tolist() for _ in range(a.prompts)]
    generate(actor, prompts[:2], 2, 4, vocab_size=151_665)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    rollout = generate(actor, prompts, a.answers, a.answer, vocab_size=151_665)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    print(
        f"decode: {rollout.mask.sum().item() / seconds:.0f} tokens/s at {len(rollout.tokens)} rows ({seconds:.1f} s)"
    )

    policy.train()
    run = argparse.Namespace(
        options=o,
        world=world,
        policy=policy,
        tokenizer=range(151_665),
        guard=argparse.Namespace(accepts=lambda *x: True),
        optimizer=torch.optim.AdamW(policy.parameters(), lr=1e-6),
        layer=None,
    )
    rewards = (torch.rand(len(rollout.tokens), device=device) < 0.5).float()
    batch = train.Batch([], [], rollout, rewards, rollout.mask, {})
    batch.old_logp, batch.entropy = train.score(policy, batch, None, run)
    batch.advantages = train.losses.grpo_advantages(rewards, a.answers)[:, None] * rollout.mask
    stats = train.hapo.entropy_stats(batch.entropy, rollout.mask)
    batch.h = train.hapo.modulation(batch.entropy, stats, rollout.mask)
    for attempt in ("warm-up", "measured"):
        torch.cuda.synchronize()
        started = time.perf_counter()
        train.update(run, batch, list(range(len(rewards))), None)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    tokens = len(rewards) * (a.prompt + a.answer)
    peak = next((v for k, v in PEAK.items() if k in name), None)
    useful = 6 * parameters * tokens / seconds
    print(
        f"update: {seconds:.2f} s for {tokens} tokens, {tokens / seconds:.0f} tokens/s, {useful / 1e12:.0f} TFLOP/s"
        + (f" = {useful / peak:.0%} of the bfloat16 peak" if peak else "")
    )
    measured, need = (
        torch.cuda.max_memory_allocated(),
        memory.estimate(config, o, a.prompt, 1, True),
    )
    print(memory.table(need, o, a.prompt))
    print(
        f"memory: {measured / memory.GIB:.2f} GiB measured, {need.peak / memory.GIB:.2f} estimated ({need.peak / measured - 1:+.0%})"
    )


if __name__ == "__main__":
    main()
