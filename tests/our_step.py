"""One update of this project's own step on given responses: what other engines are held to."""

import pytest
import torch
from conftest import given_batch

import train
from engine.engine import SingleProcess
from losses import has_reward_variance
from run import option_checks
from run.batch import Batch, rollout_of
from run.setup import open_run


def move(model, by=0.1):
    """The policy is no longer the one that was scored; the same noise each time."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += by * p.abs().mean() * torch.randn(p.shape, generator=noise)


def our_update(folder, out, prompts, answers, texts, rewards, *more, by=0.1):
    """(loss, {name: gradient}, batch, largest distance of a ratio from 1, layer) of one update.

    The model of `folder` scores the responses, and moves before the update.
    """
    size = len(answers) // len(prompts)
    files = f"--model {folder} --out {out} --overwrite --device cpu --no-self-check"
    sizes = f"--prompts-per-step {len(prompts)} --num-generations {size} --updates-per-rollout 1"
    length = ["--max-new-tokens", str(max(map(len, answers)))]
    o = option_checks.parse([*files.split(), *sizes.split(), *length, *more], "")
    run, _ = open_run(o, SingleProcess("cpu"))
    rollout, varied = rollout_of(prompts, answers), has_reward_variance(rewards, size)
    given = Batch(
        problems=[None] * len(prompts),
        texts=texts,
        rollout=rollout,
        strict=varied,
        lenient=varied,
        correct=varied,
        rewards=rewards,
        has_reward_variance=varied,
        in_loss=torch.ones_like(varied),
        loss_mask=rollout.mask,
    )
    rows = [slice(0, len(answers))]
    with torch.no_grad():  # phase 1 of ours takes the entropies that its sampler has recorded
        rollout.entropy = run.engine.batch_logprobs(run.policy, rollout, rows, None).entropy
    scored, kept = run.engine.token_logprobs, {}

    def score_after_a_move(*args, **how):
        if torch.is_grad_enabled():
            move(run.policy, by)
        return scored(*args, **how)

    def keep_gradients(loss):
        kept.update({n: p.grad for n, p in run.policy.named_parameters()})
        return "applied", 0.0

    run.engine.token_logprobs, run.engine.optimizer_step = score_after_a_move, keep_gradients
    with pytest.MonkeyPatch.context() as patch:
        given_batch(patch, given)
        step = train.train_step(1, run)
    run.lock.lock.release()
    (update,) = step.updates
    (result,) = update.micro_batches
    farthest = ((result.loss.ratio - 1).abs() * rollout.mask).max().item()
    return update.loss, kept, step.batch, farthest, step.layer
