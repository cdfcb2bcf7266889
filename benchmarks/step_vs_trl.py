"""One training step against TRL's GRPOTrainer: same model, same prompts, in one run.

    pip install trl && python benchmarks/step_vs_trl.py [--steps 12]

256 answers of at most 12 tokens, 4 updates. The model is a Qwen3 of 0.48 M parameters with random
weights and the tokenizer of assets/tiny-qwen3; rewards are a coin per answer, so no group is dead
and every update is made. Ours runs GRPO and HAPO; a "step" is sampling, scoring and four updates on
all sides.
"""

import argparse
import pathlib
import random
import tempfile
import time

from common import AutoTokenizer, median, qwen3, ratio

import train
from grading.answers import Grade
from questions.prompts import render_prompt
from run import options
from run.machine import OneProcess
from run.opening import open_run
from tasks import load_problems

TINY = str(pathlib.Path(__file__).resolve().parent.parent / "assets" / "tiny-qwen3")
STEP = (
    "--prompts-per-step 16 --answers-per-prompt 16 --max-new-tokens 12 --lr 1e-6 --device cpu"
).split()


def ours(folder, algo, steps):
    """Seconds of each step but the first two."""
    out = tempfile.mkdtemp()
    o = options.parse(["--model", folder, "--out", out, "--algo", algo, *STEP], "")
    run, _ = open_run(o, OneProcess(o.device))
    coin = random.Random(0)
    train.grade = lambda problem, text: Grade(*[coin.random() < 0.5] * 2)
    seconds = []
    for step in range(1, steps + 1):
        started = time.perf_counter()
        train.train_step(step, run)
        seconds.append(time.perf_counter() - started)
    return seconds[2:]


def trl_config(steps):
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=64,
        gradient_accumulation_steps=1,
        steps_per_generation=4,
        num_generations=16,
        num_iterations=1,
        max_completion_length=12,
        max_steps=4 * steps + 1,
        learning_rate=1e-6,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )


def trl(folder, steps):
    """Seconds of each step but the first two."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = load_problems("addition")[0][:2000]
    prompts = [render_prompt(p.question, tokenizer)[0] for p in problems]
    coin, times = random.Random(0), []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            times.append(time.perf_counter())

    def reward(completions, **kwargs):
        return [float(coin.random() < 0.5) for _ in completions]

    trainer = GRPOTrainer(
        model=folder,
        reward_funcs=reward,
        args=trl_config(steps),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    cycles = times[::4]  # one generation serves four optimiser steps
    return [b - a for a, b in zip(cycles, cycles[1:])][2:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(TINY)
        model = qwen3(hidden=96, layers=4)
        model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        seconds = {"TRL GRPOTrainer": [], "ours, grpo": [], "ours, hapo": []}
        for _ in range(args.rounds):
            seconds["TRL GRPOTrainer"].append(median(trl(folder, args.steps)))
            seconds["ours, grpo"].append(median(ours(folder, "grpo", args.steps)))
            seconds["ours, hapo"].append(median(ours(folder, "hapo", args.steps)))
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, 256 answers of at "
        f"most 12 tokens, 4 updates; medians of {args.steps - 2} steps in each of "
        f"{args.rounds} rounds"
    )
    for name, values in seconds.items():
        print(
            f"{name:16s} {median(values):.3f} s a step ({min(values):.3f} to {max(values):.3f}), "
            f"{ratio(seconds, 'TRL GRPOTrainer', name)} x TRL's steps per second"
        )


if __name__ == "__main__":
    main()
