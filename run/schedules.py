"""Define the schedules: the layer whose policy is trained at a step, and the learning rate.

The step, the console, the option checks and a resume all call these functions. So if you change a
schedule here, the console prints the new one and options without effect are rejected. So is
resuming a run whose past steps followed another schedule.
"""

import bupo
from common.errors import UserError


def in_phase_1(step, options):
    """Return whether a step (from 1) belongs to BuPO's first phase, Eq. 10."""
    if not options.bupo_layer or options.bupo_baseline == "layer-lr":
        return False  # layer-lr has no phases
    return bupo.target_layer(step, options.bupo_steps, bupo.AUTO) is not None


def target_layer(step, options, layer):
    """Return the layer whose policy is trained at a step, or None: the model's own policy.

    BuPO's baselines train the model's own policy in the first phase, too.
    """
    if in_phase_1(step, options) and options.bupo_baseline == "align":
        return layer
    return None


def learning_rate_factor(step, options):
    """Return the share of the peak learning rate at a step: linear warm-up, then constant."""
    return min(1.0, step / max(1, options.warmup_steps))


def described(options):
    """Return the schedules of a run as text: learning rates, and the steps of the first phase."""
    some = sorted({1, max(1, options.steps // 2), options.steps})
    rates = [f"{options.lr * learning_rate_factor(step, options):g}" for step in some]
    text = "learning rate " + ", ".join(f"{r} at step {s}" for r, s in zip(rates, some))
    if options.bupo_layer:
        text += f"; BuPO's first phase: steps {shown_steps(phase_1_steps(options))}"
    return text


def phase_1_steps(options):
    """Return the list of the steps in BuPO's first phase."""
    return [step for step in range(1, options.steps + 1) if in_phase_1(step, options)]


def shown_steps(steps):
    """Return a list of steps as text: "1 to 20", or "5, 10, 15, ... 75"."""
    if not steps:
        return "none"
    if steps == list(range(steps[0], steps[-1] + 1)):
        return f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else f"{steps[0]}"
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) < 6 else [*shown[:3], f"... {shown[-1]}"])


def check_resume(before, now, done):
    """Raise UserError if the `done` steps of a run have another schedule under the new options.

    before, now: the options that the run was stored with, and those that it is resumed with.
    """
    for step in range(1, done + 1):
        same_rate = learning_rate_factor(step, before) == learning_rate_factor(step, now)
        if not same_rate or in_phase_1(step, before) != in_phase_1(step, now):
            what = "phase" if same_rate else "learning rate"
            raise UserError(
                f"--steps {now.steps}: with it, the {what} of step {step} would not be what it was "
                f"with --steps {before.steps}; leave --steps out, or start a new run in another "
                "--out"
            )
