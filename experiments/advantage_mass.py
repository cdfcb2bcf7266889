"""Why the token-level average (B) helps in one world and hurts in another: python
experiments/advantage_mass.py

Of 1,024 answers of each world's model: the sum of the advantages of all tokens, by the length of
their answer, under GRPO's advantages and under B. DAPO's loss is a mean over tokens, so this mass
is what pushes; where it does not sum to 0, answers of one length are pushed as such. Draws
assets/evidence/claim_15.png and prints the sums.
"""

import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

import hapo  # noqa: E402
import losses  # noqa: E402
import train  # noqa: E402
from program.command import run_main  # noqa: E402
from run import options  # noqa: E402
from run.machine import OneProcess  # noqa: E402
from run.opening import open_run  # noqa: E402

WORLDS = {"short": "right answers are short", "long": "right answers are long"}
OPTIONS = "--prompts-per-step 128 --answers-per-prompt 8 --difficulty 2 --algo dapo --device cpu"
PICTURE = ROOT / "assets" / "evidence" / "claim_15.png"


def masses(world):
    """(lengths of the answers, {rule: (B,) sum of each answer's advantages over its tokens})"""
    with tempfile.TemporaryDirectory() as out:
        given = f"{OPTIONS} --model {ROOT}/runs/worlds/{world} --out {out}"
        run, _ = open_run(options.parse(given.split(), ""), OneProcess("cpu"))
        batch, G = train.collect(1, None, run), run.options.answers_per_prompt
    mask, lengths = batch.rollout.mask, batch.rollout.lengths
    rules = {
        "GRPO's advantages": losses.grpo_advantages(batch.rewards, G)[:, None] * mask,
        "B": hapo.token_group_advantages(batch.rewards, mask, G),
    }
    right = batch.right.bool()
    print(
        f"{WORLDS[world]}: right {lengths[right].float().mean():.1f} tokens, wrong "
        f"{lengths[~right].float().mean():.1f}, {right.float().mean():.3f} right"
    )
    return lengths, {name: a.sum(1) for name, a in rules.items()}


def main():
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True)
    for axis, world in zip(axes, WORLDS):
        lengths, found = masses(world)
        for shift, (name, mass) in zip((-0.2, 0.2), found.items()):
            total = mass.abs().sum()
            bins = range(int(lengths.min()), int(lengths.max()) + 1)
            for sign, shade in ((1, 0.9), (-1, 0.5)):
                part = (mass * sign).clamp_min(0)
                heights = [sign * (part[lengths == n].sum() / total).item() for n in bins]
                color = "tab:blue" if name == "B" else "tab:orange"
                axis.bar(
                    [n + shift for n in bins],
                    heights,
                    0.4,
                    color=color,
                    alpha=shade,
                    label=name if sign == 1 else None,
                )
            few = lengths <= torch.quantile(lengths.float(), 0.5)
            net, short, long = (m.sum() / total for m in (mass, mass[few], mass[~few]))
            print(f"  {name}: net {net:+.2f} of the mass; shorter {short:+.2f}, longer {long:+.2f}")
        axis.set_title(WORLDS[world])
        axis.set_xlabel("tokens of the answer")
        axis.axhline(0, color="black", linewidth=0.5)
    axes[0].set_ylabel("share of the advantage mass")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=100)
    print(f"saved to {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    run_main(main)
