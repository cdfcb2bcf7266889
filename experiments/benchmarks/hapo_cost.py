"""Measure the time that HAPO adds to DAPO, on the same responses and in whole steps.

    python experiments/benchmarks/hapo_cost.py [--rounds 15] [--after 24] \
        [--options "--updates-per-rollout 2"]

First, both objectives score and update on the same rollout, in turn. The model and the batch (256
responses, 4 updates) are train.py's defaults; `--options` changes them. `--after` first trains the
model for some steps of HAPO. Then each objective takes whole steps: HAPO with --tau 0, which
computes all temperatures but leaves them at the base, so that both draw the same responses; and
HAPO with its own temperatures, which draws different ones.
"""

import argparse
import dataclasses
import json
import shlex
import tempfile

from timing import in_turn, median, ratio

import hapo
import train
from engine.engine import SingleProcess
from run import option_checks
from run.setup import open_run

HAPO_AS_DAPO = "hapo, --tau 0"  # all of HAPO's work, but DAPO's responses


def open_both(more="", after=0):
    """Return a run, and its Options {name: Options} for DAPO, HAPO and HAPO with --tau 0.

    The run has taken `after` steps of HAPO and one with each Options, so that it has entropy
    statistics and optimizer moments.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = [*shlex.split(more), "--out", folder, "--device", "cpu"]
        o = option_checks.parse(flags, "")
        run, _ = open_run(o, SingleProcess(o.device))
    algos = {"dapo": dataclasses.replace(o, algo="dapo"), "hapo": o}
    algos[HAPO_AS_DAPO] = dataclasses.replace(o, tau=0.0)
    for step, name in enumerate(["hapo"] * after + list(algos), 1):
        take(run, algos[name])
        train.train_step(step, run)
    return run, algos


def take(run, options):
    """Make the run use these Options for its next steps."""
    run.options = run.engine.options = options
    run.mechanisms = options.hapo_mechanisms


def stepper(run, algos):
    """Return a function (name, answers=None) that builds the functions to be timed.

    Each of these takes one step with the Options `name`, on the given responses or on new ones, and
    restores the weights.
    """
    weights = [p.detach().clone() for p in run.policy.parameters()]

    def step(name, answers=None):
        def go():
            take(run, algos[name])
            run.prompts_consumed = 0
            draw = train.generate_and_grade
            if answers is not None:
                train.generate_and_grade = lambda *args: dataclasses.replace(answers)
            try:
                train.train_step(2, run)
            finally:
                train.generate_and_grade = draw
            for p, q in zip(run.policy.parameters(), weights):
                p.data.copy_(q)

        return go

    return step


def drawn(run, o):
    """Return the Batch that a run draws with these Options."""
    take(run, o)
    run.prompts_consumed = 0
    stats, temperature = run.sampler_stats, o.temperature
    if "A" in run.mechanisms:
        temperature = lambda entropy, position: hapo.adaptive_temperature(
            entropy, stats, o.temperature, o.tau
        )
    return train.generate_and_grade(2, 0, None, temperature, run)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--options", default="", help="train.py's")
    parser.add_argument("--after", type=int, default=0, help="steps of training before")
    parser.add_argument("--json", action="store_true", help="only medians of whole steps")
    args = parser.parse_args()
    run, algos = open_both(args.options, args.after)
    step = stepper(run, algos)
    same = [drawn(run, algos[name]).rollout.tokens for name in ("dapo", HAPO_AS_DAPO)]
    if not same[0].equal(same[1]):
        raise SystemExit("the two would not be timed on the same answers: a draw has changed sides")
    both = {name: step(name) for name in ("dapo", HAPO_AS_DAPO)}
    if args.json:
        seconds = in_turn(both, args.rounds, 2)
        print(json.dumps({name.partition(",")[0]: median(s) for name, s in seconds.items()}))
        return
    # HAPO's sampler, unlike DAPO's, measures the entropies that its statistics need
    answers = drawn(run, algos["hapo"])
    for title, ours, steps in (
        (
            "same answers: score, advantages, updates",
            "hapo",
            {name: step(name, answers) for name in ("dapo", "hapo")},
        ),
        ("whole step, the same answers", HAPO_AS_DAPO, both),
        ("whole step, its own answers", "hapo", {name: step(name) for name in ("dapo", "hapo")}),
    ):
        seconds = in_turn(steps, args.rounds, 2)
        print(
            f"{title}: dapo {median(seconds['dapo']):.3f} s, {ours} {median(seconds[ours]):.3f} s, "
            f"hapo / dapo {ratio(seconds, ours, 'dapo')}"
        )


if __name__ == "__main__":
    main()
