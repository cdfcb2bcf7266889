"""Train the shipped model on additions inside TRL, in about two minutes on a CPU.

    python scripts/trl_addition.py                     HAPO
    python scripts/trl_addition.py --lora              HAPO, training only LoRA adapters
    python scripts/trl_addition.py --trainer grpo      TRL's own GRPO (or bupo, hapo-bupo)

The settings are those of `python train.py`: 32 prompts, 8 responses to each, 4 updates. The script
prints held-out accuracy of sampled responses before and after training. It needs trl and datasets;
--lora needs peft.
"""

import argparse
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import common.threads  # noqa: F401 - before torch

# isort: split
from datasets import Dataset
from transformers import AutoTokenizer

from bridges.trl_trainers import (
    BuPOTrainer,
    GRPOTrainer,
    HAPOBuPOTrainer,
    HAPOConfig,
    HAPOTrainer,
)
from common.command import run_main
from problems.grading import grade
from tasks import load_problems

TINY = str(pathlib.Path(__file__).resolve().parent.parent / "assets" / "tiny-qwen3")
TRAINERS = {
    "grpo": GRPOTrainer,
    "hapo": HAPOTrainer,
    "bupo": BuPOTrainer,
    "hapo-bupo": HAPOBuPOTrainer,
}
PROMPTS, ANSWERS, UPDATES = 32, 8, 4


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainer", choices=TRAINERS, default="hapo")
    parser.add_argument("--lora", action="store_true", help="train adapters alone")
    parser.add_argument("--rollouts", type=int, default=30, help="each with four updates")
    parser.add_argument("--lr", type=float, help="default 2e-4; with --lora 2e-3")
    return parser.parse_args()


def config(a, out):
    bottom_up = dict(bupo_layer="auto", bupo_steps=10) if "bupo" in a.trainer else {}
    return HAPOConfig(
        output_dir=out,
        per_device_train_batch_size=PROMPTS * ANSWERS // UPDATES,
        per_device_eval_batch_size=128,
        gradient_accumulation_steps=1,
        steps_per_generation=UPDATES,
        num_generations=ANSWERS,
        max_completion_length=40,
        max_steps=UPDATES * a.rollouts,
        learning_rate=a.lr or (2e-3 if a.lora else 2e-4),
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5 * UPDATES,
        loss_type="dapo",
        beta=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=5 * UPDATES,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **bottom_up,
    )


def asked(problems):
    return Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": p.question}] for p in problems]}
    )


def reward_for(problems):
    """Return TRL's reward function for these problems: 1 for a correct response, strictly read."""
    by_question = {p.question: p for p in problems}

    def right(prompts, completions, **more):
        asked_for = [by_question[messages[-1]["content"]] for messages in prompts]
        texts = [messages[0]["content"] for messages in completions]
        return [float(grade(p, text).strict) for p, text in zip(asked_for, texts)]

    return right


def main():
    a = arguments()
    train_set, held_out = load_problems("addition")
    adapters = None
    if a.lora:
        from peft import LoraConfig

        adapters = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as out:
        trainer = TRAINERS[a.trainer](
            TINY,
            reward_for(train_set + held_out),
            args=config(a, out),
            train_dataset=asked(train_set),
            eval_dataset=asked(held_out[:64]),
            processing_class=AutoTokenizer.from_pretrained(TINY),
            peft_config=adapters,
        )
        before = trainer.evaluate()["eval_reward"]
        trainer.train()
        after = trainer.evaluate()["eval_reward"]
    print(
        f"{a.trainer}{', LoRA' if a.lora else ''}: held out {before:.3f} before, {after:.3f} after"
    )


if __name__ == "__main__":
    run_main(main)
