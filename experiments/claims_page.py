"""docs/evidence.md, from the runs of experiments/claims.py that are there.

Called by claims.py; runs nothing. What the numbers surprised us with stands in claims_notes.md,
written by hand after the runs; the plots are made in claims_plots.py.
"""

import pathlib
import re
from collections import Counter
from statistics import mean

import paired
from claims_runs import MASSES, late, read_json

from common.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE, PLOTS = ROOT / "docs" / "evidence.md", ROOT / "assets" / "evidence"
NOTES = pathlib.Path(__file__).resolve().parent / "claims_notes.md"
TITLES = {  # of the kinds of comparisons, in the page's order
    "worlds": "Two worlds: when B helps",
    "field": "The field's rivals",
    "real": "A real model",
    "claims": "Fourteen claims",
    "own": "Each arm at a learning rate of its own",
    "rivals": "Simple rivals",
    "controls": "Controls",
    "added": "Added later",
}
FRONT = ("worlds", "field", "real")  # told first, in words and a picture; their tables come later
CANNOT = "What cannot be told"
HEADS = "| claim | verdict | compared | bar | effect (95 %) | p | p, Holm | improves | seeds |"
ACCURACIES = ("final", "half-way")  # shown in points, hundredths
ENOUGH = 0.5  # the held-out accuracy of "steps to 0.5"

HEAD = """# What holds: the papers' claims, tested again on a toy

**What toy results are worth.** A model of 0.7 million parameters that learns additions says nothing
about a model of 7 billion parameters that learns mathematics. A verdict on this page shows only
whether an effect is so general that it appears even in the smallest case. A clear "no" or "cannot
be told here" is a result, too.
{mixed}"""
RULES = """## How it was tested

`python experiments/claims.py` makes this page from `experiments/claims_runs.jsonl`, a file with one
line per run. `experiments/claims.json` defines the claims and how each of them is tested. It was
written before the runs, except for what is marked as added later. The command makes the tables and
the figures; the other text was written by hand in `experiments/claims_notes.md`.

**Names.** An *arm* is one configuration: an algorithm with its options. A *run* is the training of
one arm with one seed. A to D are the mechanisms of HAPO: `dapo+A` is DAPO with mechanism A alone,
and `hapo-B` is HAPO without mechanism B. `long-dapo` is DAPO on the model *long*; `real-dapo` is
DAPO on the real model. `dapo@0.0004` is DAPO at the learning rate 0.0004. *Start* is the model
before training. `experiments/claims.json` lists the options of every arm. A *rival* is another
method that is compared with a mechanism of HAPO, with HAPO as a whole, or with BuPO.

{what}

**How to read a table.** *Effect* is the mean difference between the two runs of a pair, which have
the same seed, with its 95 % interval. Its sign is chosen so that a value above 0 supports the
claim. Differences of accuracies are in points (hundredths). *Bar* is the smallest effect that
counts. *p* is the exact p of a two-sided sign-flip test for one comparison. *p, Holm* is the p of
the claim, corrected by Holm's method for the number of claims in the table. *Improves* is the
probability that a run of the first arm beats a run of the second arm, over all pairs of seeds.

A claim *holds* if the mean difference reaches the bar and the corrected p is below 0.05. It is
*contradicted* if the whole 95 % interval of the comparison, without correction, lies below the bar.
The effect is then too small to matter, or absent; the verdict does not mean that it is reversed.
*The reverse* is added if the interval lies below 0 and the corrected p is below 0.05. In all other
cases the claim is *not decided*: the upper end of the interval is the largest effect that is still
possible.

A claim with several comparisons holds if all of them hold, and is contradicted if one of them is
contradicted. Its p is the largest p of its comparisons. The verdict in brackets after a comparison
is that of this comparison alone, without correction. If the bar is "below" a value, the claim holds
if the whole interval lies below that value. If the bar is "above" a value, the claim holds if the
whole interval lies above it. The p of a control is not corrected. This makes the control stricter,
because a difference is found more easily. *No difference* means that no difference was found (p not
below 0.05).

*Final* is {final}.
*Greedy* is the held-out accuracy with greedy decoding. *Entropy* is in nats per token, and *length*
is in tokens per response. These three and *groups with a correct response* (a share of the groups)
are also means over the last third of the steps. Entropy, length and groups with a correct response
are measured on the training responses. *Half-way* is the held-out accuracy at the middle evaluation
(step 24; step 12 for the real model). *Steps to 0.5* is the step at which the held-out accuracy
first reaches 0.5. *Similarity* is the cosine similarity between the hidden states of the aligned
layer and of the last layer. For *seconds*, the effect is the ratio of the two arms' times minus 1.
{changes}
"""


def steps_to(curve, value):
    """The step at which a curve [(step, value)] first reaches a value, between its points on a
    straight line; None if it never does."""
    for (step0, y0), (step1, y1) in zip(curve, curve[1:]):
        if y0 < value <= y1:
            return step0 + (step1 - step0) * (value - y0) / (y1 - y0)
    return None


def half_way(run):
    last = run["eval_accuracy"][-1][0]
    return next(value for step, value in run["eval_accuracy"] if step >= last / 2)


def measures(run):
    """What a run is compared by."""
    return {
        "final": late(run, "eval_accuracy"),
        "greedy": late(run, "eval_greedy"),
        "half-way": half_way(run),
        "start": run["eval_accuracy"][0][1],
        "entropy": late(run, "entropy"),
        "length": late(run, "response_length"),
        "pass_at_8": late(run, "pass_at_8"),
        "eval_length": late(run, "eval_length"),
        "entropy, all steps": mean(value for _, value in run["entropy"]),
        "length, all steps": mean(value for _, value in run["response_length"]),
        "steps to 0.5": steps_to(run["eval_accuracy"], ENOUGH),
        "tokens": run["tokens"] / 1000,
        "updates": run["updates"],
    }


def similarity(run, metric):
    """(before, after): cos(H^l, H^L) at the two steps of "similarity, step A to B", or at the first
    and the last measurement; None where they were not measured."""
    at = dict(run["similarity"])
    if not at:
        return None
    named = metric.partition(", step ")[2]
    first, last = map(int, named.split(" to ")) if named else (min(at), max(at))
    return at[first], at[last]


def values_of(plan, found, times, arm, metric):
    """The arm's measure by place of the seed in the list of seeds."""
    offset, values = plan["arms"].get(arm, {}).get("seed_offset", 0), {}
    for i, seed in enumerate(plan["common"]["seeds"]):
        run = found.get((arm, seed + offset))
        if run is not None:
            if metric.startswith("similarity"):
                values[i] = similarity(run, metric)
            elif metric.startswith("seconds"):  # of the whole run, or "seconds, same answers"
                values[i] = times.get(f"{arm}-{seed + offset}{metric.removeprefix('seconds')}")
            else:
                values[i] = measures(run)[metric]
    return values


def comparison(plan, found, times, claim, pair):
    """[differences over seeds, in the claimed direction], and both arms' values."""
    metric, (ours, theirs) = claim["metric"], pair
    a = values_of(plan, found, times, ours, metric)
    if theirs == "start":
        b = values_of(plan, found, times, ours, "start")
    else:
        b = values_of(plan, found, times, theirs, metric)
    if metric.startswith("similarity"):
        if ours == theirs:  # from the first measurement to the last
            a, b = ({i: ends[which] for i, ends in a.items() if ends} for which in (1, 0))
        else:  # whose grew by more
            a, b = ({i: v[1] - v[0] for i, v in values.items() if v} for values in (a, b))
    both = sorted(i for i in a.keys() & b.keys() if a[i] is not None and b[i] is not None)
    if metric.startswith("seconds"):  # a ratio less 1
        return [a[i] / b[i] - 1 for i in both], [(a[i], b[i]) for i in both]
    sign = claim.get("direction", 1)
    return [sign * (a[i] - b[i]) for i in both], [(a[i], b[i]) for i in both]


def judge(claim, pair, effect, p):
    """The verdict of one comparison, and whether it is clearly the other way round."""
    if "at_most" in claim:
        if effect.high < claim["at_most"]:
            return "holds", False
        return ("contradicted" if effect.low > claim["at_most"] else "not decided"), False
    if "no_worse_by" in claim:
        if effect.low > -claim["no_worse_by"]:
            return "holds", False
        return ("contradicted" if effect.high < -claim["no_worse_by"] else "not decided"), False
    if "smallest" not in claim and pair[1] == "start":
        if p < 0.05:
            return ("something learned" if effect.mean > 0 else "nothing learned, much lost"), False
        return "nothing learned", False
    if "smallest" not in claim:
        return ("a difference" if p < 0.05 else "no difference"), False
    return paired.verdict(effect, p, claim["smallest"]), effect.high < 0 and p < 0.05


def whole(verdicts):
    """A claim of several comparisons holds if all do."""
    for verdict in ("contradicted", "not decided"):
        if verdict in verdicts:
            return verdict
    return verdicts[0]


def table(plan, found, times, claims):
    """PackedBatch of a table, and [(claim, pair, effect, seeds, values)] for the plots."""
    rows = []
    for claim in claims:
        for pair in claim["compare"]:
            differences, values = comparison(plan, found, times, claim, pair)
            if len(differences) > 1:
                rows.append((claim, pair, paired.effect(differences), len(differences), values))
    corrected = corrected_ps(claims, rows)
    lines = [HEADS, "|---" * HEADS.count(" | ") + "|---|"]
    for claim in claims:
        own = [row for row in rows if row[0] is claim]
        if not own:
            lines.append(f"| {claim['id']}. {claim['claim']} | no runs yet | | | | | | | |")
            continue
        p, timed = corrected.get(claim["id"]), "at_most" in claim
        outcomes = [judge(claim, row[1], row[2], row[2].p if p is None else p) for row in own]
        verdict, reverse = whole([v for v, _ in outcomes]), all(r for _, r in outcomes)
        if len(own) < len(claim["compare"]) and verdict != "contradicted":
            verdict = "runs missing"
        named = f"| {claim['id']}. {claim['claim']} | {said(f'**{verdict}**', reverse)}"
        for n, (_, pair, e, seeds, values) in enumerate(own):
            better = paired.probability_of_improvement(
                *list(zip(*values))[:: claim.get("direction", 1)]
            )
            part = "" if len(own) == 1 else f" ({said(*judge(claim, pair, e, e.p))})"
            compared = " − ".join(pair[:: claim.get("direction", 1)])
            if pair[0] == pair[1]:
                compared = f"{pair[0]}, last − first"
            shown = f"{p:.3f}" if p is not None and n == 0 else ""
            own_p, improves = ("", "") if timed else (f"{e.p:.3f}", f"{better:.2f}")
            lines.append(
                f"{named if n == 0 else '| |'} | {compared}, {claim['metric']}{part} | "
                f"{bar(claim)} | {amount(e.mean, claim)} "
                f"[{amount(e.low, claim)}, {amount(e.high, claim)}] | "
                f"{own_p} | {shown} | {improves} | {seeds} |"
            )
    return lines, rows


def bar(claim):
    """What the effect must reach."""
    if "at_most" in claim:
        return f"below {claim['at_most']:+g}"
    unit = 100 if claim["metric"] in ACCURACIES else 1
    if "no_worse_by" in claim:
        return f"above {-claim['no_worse_by'] * unit:+g}"
    return f"{claim['smallest'] * unit:+g}" if "smallest" in claim else ""


def amount(value, claim):
    """An effect as it is shown: of accuracies in points."""
    return f"{100 * value:+.1f}" if claim["metric"] in ACCURACIES else f"{value:+.3f}"


def corrected_ps(claims, rows):
    """{id: p} of the claims that predict a difference: the largest p of a claim's comparisons, by
    Holm over all such claims of the table, those without all their runs counted as 1."""
    tested, ps = [claim for claim in claims if "smallest" in claim], []
    for claim in tested:
        known = [e.p for c, _, e, _, _ in rows if c is claim]
        ps.append(max(known) if len(known) == len(claim["compare"]) else 1.0)
    return {claim["id"]: p for claim, p in zip(tested, paired.holm(ps))}


def said(verdict, reverse):
    return f"{verdict}: the reverse" if reverse else verdict


def write(plan, pilot, found, times, other):
    """Make the page; `found` maps (arm, seed) to a run. Returns its path."""
    tables, rows, ps = {}, {}, {}
    for kind in TITLES:
        claims = plan.get(kind, [])
        lines, rows[kind] = table(plan, found, times, claims)
        tables[kind] = "\n".join([*lines, ""])
        ps |= corrected_ps(claims, rows[kind])
    text = NOTES.read_text(encoding="utf-8") if NOTES.exists() else ""
    before = before_training(read_json(MASSES))
    notes = sections(with_numbers(text, plan, found, times, ready_numbers(before, ps)))
    try:
        import claims_plots

        pictures = claims_plots.draw(PLOTS, found, rows)
    except ImportError:
        print("no plots without matplotlib: pip install matplotlib")
        pictures = []
    shown = lambda name: f"![{name}](../assets/evidence/{name})\n" if name in pictures else ""
    note = said_of_others(other) if other else ""
    parts = [HEAD.format(mixed=note)]
    planned = {kind: title for kind, title in TITLES.items() if plan.get(kind)}
    for kind in filter(planned.get, FRONT):
        parts += [f"## {TITLES[kind]}\n", notes.pop(TITLES[kind], ""), shown(f"{kind}.png")]
    parts += [f"## {CANNOT}\n\n{notes.pop(CANNOT, '')}", rules(plan, pilot, found, times)]
    for kind, title in planned.items():
        if kind in FRONT:
            parts += [f"## {title}: the numbers\n", tables[kind]]
        else:
            parts += [f"## {title}\n", notes.pop(title, ""), tables[kind], shown(f"{kind}.png")]
    parts += [mass_table(before), rates_table(plan, pilot)]
    parts += arms_tables(plan, found, times)
    parts += [f"## {title}\n\n{text}" for title, text in notes.items()]
    if pictures:
        words = (
            "The first figure shows the accuracy over the steps, one line per run. The second\n"
            "figure shows the comparisons that no figure above shows. A line joins the two runs\n"
            "of a seed.\n"
        )
        parts += [f"## What the pictures above leave out\n\n{words}"]
        parts += [shown("curves.png"), shown("others.png")]
    PAGE.write_text("\n".join(part for part in parts if part), encoding="utf-8")
    return PAGE


def sections(text):
    """{title: text} of a file's second-level headings."""
    found = {}
    for part in f"\n{text}".split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        found[title] = body.strip("\n") + "\n"
    return found


def ready_numbers(before, ps):
    """What notes may name, and the table of before_training or of the claims shows."""
    columns = {f"{model}: {name}": x for model, own in before.items() for name, x in own.items()}
    return columns | {f"Holm {claim}": f"{p:.3f}" for claim, p in ps.items()}


def with_numbers(text, plan, found, times, ready):
    """Notes with the numbers that they name, from the runs that are there: {a - b, metric} an
    effect and its interval, {a > b, metric} in how many seeds, {a, metric} an arm's mean; or one
    that is `ready`: {Holm id} a claim's corrected p, {model: column} as in mass_table. The metric
    of a comparison is "final" where none is given; a dash stands where there are no runs."""

    def number(named):
        if named[1] in ready:
            return ready[named[1]]
        pair, _, metric = named[1].partition(", ")
        arms, claim = re.split(" [->] ", pair), {"metric": metric or "final"}
        if not plan["arms"].keys() >= set(arms) - {"start"}:
            raise UserError(f"{NOTES.name}: {named[0]} names no arm of claims.json")
        if len(arms) == 1:
            values = values_of(plan, found, times, pair, metric).values()
            return f"{mean(values):.2f}" if values else "–"
        differences, _ = comparison(plan, found, times, claim, arms)
        if len(differences) < 2:
            return "–"
        if " > " in pair:
            return f"{sum(d > 0 for d in differences)} of {len(differences)}"
        e = paired.effect(differences)
        low_to_high = f"[{amount(e.low, claim)}, {amount(e.high, claim)}]"
        return f"{amount(e.mean, claim)} {low_to_high}".replace("-", "−")

    return re.sub(r"\{([^{}]+)\}", number, text)


def said_of_others(other):
    """Which arms have results that were made with something else than now."""
    each = "; ".join(f"other {what}: {', '.join(sorted(arms))}" for what, arms in other.items())
    return (
        f"\n**Mixed**: some results were made with something else than now ({each}). Such a result "
        "is paired with one of now by its seed alone: draws and rounding differ.\n"
    )


def rules(plan, pilot, found, times):
    """How it was tested."""
    rates = ", ".join(f"{base} {rate:g}" for base, rate in pilot["rates"].items())
    toy, real = (
        sum(times.get(f"{arm}-{seed}", 0) for arm, seed in found if is_real(plan, arm) == kind)
        / 7200
        for kind in (False, True)
    )  # hours, two runs at a time
    groups = [claim for kind in TITLES for claim in plan.get(kind, [])]
    arms = {arm for claim in groups for pair in claim["compare"] for arm in pair} - {"start"}
    seeds = lambda arm: len(plan["common"]["seeds"]) if not is_real(plan, arm) else (
        plan["real model"]["seeds"])  # fmt: skip
    asked, steps = sum(map(seeds, arms)), plan["common"]["steps"]
    there = "" if len(found) == asked else f" of {asked}"
    what = (
        f"The task is level {pilot['difficulty']} of addition (three digits). A run has {steps} "
        "steps of 128 responses (the default run: 40 of 256). The learning rates were chosen in a "
        f"pilot study with other seeds: {rates}. The page uses {len(found)} runs{there}. They were "
        f"made two at a time on two cores, in {toy:.1f} hours; the real model took {real:.1f} "
        f"hours more. The time of the pilot study is not included. {machines(found)}"
    )
    final, changes = plan["common"]["final"], "\n".join(f"- {c}" for c in plan["changes"])
    if changes:
        changes = "\nThe plan was changed after results had been seen:\n\n" + changes
    return RULES.format(what=what, final=final, changes=changes)


def machines(found):
    """How many runs were made on which kind of machine: rounding differs between them."""
    unknown = "a configuration that was not recorded"
    often = Counter(run.get("machine", unknown) for run in found.values())
    each = "; ".join(f"{runs} with {kind}" for kind, runs in often.most_common())
    return f"Rounding differs between machines. Numbers of runs by machine: {each}."


def is_real(plan, arm):
    return "real" in plan["arms"][arm]


def rates_table(plan, pilot):
    """What the pilot's learning rates came to, an arm a line; the one that was chosen in bold."""
    arms = {}
    for key, (end, _, _, seeds) in pilot["final, half-way"].items():
        level, arm, rate = key.split()
        if level == str(pilot["difficulty"]):
            arms.setdefault(arm, {})[float(rate)] = end, seeds
    rates = sorted({rate for ends in arms.values() for rate in ends})
    lines = [
        "## Learning rates\n",
        "The table gives the final accuracy of each arm at each learning rate, averaged over the\n"
        "seeds of the pilot study. The number of seeds is in brackets. Bold marks the rate that\n"
        "was chosen.\n",
    ]
    lines += [
        f"| arm | {' | '.join(f'{rate:g}' for rate in rates)} |",
        "|---" * len(rates) + "|---|",
    ]
    for arm, ends in arms.items():
        known = pilot["rates"] | pilot.get("own", {})
        known |= {f"real-{base}": rate for base, rate in pilot.get("real", {}).items()}
        shown = [f"{ends[r][0]:.3f} ({ends[r][1]})" if r in ends else "" for r in rates]
        shown = [f"**{x}**" if r == known.get(arm) else x for r, x in zip(rates, shown)]
        lines.append(f"| {arm} | {' | '.join(shown)} |")
    return "\n".join([*lines, ""])


def before_training(masses):
    """How long answers are before training, and what is left of the advantages' mass when their
    signs are set off against each other, as shown: {model: {"right", "wrong" or rule: number}}."""
    shown = {}
    for model, known in masses.items():
        shown[model] = {kind: f"{known[kind]:.1f}" for kind in ("right", "wrong")}
        for rule, parts in known["mass"].items():
            net = round(sum(map(sum, parts.values())), 2)
            shown[model][rule] = f"{net:+.2f}".replace("-", "−") if net else "0"
    return shown


def mass_table(before):
    """What before_training has found. A net of 0 pushes as much up as down."""
    if not before:
        return ""
    columns = list(next(iter(before.values())))
    lines = [
        "## Length and advantage mass before training\n",
        "The columns *right* and *wrong* give the mean number of tokens of a correct and of an\n"
        "incorrect response. The columns after them give the sum of all tokens' advantages,\n"
        "divided by the sum of their absolute values, for GRPO's advantages and for those of\n"
        "mechanism B (`python experiments/advantage_mass.py`).\n",
        f"| model | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    lines += [f"| {model} | {' | '.join(own.values())} |" for model, own in before.items()]
    return "\n".join([*lines, ""])


def arms_tables(plan, found, times):
    """Means of all arms: of the shipped model; of the others, which start elsewhere."""
    longer = [arm for arm in plan["arms"] if "--steps" not in plan["arms"][arm]["options"]]
    own = [arm for arm in longer if not is_real(plan, arm)]
    others = [
        arm
        for arm in plan["arms"]
        if is_real(plan, arm) or "--model" in plan["arms"][arm]["options"]
    ]
    yield "\n".join(arms_table(plan, found, times, "All arms", own))
    yield "\n".join(arms_table(plan, found, times, "Arms of other models", others))


def arms_table(plan, found, times, title, arms):
    """Means of every arm, to see where the level saturates."""
    keys = "start half-way final greedy pass_at_8 entropy length tokens updates".split()
    heads = [
        {"tokens": "1000 training tokens", "pass_at_8": "groups with a correct response"}.get(k, k)
        for k in keys
    ]
    lines = [f"## {title}\n\n| arm | {' | '.join(heads)} | steps to {ENOUGH} | seeds |"]
    lines.append("|---" * (len(keys) + 3) + "|")
    for arm in arms:
        columns = [list(values_of(plan, found, times, arm, key).values()) for key in keys]
        reached = list(values_of(plan, found, times, arm, "steps to 0.5").values())
        if columns[0]:
            digits = {"tokens": ".0f", "updates": ".4g", "length": ".1f"}
            if "--reward random" in plan["arms"][arm]["options"]:
                columns[keys.index("pass_at_8")] = []  # of coins, not of answers
            means = " | ".join(
                f"{sum(values) / len(values):{digits.get(key, '.3f')}}" if values else "–"
                for key, values in zip(keys, columns)
            )
            there = [step for step in reached if step is not None]
            average = f"{sum(there) / len(there):.1f}" if len(there) == len(reached) else ""
            often = average or f"{len(there)} of {len(reached)} runs"
            lines.append(f"| {arm} | {means} | {often} | {len(columns[0])} |")
    return [*lines, ""]
