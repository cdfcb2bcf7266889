"""claims.py --pilot: the level and the learning rates, chosen on seeds of their own."""

import json
import statistics

import claims_page
import claims_plan
import claims_runs
from claims_plan import inherited, options_of, tuned_claims
from claims_runs import read_json, read_runs, same_as_now

from common.errors import UserError


def pilot(plan, real=None):
    """Level and learning rates, chosen on seeds of their own; writes claims_pilot.json. With `real`
    the learning rates of the real model that lies there."""
    made_of = claims_runs.commit()
    if real:
        p, chosen = plan["real model"]["pilot"], read_json(claims_plan.PILOT)
        tried = {f"real-{base}": p["learning_rates"] for base in p["baselines"]}
        rates, table = choose(plan, tried, chosen, p, made_of, real)
        chosen["real"] = {base: rates[f"real-{base}"] for base in p["baselines"]}
        chosen["final, half-way"] |= table
    else:
        chosen = level_and_rates(plan, made_of)
    claims_runs.replace(claims_plan.PILOT, json.dumps(chosen, indent=1) + "\n")
    print(json.dumps(chosen, indent=1))


def level_and_rates(plan, made_of):
    """The first level that fits, a learning rate for each family and for each arm of its own."""
    p, table = plan["pilot"], {}
    for level in p["difficulties"]:
        tried = dict.fromkeys(p["baselines"], p["learning_rates"])
        rates, ends = choose(plan, tried, {"difficulty": level}, p, made_of)
        table |= ends
        if fits(level, table, rates):
            break
    else:
        raise UserError(f"no level of {p['difficulties']} leaves room for a comparison: {table}")
    chosen = {"difficulty": level, "rates": rates, "commit": made_of}
    before = read_json(claims_plan.PILOT)
    if "real" in before:  # has a pilot of its own
        chosen["real"] = before["real"]
        table |= {k: v for k, v in before["final, half-way"].items() if " real-" in k}
    arms = dict.fromkeys(
        arm for claim in tuned_claims(plan) for pair in claim["compare"] for arm in pair
    )
    factors = p["own"]["factors"]
    tried = {arm: [f * inherited(plan["arms"][arm], chosen) for f in factors] for arm in arms}
    own, ends = choose(plan, tried, chosen, p, made_of)
    return chosen | {"own": own, "final, half-way": table | ends}


def choose(plan, tried, chosen, p, made_of, real=None):
    """Of {arm: learning rates} one for each arm, and the table of try_out: the smallest that ends
    within a standard error of the best. Those near the best get more seeds before that is asked:
    two seeds tell a collapse, and little else."""
    table = try_out(plan, tried, chosen, p["seeds"], made_of, real)
    end = lambda arm, rate: table[key_of(chosen["difficulty"], arm, rate)][0]
    near = {}
    for arm, rates in tried.items():
        bar = max(end(arm, rate) for rate in rates) - p["near"]
        near[arm] = [rate for rate in rates if end(arm, rate) >= bar]
    several = {arm: rates for arm, rates in near.items() if len(rates) > 1}
    table |= try_out(plan, several, chosen, p["seeds"] + p["more seeds"], made_of, real)
    chosen_rates = {}
    for arm, rates in near.items():
        best = max(rates, key=lambda rate: end(arm, rate))
        bar = end(arm, best) - table[key_of(chosen["difficulty"], arm, best)][2]
        chosen_rates[arm] = min(rate for rate in rates if end(arm, rate) >= bar)
    return chosen_rates, table


def try_out(plan, tried, chosen, seeds, made_of, real=None):
    """Runs of {arm: learning rates}: {level, arm and rate: [final, half-way, the first's standard
    error, seeds]}, means."""
    level, jobs = chosen["difficulty"], {}
    for arm, rates in tried.items():
        for rate in rates:
            options = options_of(plan, f"{arm}@{rate}", chosen)
            jobs[key_of(level, arm, rate)] = [
                (f"pilot-{arm}-{level}-{rate}-{seed}", options, seed) for seed in seeds
            ]
    runs, every = read_runs(claims_runs.RUNS), [job for several in jobs.values() for job in several]
    missing = [job for job in every if not same_as_now(runs.get(job[0]), job[1], made_of, real)]
    claims_runs.run_missing(plan, missing, claims_runs.RUNS, made_of, real)
    runs, measures = read_runs(claims_runs.RUNS), (final, claims_page.half_way)
    return {
        key: [mean_of([runs[name] for name, _, _ in several], measure) for measure in measures]
        + [standard_error([final(runs[name]) for name, _, _ in several]), len(several)]
        for key, several in jobs.items()
    }


def key_of(level, arm, rate):
    return f"{level} {arm} {rate}"


def fits(level, table, rates):
    """Whether the best baseline ends between 60 and 95 %, and GRPO has room half-way."""
    ends = {base: table[key_of(level, base, rate)] for base, rate in rates.items()}
    return 0.6 <= max(end for end, *_ in ends.values()) <= 0.95 and ends["grpo"][1] <= 0.95


def standard_error(values):
    """Of a mean; of a single value none is known: 0."""
    return round(statistics.stdev(values) / len(values) ** 0.5, 4) if len(values) > 1 else 0.0


def mean_of(runs, measure):
    return round(sum(map(measure, runs)) / len(runs), 4)


def final(run):
    """Held-out accuracy, mean of the evaluations in the last third."""
    return claims_runs.late(run, "eval_accuracy")
