"""The pictures of docs/evidence.md; matplotlib is imported here and nowhere else on the way.

Every run is a dot or a line of its own, never a mean alone.
"""

import itertools
import math
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import paired  # noqa: E402
from claims_runs import MASSES, late, read_json  # noqa: E402

COLORS = ("tab:orange", "tab:blue")
FIELD = {  # baseline: arms
    "dapo": (
        "hapo hapo-B dapo+A dapo+A-corrected dapo+B quantile dapo+C dapo+D dppo cispo gspo"
    ).split(),
    "grpo": ["bupo", "one-layer-whole"],
}
CURVES = ("grpo", "dapo", "hapo", "bupo", "bupo-4x", "random")


def draw(folder, found, tables):
    """All pictures into `folder`; `tables` holds {kind: rows as claims_page.table returns them}.
    A table's picture has its kind's name. Returns the pictures' names."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"worlds": worlds, "field": field, "real": real}
    figures = {"curves": curves(found)}
    for kind, rows in tables.items():
        figures[kind] = special[kind](found) if kind in special else effects(rows)
    figures["others"] = others(itertools.chain(*tables.values()))
    return [save(figure, folder / f"{name}.png") for name, figure in figures.items() if figure]


def save(figure, path):
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
    return path.name


def others(rows):
    """A panel for each comparison that `effects` leaves out: the two arms of every seed, joined."""
    shown = [row for row in rows if not in_its_tables_picture(row[0])]
    if not shown:
        return None
    high = math.ceil(len(shown) / 4)
    figure, axes = plt.subplots(high, 4, figsize=(12, 2.8 * high), squeeze=False)
    for axis, (claim, pair, _, _, values) in zip(axes.flat, shown):
        for ours, theirs in values:
            axis.plot([0, 1], [theirs, ours], "o-", color="tab:blue", alpha=0.5, markersize=4)
        axis.set_xticks([0, 1], [pair[1] if pair[0] != pair[1] else "first", pair[0]])
        axis.set_xlim(-0.3, 1.3)
        axis.set_ylabel(claim["metric"], fontsize=8)
        axis.set_title(textwrap.fill(f"{claim['id']}. {claim['claim']}", 34), fontsize=8)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    figure.tight_layout()
    return figure


def worlds(found):
    """Left, why: the mass of the advantages by length in both worlds (advantage_mass.py). Right,
    what came of it: differences in final accuracy."""
    arms = {f"{part} − dapo, {world}": (f"{world}-{part}", f"{world}-dapo")
            for world in ("short", "long") for part in ("dapo+B", "hapo")}  # fmt: skip
    return why_and_what(found, ("short", "long"), arms)


def real(found):
    """The same of the real model."""
    pairs = (("dapo+B", "dapo"), ("hapo", "dapo"), ("dapo", "grpo"))
    arms = {f"{a} − {b}": (f"real-{a}", f"real-{b}") for a, b in pairs}
    return why_and_what(found, ("real",), arms)


def why_and_what(found, models, arms):
    known = read_json(MASSES)
    if any(name not in known for name in models):
        return None
    wide = len(models) + 1
    figure, axes = plt.subplots(1, wide, figsize=(3.8 * wide, 3.2))
    for axis, name in zip(axes, models):
        axis.sharey(axes[0])
        draw_mass(axis, name, known[name])
    axes[0].set_ylabel("share of the advantage mass\n(below 0, pale: pushes down)", fontsize=8)
    axes[0].legend(fontsize=8, loc="upper left")
    differences(axes[-1], found, arms)
    figure.tight_layout()
    return figure


def draw_mass(axis, name, mass):
    """Bars by length: what pushes up above 0, what pushes down below."""
    for shift, color, (rule, parts) in zip((-0.2, 0.2), COLORS, mass["mass"].items()):
        for label, heights in zip((rule, None), zip(*parts.values())):
            at = [int(length) + shift for length in parts]
            axis.bar(at, heights, 0.4, color=color, alpha=0.9 if label else 0.5, label=label)
    right, wrong = mass["right"], mass["wrong"]
    axis.set_title(f"{name}: right {right:.0f} tokens, wrong {wrong:.0f}", fontsize=9)
    axis.set_xlabel("tokens of the answer", fontsize=8)
    axis.axhline(0, color="black", linewidth=0.5)


def field(found):
    """How far the arms of today's practice, and HAPO's, end above the baseline of their family."""
    arms = {f"{arm} − {base}": (arm, base) for base, several in FIELD.items() for arm in several}
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.25 * len(arms)))
    differences(axis, found, arms)
    figure.tight_layout()
    return figure


def differences(axis, found, pairs):
    """A line for each of {label: (arm, baseline)}: a dot a seed, mean and 95 % interval, points."""
    for y, (ours, theirs) in enumerate(pairs.values()):
        seeds = [seed for arm, seed in found if arm == ours and (theirs, seed) in found]
        end = lambda arm, seed: late(found[arm, seed], "eval_accuracy")
        points = [100 * (end(ours, seed) - end(theirs, seed)) for seed in seeds]
        if len(points) > 1:
            draw_effect(axis, y, points, paired.effect(points))
    name_lines(axis, list(pairs))
    axis.set_xlabel("points of held-out accuracy\n(a dot a seed; mean, 95 %)", fontsize=8)


def name_lines(axis, labels):
    """From top to bottom, half a line above the first and below the last."""
    axis.axvline(0, color="gray", linewidth=0.8)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_ylim(len(labels) - 0.5, -0.5)


def draw_effect(axis, y, points, e):
    axis.plot(points, [y] * len(points), "o", color="tab:blue", alpha=0.35, markersize=4)
    axis.plot([e.low, e.high], [y, y], color="black", linewidth=2)
    axis.plot(e.mean, y, "|", color="black", markersize=10, markeredgewidth=2)


def in_its_tables_picture(claim):
    """Whether `effects` shows it: final accuracy, held against a bar."""
    return claim["metric"] == "final" and bool(bar(claim))


def bar(claim):
    """What the difference must reach."""
    return claim.get("smallest", -claim.get("no_worse_by", 0))


def effects(rows):
    """A table's comparisons of final accuracy: differences, mean and 95 % interval."""
    shown = [row for row in rows if in_its_tables_picture(row[0])]
    if not shown:
        return None
    figure, axis = plt.subplots(figsize=(8, 1 + 0.27 * len(shown)))
    labels = []
    for y, (claim, pair, e, _, values) in enumerate(shown):
        points = [100 * claim.get("direction", 1) * (ours - theirs) for ours, theirs in values]
        draw_effect(axis, y, points, paired.Effect(*(100 * x for x in e[:3]), e.p))
        axis.plot(2 * [100 * bar(claim)], [y - 0.4, y + 0.4], color="tab:red", linewidth=1)
        labels.append(f"{claim['id']}. {' over '.join(pair)}")
    name_lines(axis, labels)
    axis.set_xlabel(
        "points of held-out accuracy that the first arm ends above the second\n(a dot a seed; "
        "black: mean and 95 % interval; red: the effect it must reach)",
        fontsize=8,
    )
    figure.tight_layout()
    return figure


def curves(found):
    """Held-out accuracy over the steps, a line a run."""
    arms = [arm for arm in CURVES if any(a == arm for a, _ in found)] or sorted(
        {a for a, _ in found}
    )
    figure, axes = plt.subplots(
        1, len(arms), figsize=(2 * len(arms), 2.6), sharey=True, squeeze=False
    )
    for axis, arm in zip(axes[0], arms):
        for (name, _), run in sorted(found.items()):
            if name == arm:
                axis.plot(*zip(*run["eval_accuracy"]), color="tab:blue", alpha=0.5, linewidth=1)
                axis.plot(*zip(*run["eval_greedy"]), color="tab:orange", alpha=0.5, linewidth=1)
        axis.set_title(arm, fontsize=9)
        axis.set_ylim(0, 1)
        axis.set_xlabel("step", fontsize=8)
    axes[0][0].set_ylabel("held-out: sampled blue, greedy orange", fontsize=8)
    figure.tight_layout()
    return figure
