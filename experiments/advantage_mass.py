"""Why the token-level average (B) helps in one world and hurts in another: python
experiments/advantage_mass.py

Of 1,024 answers of each world's model: the sum of the advantages of all tokens, by the length of
their answer, under GRPO's advantages and under B. DAPO's loss is a mean over tokens, so this mass
is what pushes; where it does not sum to 0, answers of one length are pushed as such. Into
experiments/claims_mass.json, which claims.py shows. With --real DIR also of the real model. Worlds
that are not there yet are made first, five minutes and more each.
"""

import argparse
import json
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import claims_page  # noqa: E402
import claims_plan  # noqa: E402
import claims_runs  # noqa: E402

import hapo  # noqa: E402
import losses  # noqa: E402
import train  # noqa: E402
from common.command import run_main  # noqa: E402
from engine.engine import SingleProcess  # noqa: E402
from run import option_checks  # noqa: E402
from run.setup import open_run  # noqa: E402

OPTIONS = "--prompts-per-step 128 --num-generations 8 --algo dapo --device cpu"


def masses(given):
    """{"right", "wrong": mean tokens, "mass": {rule: {length: [share above 0, share below 0]}}} of
    the answers of a world's model."""
    with tempfile.TemporaryDirectory() as out:
        run, _ = open_run(
            option_checks.parse([*given.split(), "--out", out], ""), SingleProcess("cpu")
        )
        batch, G = train.generate_and_grade(1, 0, None, 1.0, run), run.options.num_generations
    mask, lengths = batch.rollout.mask, batch.rollout.lengths
    rules = {
        "GRPO's advantages": losses.grpo_advantages(batch.rewards, G)[:, None] * mask,
        "B": hapo.token_group_advantages(batch.rewards, mask, G),
    }
    right = batch.correct.bool()
    found = {"right": lengths[right].float().mean().item(), "mass": {}}
    found["wrong"] = lengths[~right].float().mean().item()
    for rule, advantages in rules.items():
        shares = by_length(advantages.sum(1), lengths)
        found["mass"][rule] = {n: [round(x, 6) for x in parts] for n, parts in shares.items()}
    return found


def by_length(mass, lengths):
    """{length: (share above 0, share below 0)} of the whole mass, all signs; mass, lengths (B,)."""
    total = mass.abs().sum()
    return {
        n: [(mass * sign).clamp_min(0)[lengths == n].sum().item() * sign / total.item()
            for sign in (1, -1)]
        for n in sorted(set(lengths.tolist()))
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", help="also of the real model that lies there")
    real = parser.parse_args().real
    plan = claims_runs.read_json(claims_plan.PLAN)
    claims_runs.make_models(plan, plan["models"])
    found = claims_runs.read_json(claims_runs.MASSES)
    for world in plan["models"]:
        given = f"{OPTIONS} --difficulty 2 --model {ROOT}/runs/worlds/{world}"
        found[world] = masses(given)
    if real:
        given = plan["real model"]["options"].replace("REAL", real)
        found["real"] = masses(f"{given} {OPTIONS}")
    claims_runs.MASSES.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")
    print(claims_page.mass_table(claims_page.before_training(found)))
    print(f"saved to {claims_runs.MASSES.relative_to(ROOT)}; python experiments/claims.py draws it")


if __name__ == "__main__":
    run_main(main)
