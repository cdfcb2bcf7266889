"""Write a run for UNIPO, a visual explainer: python scripts/export_unipo.py RUN [--out FOLDER]

UNIPO (github.com/poloclub/unipo) shows how a policy optimization algorithm computes the objective
of each token. It reads a log of a run, which its scripts/build_data.py splits, and the definition
of an algorithm, from its src/lib/algorithm-explainer/algorithms/. This script writes both as JSON:
hapo_metrics.json and hapo.json, and for the steps of BuPO's phase 1 bupo_metrics.json and
bupo.json. A run of GRPO or DAPO gets a log only, since UNIPO has their definitions.

UNIPO's log has an entry per update. Our files have a row per step: one rollout phase with several
updates. So an entry is a step of our run after its last update, and each entry is the first after a
rollout phase. It shows one group of responses, the one in samples.jsonl. Only recorded values are
written, and values computed from them: token_objective, clip_eps, and Eq. 9's group_* arrays. The
ids of tokens are not recorded, so `ids` numbers the distinct token strings of the log.
"""

import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import renamed  # noqa: E402
from common.command import OneLineParser, run_main  # noqa: E402
from common.errors import UserError  # noqa: E402
from run.options import Options, stored_options  # noqa: E402
from scripts.page import rows_of, short  # noqa: E402

# ------------------------------------------------------------------------------------------ the log

NOTE = (
    "An entry is a step of the run after its last update. policy_loss is the mean over its updates."
    " clip_fraction is the share of tokens whose gradient a clip bound removes. ids number the "
    "distinct token strings of the log; they are not the tokenizer's. entropy is that of the full "
    "policy before the updates."
)
ENTROPY_FLOOR = 1e-8  # hapo.ENTROPY_FLOOR, which cannot be imported without torch
METRICS = {  # UNIPO's name: ours, in metrics.jsonl
    "policy_loss": "loss",
    "learning_rate": "lr",
    **{name: name for name in "reward entropy grad_norm response_length".split()},
}
OWN_METRICS = (
    "correct zero_std_groups internal_entropy ratio_max kl_old pivot sigma h_max h_min "
    "eval_accuracy eval_greedy"
).split()
TOKENS = {  # UNIPO's name: ours, in samples.jsonl
    "strings": "tokens",
    "log_probs": "new_logp",
    "old_log_probs": "old_logp",
    "advantages": "advantage",
}
OWN_TOKENS = "ratio entropy temperature clip_low clip_high h".split()
HPARAMS = (
    "prompts_per_step updates_per_rollout max_new_tokens temperature tau rho temperature_form "
    "clip_low clip_high adaptive_temperature token_group_average advantage_redistribution "
    "adaptive_clip released advantage loss_mean dual_clip sampler_correction weight_decay "
    "warmup_steps grad_clip overlong_buffer seed"
).split()


def read_run(folder):
    """Return a run's (Options, rows of metrics.jsonl, {step: rows of samples.jsonl}).

    Steps without a loss are left out. UserError if there is no step, or if a value is missing.
    """
    metrics = rows_of(folder / "metrics.jsonl", renamed.METRICS)
    path, options, groups = folder / "samples.jsonl", stored_options(folder), {}
    if options.baseline != "none":
        raise UserError(
            f"{folder}: a run with --baseline {options.baseline}, whose loss is another"
        )
    needed = [*TOKENS.values(), *OWN_TOKENS[:-1]] + ["h"] * (options.algo == "hapo")
    metrics = [r for r in metrics if r.get("loss") is not None and r.get("reward") is not None]
    steps = {row["step"] for row in metrics}
    for row in rows_of(path, renamed.SAMPLES):
        missing = [name for name in needed if name not in row]
        if missing and row["step"] in steps:
            raise UserError(
                f"{path}, step {row['step']}: no {', '.join(missing)}; an older version of this "
                "code wrote it; make the run again"
            )
        groups.setdefault(row["step"], []).append(row)
    metrics = [row for row in metrics if row["step"] in groups]
    if not metrics:
        raise UserError(f"{path}: the run has made no step yet")
    return options, metrics, groups


def log_of(key, options, metrics, groups):
    """Return the log of some steps: a header, and an entry for each of their rows of metrics."""
    numbers = {}  # {token string: its number}
    hparams = {name: getattr(options, name) for name in HPARAMS} | {
        "learning_rate": options.lr,
        "group_size": options.num_generations,
        "clip_eps": [options.clip_low, options.clip_high],
        "kl_coef": options.kl,
        "entropy_floor": ENTROPY_FLOOR,
    }
    if key == "bupo":
        hparams |= {"layer": metrics[0]["layer"], "bupo_norm": options.bupo_norm}
    built_in = f"built-in task {options.task}, difficulty {options.difficulty}"
    header = {
        "task": "questions of a file" if options.data else options.task,
        "dataset": options.data or built_in,
        "reward_strategy": options.reward_function or f"1 for a {options.reward} verdict, else 0",
        "algorithm": key,
        "totalSteps": len(metrics),
        "model_name": options.model,
        "reference_model_name": options.model if options.kl else "none: the loss has no KL term",
        "rollout_batch_size": options.prompts_per_step,
        "hparams": hparams,
        "note": NOTE,
    }
    entries = [entry_of(row, groups[row["step"]], options, numbers) for row in metrics]
    return {"header": header, "entries": entries}


def entry_of(row, group, options, numbers):
    """Return the entry of a step from its row of metrics.jsonl and its group of responses."""
    names = METRICS | {name: name for name in OWN_METRICS}
    metrics = {name: row[ours] for name, ours in names.items() if row.get(ours) is not None}
    metrics["policy_objective"] = -row["loss"]
    metrics["clip_fraction"] = row["clip_low"] + row["clip_high"]
    as_printed = options.algo == "hapo" and options.token_group_average and not options.released
    average = group_average(group) if as_printed else None
    responses = [
        {
            "id": f"step{row['step']}_p0_sample{i}",
            "reward": response["reward"],
            "advantage": sum(response["advantage"]) / max(1, len(response["advantage"])),
            "response_text": response["response"],
            "response_length": len(response["tokens"]),
            "tokens": tokens_of(response, average, numbers),
        }
        for i, response in enumerate(group)
    ]
    return {
        "step": row["step"],
        "is_first_step_after_rollout_phase": True,
        "metrics": metrics,
        "prompts": [{"prompt": group[0]["question"], "responses": responses}],
    }


def tokens_of(response, average, numbers):
    """Return the arrays of a response, one value per token.

    clip_low and clip_high are distances from 1; clip_eps is both, as UNIPO's clip_mul takes them.
    average: group_average of the response's group, or None.
    """
    strings = response["tokens"]
    tokens = {"ids": [numbers.setdefault(text, len(numbers)) for text in strings]}
    tokens |= {name: response[ours] for name, ours in TOKENS.items()}
    tokens |= {name: response[name] for name in OWN_TOKENS if name in response}
    tokens["clip_eps"] = [list(pair) for pair in zip(response["clip_low"], response["clip_high"])]
    columns = (response[name] for name in ("ratio", "advantage", "clip_low", "clip_high"))
    tokens["token_objective"] = short([token_objective(*values) for values in zip(*columns)], 7)
    if average:
        mean, std, has_signal = average
        advantage = (response["reward"] - mean) / (std + 1e-6) if has_signal else 0.0
        of_group = {"group_mean": mean, "group_std": std, "group_advantages": advantage}
        tokens |= {name: [short(value, 7)] * len(strings) for name, value in of_group.items()}
    return tokens


def token_objective(ratio, advantage, clip_low, clip_high):
    """Return min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) of one token."""
    clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
    return min(ratio * advantage, clipped * advantage)


def group_average(group):
    """Return Eq. 9's mean and standard deviation, and whether a token has an advantage.

    Each token carries its response's reward. A length penalty is part of the reward. If only the
    penalty differs within the group, all advantages are 0.
    """
    lengths = [len(response["tokens"]) for response in group]
    rewards = [response["reward"] for response in group]
    tokens = max(1, sum(lengths))
    mean = sum(n * reward for n, reward in zip(lengths, rewards)) / tokens
    variance = sum(n * (reward - mean) ** 2 for n, reward in zip(lengths, rewards)) / tokens
    return mean, variance**0.5, any(any(response["advantage"]) for response in group)


# ----------------------------------------------------------------------------------- the definition

# A binding is a path into the log, or a computation with the bindings that it takes.
BINDINGS = {
    **{name: f"tokens.{name}" for name in "strings log_probs old_log_probs advantages".split()},
    **{name: f"tokens.{name}" for name in "token_objective clip_low clip_high clip_eps".split()},
    "ratios": "tokens.ratio",
    "reward": "response.reward",
    "rewards": "prompt.responses[*].reward",
    "mean_reward": ("array_mean", "rewards"),
    "std_reward": ("array_std", "rewards"),
    "unclipped": ("mul", "ratios", "advantages"),
    "clipped": ("clip_mul", "ratios", "advantages", "clip_eps"),
    "smaller": ("min_winner", "unclipped", "clipped"),
}
HAPO_BINDINGS = {
    **{name: f"tokens.{name}" for name in "entropy h temperature".split()},
    **{name: f"tokens.{name}" for name in "group_mean group_std group_advantages".split()},
    **{name: f"entry.metrics.{name}" for name in "pivot h_max h_min".split()},
    "base_temperature": "header.hparams.temperature",
    "tau": "header.hparams.tau",
    "base_low": "header.hparams.clip_low",
    "base_high": "header.hparams.clip_high",
    "entropy_floor": "header.hparams.entropy_floor",
    "floored_entropy": ("max", "entropy", "entropy_floor"),
    "log_entropy": ("log", "floored_entropy"),
}

# KaTeX formulas. <name|text> is a term: it has the tooltip of this name, and shows the value of the
# binding of this name, if there are any.
MEANS = {
    "token": r"\frac{1}{\sum_i |o_i|}\sum_i\sum_t",
    "sequence": r"\frac{1}{N}\sum_i\frac{1}{|o_i|}\sum_t",
    "fixed": r"\frac{1}{N\,L_{\max}}\sum_i\sum_t",
}
LOW, HIGH = r"\varepsilon_{\text{low}}", r"\varepsilon_{\text{high}}"
OBJECTIVE = (
    r"\min\left(<unclipped|<ratio|r_t>\,<advantage|\hat A_t>>,\ "
    rf"<clipped|<clip|\mathrm{{clip}}(r_t,\,1-{LOW},\,1+{HIGH})>\,\hat A_t>\right)"
)
BOUNDS = rf"\left[1-<clip_low|{LOW}>,\ 1+<clip_high|{HIGH}>\right]"
RATIO = (
    r"\exp\left(<log_probs|\log NEW(<strings|o_t>)>-<old_log_probs|\log OLD(<strings|o_t>)>\right)"
)
POLICIES = {
    "hapo": (r"\pi", r"\pi_{\text{old}}"),
    "bupo": (r"\pi_{\text{layer}}^l", r"\pi_{\text{layer, old}}^l"),
}
GRPO = r"(<reward|R_i>-<mean_reward|\text{mean}>)\,/\,(<std_reward|\text{std}>+10^{-6})"
CASES = (
    r"\begin{cases}<group_advantages|A_t>\,(1+<h|h_t>)&h_t>0,\ r_t\text{ outside the zone}\\"
    r"A_t\,(1+h_t)&h_t\le 0,\ r_t\text{ in the zone}\\A_t&\text{otherwise}\end{cases}"
)
ZONE = rf"\left[1-<base_low|{LOW}>/2,\ 1+<base_high|{HIGH}>/2\right]"
AVERAGE = r"(<reward|R_i>-<group_mean|\mu>)\,/\,(<group_std|s>+10^{-6})"
LOWER = rf"<base_low|{LOW}>\,(1-\min(<h|h_t>,0))"
UPPER = rf"<base_high|{HIGH}>\,(1+\max(<h|h_t>,0))"
SOFTMAX = r"o_t\sim\mathrm{softmax}(z_t/T_t)"
HEAT = r"<base_temperature|T_{\text{base}}>\,(1+<tau|\tau>\,h_t)"
LOG = r"\log\max(<entropy|H_t>,\,10^{-8})"
H = (
    r"\begin{cases}(<log_entropy|x_t>-<pivot|x_\rho>)\,/\,<h_max|h_{\max}>&x_t>x_\rho\\"
    r"(x_t-x_\rho)\,/\,|<h_min|h_{\min}>|&\text{otherwise}\end{cases}"
)

CARDS = {  # id: title, description
    "step-level": ("Objective of a step", "An update raises this objective."),
    "token-level": ("Objective of a token", "Only the ratio has a gradient."),
    "redistribution": (
        "Redistribution of advantages (Eq. 10-11)",
        "A sure token whose ratio is in the zone counts less. An uncertain token whose ratio is "
        "outside the zone counts more.",
    ),
    "group-average": (
        "Group average (Eq. 9)",
        "The mean and the standard deviation are taken over all tokens of the group, so a long "
        "response weighs more.",
    ),
    "clip-bounds": (
        "Clip bounds (Eq. 12-13)",
        "A sure token may lose more probability, an uncertain token may gain more.",
    ),
    "temperature": (
        "Temperature (Eq. 8)",
        "While the model samples, h is computed with the statistics of the step before. In the "
        "first step, all temperatures are the base temperature.",
    ),
    "modulation": ("h from the entropy (Eq. 6)", "The statistics are those of the step's tokens."),
}
TOOLTIPS = {
    "ratio": "The token's probability under the new policy, divided by that under the old one.",
    "advantage": "How much better this response is than the others to the same prompt.",
    "clip": "Outside the bounds, the nearest bound replaces the ratio. If this product is the "
    "smaller one, the token has no gradient.",
    "log_probs": "Log-probability of the token after the step's last update.",
    "old_log_probs": "Log-probability of the token before the step's first update.",
    "group_advantages": "The advantage before the redistribution.",
    "reward": "Reward of the response. All its tokens carry it.",
    "tau": "The option --tau: how far the temperature may move.",
    "entropy": "Entropy of the full policy at this position, in nats.",
    "pivot": "A quantile of the step's log-entropies. A token above it is uncertain.",
    "h_max": "The largest distance of a log-entropy from the pivot in this step.",
    "h_min": "The lowest distance of a log-entropy from the pivot in this step. It is negative.",
}
LINKS = {"ratio": ("token-level", "what"), "advantage": ("token-level", "how")}
NAMES = {
    "hapo": ("HAPO", "Heterogeneous Adaptive Policy Optimization"),
    "bupo": ("BuPO", "Bottom-up Policy Optimization, phase 1: layer l's policy"),
}
NOT_SHOWN = (
    "adaptive_temperature token_group_average advantage_redistribution adaptive_clip released "
    "temperature_form advantage kl dual_clip sampler_correction"
).split()  # options that the formulas do not show


def sections_of(key, options):
    """Return rows (card, id, label, formula, binding after the label, card that a click opens)."""
    new, old = POLICIES[key]
    ratio, mean = RATIO.replace("NEW", new).replace("OLD", old), MEANS[options.loss_mean]
    hapo = options.algo == "hapo"
    advantage = r"A_t\,(1+h_t)\ \text{or}\ A_t" if hapo else GRPO
    rows = [
        ("step-level", "aggregation", "Mean over an update", mean, None, None),
        ("step-level", "per-token", "Token objective", OBJECTIVE, "token_objective", "token-level"),
        ("step-level", "bounds", "Clip bounds", BOUNDS, None, "clip-bounds"),
        ("token-level", "what", "Ratio", ratio, "ratios", None),
        ("token-level", "how", "Advantage", advantage, "advantages", "redistribution"),
    ]
    hapo_rows = [
        ("step-level", "sampling", "Sampling", SOFTMAX, "temperature", "temperature"),
        ("redistribution", "cases", "Advantage", CASES, "advantages", "group-average"),
        ("redistribution", "zone", "Neutral zone of the ratio", ZONE, "ratios", "modulation"),
        ("group-average", "average", "Advantage in the group", AVERAGE, "group_advantages", None),
        ("clip-bounds", "lower", "Lower distance", LOWER, "clip_low", "modulation"),
        ("clip-bounds", "upper", "Upper distance", UPPER, "clip_high", "modulation"),
        ("temperature", "heat", "Temperature", HEAT, "temperature", "modulation"),
        ("modulation", "log", "Log-entropy", LOG, "log_entropy", None),
        ("modulation", "eq6", "h", H, "h", None),
    ]
    return rows + (hapo_rows if hapo else [])


def definition(key, options):
    """Return the definition of "hapo", or of "bupo", for a run with these options."""
    bindings = BINDINGS | (HAPO_BINDINGS if options.algo == "hapo" else {})
    rows = sections_of(key, options)
    shown = [name for name in CARDS if any(row[0] == name for row in rows)]
    cards = []
    for name in shown:
        title, text = CARDS[name]
        own = [row[1:] for row in rows if row[0] == name]
        sections = [section(*row, bindings, shown) for row in own]
        place = {"x": 0, "y": 240 * len(cards)}  # UNIPO moves cards that overlap
        card = {"id": name, "title": title, "position": place, "sections": sections}
        cards.append(card | {"terms": terms_of(sections), "description": text})
    default = Options()
    changed = [n for n in NOT_SHOWN if getattr(options, n) != getattr(default, n)]
    if changed:
        said = ", ".join(f"{name} = {getattr(options, name)}" for name in changed)
        cards[0]["description"] += f" The formulas do not show this run's {said}."
    return {
        "id": key,
        "name": NAMES[key][0],
        "title": NAMES[key][1],
        "defaultVisibleCards": ["step-level"],
        "bindings": {
            name: {"from": how} if isinstance(how, str) else {"compute": how[0], "inputs": how[1:]}
            for name, how in bindings.items()
        },
        "cards": cards,
    }


def section(name, label, formula, value, opens, bindings, cards):
    """Return a section of a card in UNIPO's form. Its terms become KaTeX classes."""
    values = {
        term: {"binding": term, "position": "above", "format": "decimal:4"}
        for term in re.findall(r"<(\w+)\|", formula)
        if term in bindings
    }
    if "strings" in values:
        values["strings"] = {"binding": "strings", "position": "replace", "format": "string"}
    for _ in range(2):  # a term may be part of another one
        formula = re.sub(r"<(\w+)\|([^<>]*)>", r"\\htmlClass{term term--\1}{\2}", formula)
    made = {"id": name, "label": label, "katex": formula, "termValues": values}
    if value:
        style = "heatmap" if value == "token_objective" else "default"
        made["header"] = {"binding": value, "format": "decimal:4", "style": style}
    if opens in cards:
        made["opensCardId"] = opens
    if {"unclipped", "clipped"} <= values.keys():  # mark the smaller product
        candidates = {"left": "unclipped", "right": "clipped"}
        made["compare"] = {"binding": "smaller", "candidates": candidates, "marker": "check"}
    return made


def terms_of(sections):
    """Return a card's terms: their tooltips and links. A section links to the card it opens."""
    terms = {s["id"]: {"toCardId": s["opensCardId"]} for s in sections if "opensCardId" in s}
    for name in re.findall(r"term--(\w+)", "".join(s["katex"] for s in sections)):
        link = dict(zip(("toCardId", "toSectionId"), LINKS.get(name, ())))
        tooltip = {"tooltip": TOOLTIPS[name]} if name in TOOLTIPS else {}
        if link or tooltip:
            terms[name] = link | tooltip
    return terms


# ---------------------------------------------------------------------------------------- the files


def write_unipo(run, out=None):
    """Write the logs and definitions of a run's folder to `out`, and return their paths."""
    options, metrics, groups = read_run(pathlib.Path(run))
    out = pathlib.Path(out or pathlib.Path(run) / "unipo")
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for key, phase in (("bupo", "internal"), (options.algo, "full")):
        rows = [row for row in metrics if row.get("phase", "full") == phase]
        if rows:
            files = {f"{key}_metrics.json": log_of(key, options, rows, groups)}
            if key in ("bupo", "hapo"):
                files[f"{key}.json"] = definition(key, options)
            for name, data in files.items():
                text = json.dumps(data, allow_nan=False)
                (out / name).write_text(text, encoding="utf-8")
                paths.append(out / name)
    return paths


def main(argv=None):
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--out", metavar="FOLDER", help="default RUN/unipo")
    args = parser.parse_args(argv)
    for path in write_unipo(args.run, args.out):
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run_main(main)
