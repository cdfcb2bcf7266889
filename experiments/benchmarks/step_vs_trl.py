"""Time one training step against TRL's GRPOTrainer, with the same model and the same prompts.

    pip install trl && python experiments/benchmarks/step_vs_trl.py [--task addition] [--steps 12]

coin      256 responses of at most 12 tokens, nearly all of them that long. The model is a Qwen3 of
          0.48 M parameters with random weights. Each response has a random reward of 0 or 1, so
          that groups have reward variance and every update is made.
addition  512 responses of 1 to 40 tokens: the shipped model on its additions, with their rewards.

TRL runs its own trainer, and HAPO through bridges/trl_trainers.py. Our code runs GRPO and HAPO. A
step is sampling, scoring and four updates everywhere. The learning rate is too small to change the
responses.
"""

import argparse
import pathlib
import random
import tempfile
import time

from timing import AutoTokenizer, median, qwen3, ratio

import train
from engine.engine import SingleProcess
from problems.grading import Grade, grade
from problems.prompts import render_prompt
from run import option_checks
from run.setup import open_run
from tasks import load_problems

TINY = str(pathlib.Path(__file__).resolve().parents[2] / "assets" / "tiny-qwen3")
SIZES = {"coin": (16, 12), "addition": (32, 40)}  # (prompts, length cap); 16 responses per prompt


def ours(folder, task, algo, steps):
    """Run our steps. Return the seconds of each, without the first two."""
    prompts, longest = SIZES[task]
    size = f"--prompts-per-step {prompts} --num-generations 16 --max-new-tokens {longest}"
    how = f"--model {folder} --out {tempfile.mkdtemp()} --algo {algo} --lr 1e-6 --device cpu"
    o = option_checks.parse([*size.split(), *how.split()], "")
    run, _ = open_run(o, SingleProcess(o.device))
    coin = random.Random(0)
    graded = lambda problem, text, *more: Grade(*[coin.random() < 0.5] * 2)
    train.grade = graded if task == "coin" else grade
    seconds = []
    for step in range(1, steps + 1):
        started = time.perf_counter()
        train.train_step(step, run)
        seconds.append(time.perf_counter() - started)
    return seconds[2:]


def trl_config(task, steps, config):
    prompts, longest = SIZES[task]
    return config(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=prompts * 16 // 4,
        gradient_accumulation_steps=1,
        steps_per_generation=4,
        num_generations=16,
        num_iterations=1,
        max_completion_length=longest,
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


def trl(folder, task, steps, hapo=False):
    """Run TRL's steps. Return the seconds of each and of each rollout, without the first two."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from bridges.trl_trainers import HAPOConfig, HAPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = load_problems("addition")[0][:2000]
    prompts = [render_prompt(p.question, tokenizer)[0] for p in problems]
    asked = dict(zip(prompts, problems))
    coin, times = random.Random(0), []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            times.append(time.perf_counter())

    def reward(prompts, completions, **kwargs):
        if task == "coin":
            return [float(coin.random() < 0.5) for _ in completions]
        return [float(grade(asked[p], text).strict) for p, text in zip(prompts, completions)]

    trainer = (HAPOTrainer if hapo else GRPOTrainer)(
        model=folder,
        reward_funcs=reward,
        args=trl_config(task, steps, HAPOConfig if hapo else GRPOConfig),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    rollout, rollouts = trainer._generate_and_score_completions, []

    def timed(inputs):  # drawn, rewarded and scored
        started = time.perf_counter()
        batch = rollout(inputs)
        rollouts.append(time.perf_counter() - started)
        return batch

    trainer._generate_and_score_completions = timed
    trainer.train()
    cycles = times[::4]  # TRL generates once for four optimizer steps
    return [b - a for a, b in zip(cycles, cycles[1:])][2:], rollouts[2:]


def random_model(folder):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = qwen3(hidden=96, layers=4)
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=SIZES, default="coin")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.task == "coin":
            random_model(folder)
        else:
            folder = TINY
        names = ("TRL GRPOTrainer", "TRL with HAPO", "ours, grpo", "ours, hapo")
        seconds, alone = {name: [] for name in names}, {name: [] for name in names[:2]}
        for _ in range(args.rounds):
            for name, hapo in (("TRL GRPOTrainer", False), ("TRL with HAPO", True)):
                steps, rollouts = trl(folder, args.task, args.steps, hapo)
                seconds[name].append(median(steps))
                alone[name].append(median(rollouts))
            for algo in ("grpo", "hapo"):
                times = ours(folder, args.task, algo, args.steps)
                seconds[f"ours, {algo}"].append(median(times))
    prompts, longest = SIZES[args.task]
    print(
        f"{args.task}: {16 * prompts} answers of at most {longest} tokens, 4 updates; medians of "
        f"{args.steps - 2} steps in each of {args.rounds} rounds"
    )
    for name, values in seconds.items():
        print(
            f"{name:16s} {median(values):.3f} s a step ({min(values):.3f} to {max(values):.3f}), "
            f"{ratio(seconds, 'TRL GRPOTrainer', name)} x TRL's steps per second"
        )
    for name, values in alone.items():
        print(
            f"{name:16s} {median(values):.3f} s a rollout alone, "
            f"{ratio(alone, 'TRL GRPOTrainer', name)} x TRL's rollouts per second"
        )


if __name__ == "__main__":
    main()
