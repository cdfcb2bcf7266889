"""Draw the curves of one or several runs: python scripts/curves.py RUN [RUN ...] [--out FILE.png]

Four panels: reward and held-out accuracy, entropy, answer length, gradient norm and dead groups; BuPO's first phase is shaded.
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def plot(runs, out=None):
    """Read each run's metrics.jsonl and write one picture; returns its path (curves.png in the first run's folder)."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    for color, run in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], map(pathlib.Path, runs)):
        rows = [json.loads(line) for line in open(run / "metrics.jsonl", encoding="utf-8")]
        steps = [r for r in rows if "reward" in r]
        held = [r for r in rows if "eval_accuracy" in r]
        name, x = run.name, [r["step"] for r in steps]
        column = lambda key: [r[key] for r in steps]
        panel = axes[0][0]
        panel.plot(x, column("reward"), color=color, alpha=0.35, label=f"{name}: reward of the answers")
        panel.errorbar([r["step"] for r in held], [r["eval_accuracy"] for r in held], [r["eval_error"] or 0 for r in held], color=color, marker="o", capsize=2, label=f"{name}: held-out, sampled")
        panel.plot([r["step"] for r in held], [r["eval_greedy"] for r in held], color=color, linestyle="--", marker="x", label=f"{name}: held-out, greedy")
        axes[0][1].plot(x, column("entropy"), color=color, label=f"{name}: full policy")
        internal = [r for r in steps if r["phase"] == "internal"]
        if internal:
            axes[0][1].plot([r["step"] for r in internal], [r["internal_entropy"] for r in internal], color=color, linestyle=":", label=f"{name}: layer {internal[0]['layer']}'s policy")
            for panel in axes.flat:
                panel.axvspan(0.5, internal[-1]["step"] + 0.5, color=color, alpha=0.07)
        axes[1][0].plot(x, column("response_length"), color=color, label=name)
        axes[1][1].plot(x, column("grad_norm"), color=color, label=f"{name}: gradient norm")
        axes[1][1].plot(x, [r["dead_groups"] / r["groups"] for r in steps], color=color, linestyle=":", label=f"{name}: share of dead groups")
    for panel, title in zip(axes.flat, ("accuracy", "entropy in nats, mean over answer tokens", "answer length in tokens", "gradient norm before clipping; dead groups")):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    out = pathlib.Path(out or pathlib.Path(runs[0]) / "curves.png")
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    print(plot(arguments.runs, arguments.out))
