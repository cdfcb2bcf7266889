"""Draw the two figures of internals.py from internals.json: scripts/internal_figures.py DIR

entropy_flow.png     H(H^l) through the layers, with the entropies of what attention and
                     feed-forward add
entropy_change.png   entropy changes of attention, feed-forward and layer; a dashed line marks the
                     boundary layer
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

STYLES = ("-", "--", ":")


def draw(record, out):
    """Write both figures into the folder `out` and return their paths.

    record: {model name: the lists of internals.json}.
    """
    short = {pathlib.Path(name).name: e for name, e in record.items()}
    if len(short) == len(record):
        record = short
    paths = [pathlib.Path(out) / "entropy_flow.png", pathlib.Path(out) / "entropy_change.png"]
    draw_flow(record, paths[0])
    draw_change(record, paths[1])
    return paths


def draw_flow(record, path):
    figure, panel = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for style, (name, e) in zip(STYLES, record.items()):
        layers, first = range(1, len(e["layer"])), style == "-"
        look = dict(color="black", marker=".", label=f"{name}: layer policy H(H^l)")
        panel.plot(range(len(e["layer"])), e["layer"], style, **look)
        look = dict(color="tab:blue", markersize=4, label=f"{name}: attention H(A^l)")
        panel.plot(layers, e["attention"], "o" if first else "^", **look)
        look = dict(color="tab:orange", markersize=4, label=f"{name}: feed-forward H(F^l)")
        panel.plot(layers, e["feed_forward"], "s" if first else "v", **look)
    finish(figure, panel, "entropy in nats, mean over response tokens", path)


def draw_change(record, path):
    figure, panel = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for style, (name, e) in zip(STYLES, record.items()):
        layers, boundary = range(1, len(e["layer"])), e["boundary_layer"]
        for key, color, label in (
            ("attention_change", "tab:blue", "attention"),
            ("feed_forward_change", "tab:orange", "feed-forward"),
            ("layer_change", "black", "layer"),
        ):
            panel.plot(layers, e[key], style, color=color, marker=".", label=f"{name}: {label}")
        if boundary:
            look = dict(color="tab:red", linestyle="--" if style == "-" else ":")
            panel.axvline(boundary, label=f"{name}: boundary layer {boundary}", **look)
    panel.axhline(0, color="grey", linewidth=0.8)
    finish(figure, panel, "entropy change in nats", path)


def finish(figure, panel, label, path):
    panel.set_xlabel("layer")
    panel.set_ylabel(label)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = sys.argv[1]
    print(
        *draw(
            json.loads((pathlib.Path(folder) / "internals.json").read_text(encoding="utf-8")),
            folder,
        )
    )
