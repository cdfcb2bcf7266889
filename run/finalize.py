"""Finish a run: write the model and its curves, or keep the last good checkpoint and say why."""

import shutil

import torch

from common.errors import UserError
from run import checkpoint
from run.model_card import write_card
from run.report import samples_of, write_lines
from scripts.page import write_page


def finish(run):
    """Write the trained model to final/, draw the curves, and write the page of the run."""
    weights, _ = checkpoint.gather(run)
    if not run.dist.main:
        return
    with checkpoint.disk_faults_in_one_line(run.out, "the final model", run.out / "final"):
        checkpoint.save_model(run, run.out / "final", weights)
        write_card(run, run.out / "final")
    run.say(
        f"done: model saved to {run.out / 'final'}; metrics in metrics.jsonl, sampled responses in "
        "samples.jsonl"
    )
    try:
        from scripts.curves import plot  # needs matplotlib, which is optional
    except ImportError:
        run.say(
            "no curves.png without matplotlib: "
            f"pip install matplotlib, then python scripts/curves.py {run.out}"
        )
    else:
        run.say(f"curves: {plot([run.out])}")
    try:
        run.say(f"page with every token of one group per step: {write_page([run.out])}")
    except UserError as error:  # an older version began the run
        run.say(f"no page: {error}")


def give_up(run, step):
    """Raise UserError after too many bad steps in a row, or after a bad last step.

    The last responses are written to disk. After the last step, final/ gets a copy of the last good
    checkpoint.
    """
    where, batch, options = run.out / f"bad-step-{step}.jsonl", run.last_batch, run.options
    if batch is not None and run.dist.main:
        worst = torch.argsort(batch.rollout.logp.sum(1))[:32].tolist()
        write_lines(where, samples_of(step, run, worst))
    responses = f"the last responses are in {where}"
    if batch is None:
        responses = "no response could be drawn"
    newest = checkpoint.folders(run.out, step)[0]
    kept = f"the last good checkpoint is {newest}"
    if step == options.steps:
        kept += ", and so is final/"
        if run.dist.main:
            beside = shutil.ignore_patterns("optimizer.pt", "run.json", "checksums.json")
            shutil.copytree(newest, run.out / "final", ignore=beside, dirs_exist_ok=True)
            write_card(run, run.out / "final")
    raise UserError(
        f"{run.guard.bad_in_a_row} bad steps in a row (NaN or infinity), stopped at step {step}; "
        f"{kept}, {responses}. Lower --lr {options.lr:g} or "
        f"--grad-clip {options.grad_clip:g} and start again from that checkpoint with --model"
    )
