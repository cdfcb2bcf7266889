"""Which runs the plan of claims.json asks for, and with which options of train.py."""

import pathlib

import claims_page

from common.errors import UserError

HERE = pathlib.Path(__file__).resolve().parent
PLAN, PILOT = HERE / "claims.json", HERE / "claims_pilot.json"


def options_of(plan, arm, chosen):
    """train.py's options of an arm, without seed and folder. An arm's name may end with a learning
    rate of its own: dapo@0.0001."""
    arm, _, own = arm.partition("@")
    a = plan["arms"][arm]
    rate = own or inherited(a, chosen)
    parts = [plan["common"]["options"], f"--steps {plan['common']['steps']}"]
    parts += [f"--difficulty {chosen['difficulty']} --algo {a['base']} --lr {rate}", a["options"]]
    parts += [plan["real model"]["options"]] if "real" in a else []
    return " ".join(part for part in parts if part)


def inherited(arm, chosen):
    """The learning rate of an arm's family, or the one that the plan gives it."""
    rates = chosen["real" if "real" in arm else "rates"]
    return arm.get("rate") or rates["grpo" if arm["base"] == "grpo" else "dapo"]


def with_own_rates(plan, chosen):
    """The plan, and the claims of its pilot's "own" once more with every arm at the learning rate
    that is best for it, where that is another than its family's for any of them."""
    groups = []
    for claim in tuned_claims(plan) if "own" in chosen else []:
        pairs = [[at_its_own(plan, arm, chosen) for arm in pair] for pair in claim["compare"]]
        said = f"{claim['claim']}, each arm at its own learning rate"
        if pairs != claim["compare"]:
            groups.append(claim | {"id": f"{claim['id']} own", "claim": said, "compare": pairs})
    arms = {arm for group in groups for pair in group["compare"] for arm in pair}
    named = {arm: plan["arms"][arm.partition("@")[0]] for arm in sorted(arms)}
    return plan | {"own": groups, "arms": plan["arms"] | named}


def tuned_claims(plan):
    """Those whose arms each get a learning rate of their own."""
    return [c for c in plan["claims"] + plan["worlds"] if c["id"] in plan["pilot"]["own"]["claims"]]


def at_its_own(plan, arm, chosen):
    rate = chosen["own"].get(arm)
    if rate is None:
        raise UserError(f"{PILOT.name} has no learning rate for {arm}: run --pilot again")
    return arm if rate == inherited(plan["arms"][arm], chosen) else f"{arm}@{rate}"


def wanted(plan, only=None):
    """[(arm, seed)] of all claims, or of some."""
    groups = groups_of(plan, only)
    arms = dict.fromkeys(a for g in groups for pair in g["compare"] for a in pair if a != "start")
    seeds, real = plan["common"]["seeds"], plan["real model"]["seeds"]
    return [
        (arm, seed + plan["arms"][arm].get("seed_offset", 0))
        for n, seed in enumerate(seeds)
        for arm in arms
        if n < real or "real" not in plan["arms"][arm]
    ]


def groups_of(plan, only=None):
    """Everything that is compared, or those of some names."""
    groups = [group for kind in claims_page.TITLES for group in plan.get(kind, [])]
    if only is not None:
        known = {str(group["id"]): group for group in groups}
        for name in only:
            if name not in known:
                raise UserError(f"--only {name}: no claim of that number or name in {PLAN}")
        groups = [known[name] for name in only]
    return groups
