"""One step of training on a small random model, for the exercises."""

import pathlib

import torch
import transformers
from conftest import TINY, random_model

import train
from engine.engine import SingleProcess
from problems.grading import Grade
from run import option_checks
from run.setup import open_run

SMALL = (
    "--prompts-per-step 4 --num-generations 4 --updates-per-rollout 1 --max-new-tokens 8 "
    "--eval-prompts 4 --lr 1e-3 --warmup-steps 1 --steps 3 --device cpu"
).split()


def first_step(folder, *more, with_run=False):
    """train_step's record of a first step; with_run: the run too. The weights before it are in
    folder/before.pt. Verdicts are invented, since random weights are never right."""
    folder, model = pathlib.Path(folder), pathlib.Path(folder) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    small = random_model(layers=3, vocab=384, hidden=32, scale=4.0)
    small.config.eos_token_id = tokenizer.eos_token_id
    for part in (small, tokenizer):
        part.save_pretrained(model)
    arguments = [*SMALL, "--model", str(model), "--out", str(folder / "run"), *more]
    run, _ = open_run(option_checks.parse(arguments, ""), SingleProcess("cpu"))
    before = {name: p.detach().clone() for name, p in run.policy.named_parameters()}
    torch.save(before, folder / "before.pt")
    grade, train.grade = train.grade, lambda problem, text: Grade(*[len(text) % 2 == 0] * 2)
    try:
        step = train.train_step(1, run)
    finally:
        train.grade = grade
    return (step, run) if with_run else step
