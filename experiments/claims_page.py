"""docs/evidence.md and its plots, from the runs of experiments/claims.py that are there.

Called by claims.py; runs nothing. In a plot every run is a dot; a line joins two arms of a seed.
"""

import pathlib
import re

import paired

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE, PLOTS = ROOT / "docs" / "evidence.md", ROOT / "assets" / "evidence"

HEAD = """# What holds: the papers' claims, tested again on a toy

Made by `python experiments/claims.py` from the files in `experiments/claims_runs/`; nothing here
is written by hand.

**What toy results are worth.** A model of 0.7 million parameters that learns to add says nothing
about 7 billion that learn mathematics. What a verdict here can show is whether an effect is so
general that it appears even in the smallest case, and whether the code would show it if it did.
A clear "no" or "cannot be told here" is a result.

{what}

*Holds*: the mean paired difference is at least the smallest effect of interest, and its exact
sign-flip p, corrected by Holm over all comparisons of a table, is below 0.05. *Contradicted*: the
whole 95 % interval lies below that effect. *Not decided*: neither; the interval's upper end is the
largest effect that is still possible.
{mixed}
"""


def measures(run):
    """What a run is compared by."""
    last = run["eval_accuracy"][-1][0]

    def late(key):
        values = [value for step, value in run[key] if step > 2 * last / 3]
        return sum(values) / len(values)

    similar = [value for _, value in run["similarity"]]
    return {
        "final": late("eval_accuracy"),
        "greedy": late("eval_greedy"),
        "half-way": next(value for step, value in run["eval_accuracy"] if step >= last / 2),
        "start": run["eval_accuracy"][0][1],
        "entropy": late("entropy"),
        "length": late("response_length"),
        "pass_at_8": late("pass_at_8"),
        "similarity": similar[-1] - similar[0] if len(similar) > 1 else None,
    }


def values_of(plan, found, times, arm, metric):
    """The arm's measure by place of the seed in the list of seeds."""
    offset, values = plan["arms"].get(arm, {}).get("seed_offset", 0), {}
    for i, seed in enumerate(plan["common"]["seeds"]):
        run = found.get((arm, seed + offset))
        if run is not None:
            seconds = times.get(f"{arm}-{seed + offset}")
            values[i] = seconds if metric == "seconds" else measures(run)[metric]
    return values


def comparison(plan, found, times, claim, pair):
    """[differences over seeds, in the claimed direction], and both arms' values."""
    metric, (ours, theirs) = claim["metric"], pair
    a = values_of(plan, found, times, ours, metric)
    if theirs == "start":
        b = values_of(plan, found, times, ours, "start")
    elif ours == theirs:  # of the same runs, from the first measurement to the last
        b = dict.fromkeys(a, 0.0)
    else:
        b = values_of(plan, found, times, theirs, metric)
    both = sorted(i for i in a.keys() & b.keys() if a[i] is not None and b[i] is not None)
    if metric == "seconds":  # a ratio less 1
        return [a[i] / b[i] - 1 for i in both], [(a[i], b[i]) for i in both]
    sign = claim.get("direction", 1)
    return [sign * (a[i] - b[i]) for i in both], [(a[i], b[i]) for i in both]


def judge(claim, effect, p):
    if "at_most" in claim:
        most = claim["at_most"]
        return (
            "holds"
            if effect.high < most
            else "contradicted"
            if effect.low > most
            else "not decided"
        )
    if "smallest" not in claim:
        return "a difference" if p < 0.05 else "no difference"
    return paired.verdict(effect, p, claim["smallest"])


def whole(verdicts):
    """A claim of several comparisons holds if all do."""
    for verdict in ("contradicted", "not decided"):
        if verdict in verdicts:
            return verdict
    return verdicts[0]


def table(plan, found, times, claims):
    """Lines of a table, and [(claim, pair, values)] for the plots."""
    rows = []
    for claim in claims:
        for pair in claim["compare"]:
            differences, values = comparison(plan, found, times, claim, pair)
            if len(differences) > 1:
                rows.append((claim, pair, paired.effect(differences), len(differences), values))
    corrected = paired.holm([effect.p for _, _, effect, _, _ in rows])
    lines = ["| claim | verdict | compared | effect (95 %) | p, Holm | improves | seeds |"]
    lines.append("|---|---|---|---|---|---|---|")
    for claim in claims:
        own = [(row, p) for row, p in zip(rows, corrected) if row[0] is claim]
        if not own:
            lines.append(f"| {claim['id']}. {claim['claim']} | no runs yet | | | | | |")
            continue
        verdicts = [judge(claim, row[2], p) for row, p in own]
        for n, ((_, pair, e, seeds, values), p) in enumerate(own):
            better = paired.probability_of_improvement(*zip(*values))
            name = f"{claim['id']}. {claim['claim']} | **{whole(verdicts)}**" if n == 0 else "|"
            part = "" if len(own) == 1 else f" ({verdicts[n]})"
            lines.append(
                f"| {name} | {' − '.join(pair)}, {claim['metric']}{part} | {e.mean:+.3f} "
                f"[{e.low:+.3f}, {e.high:+.3f}] | {p:.3f} | {better:.2f} | {seeds} |"
            )
    return lines, rows


def plot(claim, rows):
    """Every run a dot, the two arms of a seed joined; returns the picture's name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    own = [row for row in rows if row[0] is claim]
    figure, axes = plt.subplots(1, len(own), figsize=(3 * len(own), 3), squeeze=False)
    for axis, (_, pair, _, _, values) in zip(axes[0], own):
        for b, a in ((theirs, ours) for ours, theirs in values):
            axis.plot([0, 1], [b, a], "o-", color="tab:blue", alpha=0.5, markersize=4)
        axis.set_xticks([0, 1], [pair[1] if pair[0] != pair[1] else "first", pair[0]])
        axis.set_xlim(-0.3, 1.3)
    axes[0][0].set_ylabel(claim["metric"])
    figure.suptitle(f"{claim['id']}. {claim['claim']}", fontsize=9)
    figure.tight_layout()
    PLOTS.mkdir(parents=True, exist_ok=True)
    path = PLOTS / f"claim_{re.sub('[^a-z0-9]+', '_', str(claim['id']).lower())}.png"
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
    return path.name


def write(plan, pilot, found, times, mixed):
    """Make the page; `found` maps (arm, seed) to a run. Returns its path."""
    rates = ", ".join(f"{base} {rate:g}" for base, rate in pilot["rates"].items())
    what = (
        f"Level {pilot['difficulty']} of the task addition, {plan['common']['steps']} steps of 128 "
        f"answers, learning rates chosen on other seeds: {rates}. {len(found)} runs."
    )
    note = "\n**Mixed**: some results are of another commit or of other options.\n" if mixed else ""
    parts, pictures = [HEAD.format(what=what, mixed=note)], []
    for title, claims in (
        ("Fourteen claims", plan["claims"]),
        ("Simple rivals", plan["rivals"]),
        ("Controls", plan["controls"]),
    ):
        lines, rows = table(plan, found, times, claims)
        parts.append("\n".join([f"## {title}\n", *lines, ""]))
        pictures += [(claim, rows) for claim in claims if any(row[0] is claim for row in rows)]
    parts.append("\n".join(arms_table(plan, found, times)))
    try:
        names = [plot(*picture) for picture in pictures]
    except ImportError:
        print("no plots without matplotlib: pip install matplotlib")
    else:
        parts.append("## Every run a dot\n")
        parts += [f"![{name}](../assets/evidence/{name})" for name in names]
    PAGE.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return PAGE


def arms_table(plan, found, times):
    """Means of every arm, to see where the level saturates."""
    keys = ("start", "half-way", "final", "greedy", "pass_at_8", "entropy", "length")
    lines = ["## All arms\n", f"| arm | {' | '.join(keys)} | seeds |", "|---|" + "---|" * 8]
    for arm in plan["arms"]:
        columns = [list(values_of(plan, found, times, arm, key).values()) for key in keys]
        if columns[0]:
            means = " | ".join(f"{sum(values) / len(values):.3f}" for values in columns)
            lines.append(f"| {arm} | {means} | {len(columns[0])} |")
    return [*lines, ""]
