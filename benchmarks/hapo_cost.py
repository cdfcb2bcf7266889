"""What HAPO adds to DAPO: wall time of a step's parts on the same answers, and of whole steps.

    python benchmarks/hapo_cost.py [--rounds 15]

The same rollout goes through both objectives in turn (scoring, advantages and updates), with the
default model and batch (256 answers, 4 updates); then each takes whole steps, sampling included.
"""

import argparse
import dataclasses
import tempfile

from common import in_turn, median, ratio

import train
from run import options
from run.opening import open_run
from scale import shard


def open_both():
    """A run, and its options for DAPO and HAPO; it has taken one real step with each, which gives
    it statistics and moments."""
    with tempfile.TemporaryDirectory() as folder:
        o = options.parse(["--out", folder, "--device", "cpu", "--lr", "1e-9"], "")
        run, _ = open_run(o, shard.World(o.device))
    algos = {"dapo": dataclasses.replace(o, algo="dapo"), "hapo": o}
    for name in ("hapo", "dapo"):
        run.options = algos[name]
        train.train_step(1, run)
    return run, algos


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    run, algos = open_both()
    weights = [p.detach().clone() for p in run.policy.parameters()]
    collect = train.collect
    run.options = algos["hapo"]  # its sampler measures the entropies that its statistics need
    answers = collect(2, run)

    def step(name, reuse):
        def go():
            run.options, run.drawn = algos[name], 0
            if reuse:
                train.collect = lambda step, run: dataclasses.replace(answers)
            try:
                train.train_step(2, run)
            finally:
                train.collect = collect
            for p, q in zip(run.policy.parameters(), weights):
                p.data.copy_(q)

        return go

    for title, reuse in (
        ("same answers: score, advantages, 4 updates", True),
        ("whole step, its own answers", False),
    ):
        seconds = in_turn({name: step(name, reuse) for name in algos}, args.rounds, 2)
        print(
            f"{title}: dapo {median(seconds['dapo']):.3f} s, hapo {median(seconds['hapo']):.3f} s, "
            f"hapo / dapo {ratio(seconds, 'hapo', 'dapo')}"
        )


if __name__ == "__main__":
    main()
