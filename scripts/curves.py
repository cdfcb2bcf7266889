"""Draw the curves of one or several runs: python scripts/curves.py RUN [RUN ...] [--out FILE.png]

The curves come from each run's metrics.jsonl. BuPO's first phase is shaded. To add a panel, write
one function and add one entry to PANELS.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

try:
    import matplotlib
except ImportError:
    if __name__ != "__main__":
        raise
    print("curves.py: drawing needs matplotlib: pip install matplotlib", file=sys.stderr)
    sys.exit(2)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from common import renamed  # noqa: E402
from scripts.page import rows_of  # noqa: E402


def accuracy(panel, steps, held, name, color):
    """Plot the reward of the sampled responses, and held-out accuracy with its standard error."""
    label = f"{name}: reward of the answers"
    panel.plot(x(steps), column(steps, "reward"), color=color, alpha=0.35, label=label)
    error = [r["eval_error"] or 0 for r in held]
    sampled, style = column(held, "eval_accuracy"), dict(color=color, marker="o", capsize=2)
    panel.errorbar(x(held), sampled, error, label=f"{name}: held-out, sampled", **style)
    style, label = dict(color=color, linestyle="--", marker="x"), f"{name}: held-out, greedy"
    panel.plot(x(held), column(held, "eval_greedy"), label=label, **style)


def entropy(panel, steps, held, name, color):
    panel.plot(x(steps), column(steps, "entropy"), color=color, label=f"{name}: full policy")
    if any("sampler_entropy" in r for r in steps):
        label = f"{name}: full policy at T = 1, in phase 1"
        panel.plot(x(steps), column(steps, "sampler_entropy"), "--", color=color, label=label)
    inner = [r for r in steps if r["phase"] == "internal"]
    if inner:
        label = f"{name}: layer {inner[0]['layer']}'s policy"
        panel.plot(x(inner), column(inner, "internal_entropy"), ":", color=color, label=label)


def length(panel, steps, held, name, color):
    panel.plot(x(steps), column(steps, "response_length"), color=color, label=name)


def gradient(panel, steps, held, name, color):
    panel.plot(x(steps), column(steps, "grad_norm"), color=color, label=f"{name}: gradient norm")
    dead = [r["zero_std_groups"] / r["groups"] for r in steps]
    panel.plot(x(steps), dead, ":", color=color, label=f"{name}: share of dead groups")


def statistics(panel, steps, held, name, color):
    """Plot the pivot of log H, and the log H at which h is -1 and 1 (HAPO's Eq. 5-6)."""
    if not any("pivot" in r for r in steps):
        return
    pivot = column(steps, "pivot")
    panel.plot(x(steps), pivot, color=color, label=f"{name}: pivot")
    for key, style in (("h_max", "--"), ("h_min", ":")):
        edge = [p + h for p, h in zip(pivot, column(steps, key))]
        panel.plot(x(steps), edge, style, color=color, label=f"{name}: pivot + {key}")


PANELS = [
    ("accuracy", accuracy),
    ("entropy in nats, mean over answer tokens", entropy),
    ("answer length in tokens", length),
    ("gradient norm before clipping; dead groups", gradient),
    ("log entropy: pivot, largest, smallest", statistics),
]


def x(rows):
    return [r["step"] for r in rows]


def column(rows, key):
    """Return one number per row; NaN, a gap in the curve, if the row has no such number."""
    return [float("nan") if r.get(key) is None else r[key] for r in rows]


def spans(steps):
    """Return [(first, last)] of each run of consecutive steps."""
    found = []
    for step in steps:
        if found and step == found[-1][1] + 1:
            found[-1] = (found[-1][0], step)
        else:
            found.append((step, step))
    return found


def plot(runs, out=None):
    """Draw all PANELS into one image. Return its path, by default curves.png in the first run."""
    rows = (len(PANELS) + 1) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(11, 3.5 * rows), constrained_layout=True)
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    if len(runs) > len(colors):
        colors = [plt.cm.turbo((i + 0.5) / len(runs)) for i in range(len(runs))]
    for color, run in zip(colors, map(pathlib.Path, runs)):
        lines = rows_of(run / "metrics.jsonl", renamed.METRICS)
        steps = [r for r in lines if "reward" in r]
        held = [r for r in lines if "eval_accuracy" in r]
        inner = spans([r["step"] for r in steps if r["phase"] == "internal"])
        for panel, (_, draw) in zip(axes.flat, PANELS):
            draw(panel, steps, held, run.name, color)
            for first, last in inner:  # BuPO's phase 1 is shaded
                panel.axvspan(first - 0.5, last + 0.5, color=color, alpha=0.07)
    for panel, (title, _) in zip(axes.flat, PANELS):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(fontsize=7).set_in_layout(False)  # the legend lies inside the panel
    for panel in axes.flat:
        if not panel.lines:  # no run has data for this panel
            panel.set_visible(False)
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
