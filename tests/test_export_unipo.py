"""The files for UNIPO: they have the forms that UNIPO describes, and the run's numbers.

The forms are those of UNIPO's docs/canonical_schema.json and docs/canonical_algorithm.json, and of
schema.ts, loader.ts and bindings.ts in its src/lib/algorithm-explainer/.
"""

import copy
import dataclasses
import json
import math
import re

import pytest
from conftest import program, sharpened, verdicts

import hapo
import train
from run import report
from run.options import Options
from scripts import export_unipo

HEADER = (
    "task dataset reward_strategy algorithm totalSteps model_name reference_model_name hparams"
).split()
RESPONSE = "id reward advantage response_text response_length tokens".split()
CONSUMED = "ids strings log_probs old_log_probs advantages token_objective".split()
FORMATS = "decimal:2 decimal:3 decimal:4 sigfig:3 string".split()
COMPUTE = {  # UNIPO's kinds of computation
    "exp": math.exp,
    "log": math.log,
    "neg": lambda a: -a,
    "neg_mul": lambda a, b: -(a * b),
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "clip_mul": lambda ratio, a, eps: min(max(ratio, 1 - eps[0]), 1 + eps[1]) * a,
    "min": min,
    "max": max,
    "min_winner": lambda a, b: "left" if a <= b else "right",
    "array_mean": lambda values: sum(values) / len(values),
    "array_std": lambda values: math.sqrt(
        sum((x - sum(values) / len(values)) ** 2 for x in values) / (len(values) - 1)
    ),
}
INPUTS = {"exp": 1, "log": 1, "neg": 1, "array_mean": 1, "array_std": 1, "clip_mul": 3}  # else 2


def check_log(log, name):
    header, entries = log["header"], log["entries"]
    assert set(HEADER) <= header.keys() and isinstance(header["hparams"], dict)
    assert all(isinstance(header[key], str) for key in HEADER if key not in HEADER[4::3])
    assert name == f"{header['algorithm']}_metrics.json" and header["totalSteps"] == len(entries)
    steps = [entry["step"] for entry in entries]
    assert steps and steps == sorted(set(steps))
    for entry in entries:
        assert entry["is_first_step_after_rollout_phase"] is True
        assert {"policy_objective", "reward"} <= entry["metrics"].keys()
        assert all(is_number(value) for value in entry["metrics"].values())
        for prompt in entry["prompts"]:
            assert isinstance(prompt["prompt"], str) and prompt["responses"]
            for response in prompt["responses"]:
                check_response(response)
    responses = [r for e in entries for p in e["prompts"] for r in p["responses"]]
    assert len({response["id"] for response in responses}) == len(responses)


def check_response(response):
    assert set(RESPONSE) <= response.keys() and isinstance(response["response_text"], str)
    assert is_number(response["reward"]) and is_number(response["advantage"])
    tokens = response["tokens"]
    assert set(CONSUMED) <= tokens.keys()
    for name, values in tokens.items():
        assert len(values) == response["response_length"], name
        if name == "strings":
            assert all(isinstance(value, str) for value in values)
        elif name == "clip_eps":
            assert all(len(pair) == 2 and all(map(is_number, pair)) for pair in values)
        else:
            assert all(map(is_number, values)), name


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_definition(algorithm, name):
    assert name == f"{algorithm['id']}.json" and algorithm["name"] and algorithm["title"]
    check_bindings(algorithm["bindings"])
    cards = {card["id"]: card for card in algorithm["cards"]}
    assert len(cards) == len(algorithm["cards"]) and "token-level" in cards
    opened = {*algorithm["defaultVisibleCards"], "token-level"}  # by a click on a token
    for card in cards.values():
        assert card["title"] and all(map(is_number, card["position"].values()))
        assert card["position"].keys() == {"x", "y"} and isinstance(card["description"], str)
        for section in card["sections"]:
            check_section(section, algorithm["bindings"])
            opened |= {section["opensCardId"]} if "opensCardId" in section else set()
        ids = [section["id"] for section in card["sections"]]
        classes = set(re.findall(r"term--([\w-]+)", "".join(s["katex"] for s in card["sections"])))
        assert len(set(ids)) == len(ids) and card["terms"].keys() <= classes | set(ids)
        for term in card["terms"].values():
            assert term and term.keys() <= {"toCardId", "toSectionId", "tooltip"}
            if "toSectionId" in term:
                there = cards[term["toCardId"]]["sections"]
                assert term["toSectionId"] in [section["id"] for section in there]
            assert term.get("toCardId", "step-level") in cards
    assert opened == cards.keys()


def check_bindings(bindings):
    for how in bindings.values():
        if "from" in how:
            assert how.keys() == {"from"}
            assert re.fullmatch(
                r"(tokens|response|entry\.metrics|header\.hparams|prompt\.responses\[\*\])\.\w+",
                how["from"],
            )
        else:
            assert how.keys() == {"compute", "inputs"} and how["compute"] in COMPUTE
            assert len(how["inputs"]) == INPUTS.get(how["compute"], 2)
            assert set(how["inputs"]) <= bindings.keys()
    for name in bindings:  # no binding is computed from itself
        below = [name]
        for other in below:  # the list grows
            below += [n for n in bindings[other].get("inputs", ()) if n not in below[1:]]
        assert name not in below[1:], name


def check_section(section, bindings):
    katex, values = section["katex"], section["termValues"]
    assert katex.count("{") == katex.count("}") and katex.count(r"\left") == katex.count(r"\right")
    assert not re.search(r"<\w+\||NEW|OLD", katex)
    for term, slot in values.items():
        assert f"term--{term}}}" in katex
        assert slot["position"] in ("above", "below", "inline", "replace")
    for slot in [*values.values(), section.get("header", {"binding": next(iter(bindings))})]:
        assert slot["binding"] in bindings
        assert slot.get("format", "string") in FORMATS
        assert slot.get("style", "default") in ("default", "heatmap")
    if "compare" in section:
        compare = section["compare"]
        assert compare["marker"] == "check" and set(compare["candidates"].values()) <= values.keys()
        assert compare["candidates"].keys() == {"left", "right"}
        assert bindings[compare["binding"]]["compute"] == "min_winner"


def value_of(name, algorithm, log, entry, response, token):
    """The value of a binding at a token, as UNIPO computes it."""
    how = algorithm["bindings"][name]
    if "compute" in how:
        inputs = (value_of(n, algorithm, log, entry, response, token) for n in how["inputs"])
        return COMPUTE[how["compute"]](*inputs)
    *path, field = how["from"].split(".")
    if path[0] == "tokens":
        return response["tokens"][field][token]
    if path[0] == "prompt":
        return [other[field] for other in entry["prompts"][0]["responses"]]
    places = {"response": response, "entry": entry["metrics"], "header": log["header"]["hparams"]}
    return places[path[0]][field]


def every_token(algorithm, log):
    """(entry, response, number of a token, function that returns the value of a binding)."""
    for entry in log["entries"]:
        for response in entry["prompts"][0]["responses"]:
            for t in range(response["response_length"]):
                at = (algorithm, log, entry, response, t)
                yield entry, response, t, lambda name, at=at: value_of(name, *at)


def written(run, *names):
    """The files that the command writes, each checked."""
    paths = export_unipo.write_unipo(run)
    assert [path.name for path in paths] == list(names)
    files = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    for name, data in files.items():
        (check_log if "_metrics" in name else check_definition)(data, name)
    return files.values()


# ----------------------------------------------------------------------------- a run of two steps


def response_row(step, tokens, reward, old, new, ratio, advantage, low, high):
    n = len(tokens)
    row = {"step": step, "question": "q?", "response": "".join(tokens), "tokens": tokens}
    row |= {"reward": reward, "ratio": ratio, "advantage": advantage}
    row |= {"old_logp": [math.log(p) for p in old], "new_logp": [math.log(p) for p in new]}
    row |= {"clip_low": low, "clip_high": high}
    return row | {"entropy": [0.5] * n, "temperature": [1.0] * n, "h": [0.0] * n}


@pytest.fixture
def by_hand(tmp_path):
    """The folder of two steps with one group of two responses each."""
    one = response_row(
        step=1,
        tokens=["a", "b", "a"],
        reward=1.0,
        old=[0.5, 0.2, 0.4],
        new=[0.6, 0.3, 0.2],
        ratio=[1.2, 1.5, 0.5],
        advantage=[1.0, 2.0, -1.0],
        low=[0.2, 0.2, 0.3],
        high=[0.28, 0.4, 0.28],
    )
    two = response_row(1, ["c"], 0.0, [0.4], [0.6], [1.5], [-1.0], [0.2], [0.28])
    more = [row | {"step": 2} for row in (two, one)] + [one | {"step": 4, "ratio": [None] * 3}]
    statistics = {"pivot": -0.5, "sigma": 1.0, "h_max": 0.5, "h_min": -4.0}
    metrics = {"step": 1, "phase": "full", "reward": 0.5, "loss": 0.25, "lr": 1e-3} | statistics
    metrics |= {"clip_low": 0.125, "clip_high": 0.25, "entropy": 0.5, "grad_norm": 2.0}
    options = dataclasses.replace(Options(), tau=0.05, clip_high=0.28, loss_mean="token")
    config = dataclasses.asdict(options)
    skipped = {"step": 3, "skipped": "NaN in a reward"}
    folder = tmp_path / "by_hand"
    folder.mkdir()
    write(folder, "config.json", [config])
    write(folder, "samples.jsonl", [one, two, *more])
    not_finite = metrics | {"step": 4, "loss": None}
    rows = [{"step": 0, "eval_accuracy": 0.5}, metrics, metrics | {"step": 2}, skipped, not_finite]
    write(folder, "metrics.jsonl", rows)
    return folder


def write(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def test_a_run_by_hand(by_hand):
    log, algorithm = written(by_hand, "hapo_metrics.json", "hapo.json")
    assert [entry["step"] for entry in log["entries"]] == [1, 2]
    assert log["header"]["hparams"]["clip_eps"] == [0.2, 0.28]
    metrics = log["entries"][0]["metrics"]
    assert metrics["policy_objective"] == -0.25 and metrics["policy_loss"] == 0.25
    assert metrics["clip_fraction"] == 0.375 and metrics["learning_rate"] == 1e-3
    assert "reward_std" not in metrics and "kl" not in metrics and "response_length" not in metrics
    one, two = log["entries"][0]["prompts"][0]["responses"]
    assert one["response_text"] == "aba" and one["tokens"]["strings"] == ["a", "b", "a"]
    assert one["tokens"]["ids"] == [0, 1, 0] and two["tokens"]["ids"] == [2]
    # 1.2 x 1; 1.4 x 2 and not 1.5 x 2; 0.7 x -1 and not 0.5 x -1; 1.5 x -1 and not 1.28 x -1
    assert one["tokens"]["token_objective"] == pytest.approx([1.2, 2.8, -0.7])
    assert two["tokens"]["token_objective"] == pytest.approx([-1.5])
    assert one["advantage"] == pytest.approx(2 / 3) and two["advantage"] == -1
    # of the rewards 1, 1, 1, 0: the mean is 0.75, the standard deviation 0.4330127
    assert one["tokens"]["group_mean"] == [0.75] * 3
    assert one["tokens"]["group_std"] == pytest.approx([0.4330127] * 3)
    assert one["tokens"]["group_advantages"] == pytest.approx([0.5773490] * 3, abs=1e-6)
    assert two["tokens"]["group_advantages"] == pytest.approx([-1.7320468], abs=1e-6)
    values = [
        [get(name) for name in ("ratios", "unclipped", "clipped", "smaller")]
        for *_, get in every_token(algorithm, log)
    ]
    expected = [
        (1.2, 1.2, 1.2, "left"),
        (1.5, 3.0, 2.8, "right"),
        (0.5, -0.5, -0.7, "right"),
        (1.5, -1.5, -1.28, "left"),
    ]
    for found, (*numbers, winner) in zip(values, expected):
        assert found[:3] == pytest.approx(numbers) and found[3] == winner
    assert len(values) == 8  # in the second step the other way round


def test_a_length_penalty_alone_gives_no_advantage(by_hand):
    rows = rows_of(by_hand, "samples.jsonl")
    write(by_hand, "samples.jsonl", [r | {"advantage": [0.0] * len(r["tokens"])} for r in rows])
    log, _ = written(by_hand, "hapo_metrics.json", "hapo.json")
    tokens = log["entries"][0]["prompts"][0]["responses"][0]["tokens"]
    assert tokens["group_mean"] == [0.75] * 3 and tokens["group_advantages"] == [0.0] * 3


@pytest.mark.parametrize("changed", [{"token_group_average": False}, {"released": True}])
def test_another_rule_for_advantages_has_no_values_of_eq_9(by_hand, changed):
    write(by_hand, "config.json", [rows_of(by_hand, "config.json")[0] | changed])
    log, algorithm = written(by_hand, "hapo_metrics.json", "hapo.json")
    tokens = log["entries"][0]["prompts"][0]["responses"][0]["tokens"]
    assert not [name for name in tokens if name.startswith("group_")]
    name, value = [*changed.items()][0]
    assert f"do not show this run's {name} = {value}." in algorithm["cards"][0]["description"]


# --------------------------------------------------------------------------------------- real runs


def steps_of(run):
    for step in (1, 2):
        report.record(step, *train.guarded_step(step, run), run)
    run.lock.lock.release()
    return run.out


def check_tokens(log, algorithm, samples):
    """What UNIPO computes is what the step recorded."""
    clipped = {}
    for i, row in enumerate(samples):
        clipped[f"step{row['step']}_p0_sample{i % 2}"] = row["clipped"]
    outside = 0
    for name in algorithm["bindings"]:
        assert all(get(name) is not None for *_, get in every_token(algorithm, log)), name
    for _, response, t, get in every_token(algorithm, log):
        both = get("unclipped"), get("clipped")
        scale = max(1.0, abs(get("token_objective")))
        assert min(both) == pytest.approx(get("token_objective"), abs=1e-4 * scale)
        log_ratio = get("log_probs") - get("old_log_probs")
        assert get("ratios") == pytest.approx(math.exp(min(max(log_ratio, -20), 20)), rel=1e-4)
        if abs(both[0] - both[1]) > 1e-3:
            stopped = clipped[response["id"]][t] != 0
            assert get("smaller") == ("right" if stopped else "left")
            outside += 1
    assert outside, "no ratio is outside its bounds"


def test_a_run_of_hapo(opened, monkeypatch):
    verdicts(monkeypatch, True, False)
    run = steps_of(sharpened(opened("--lr", "1e-2")))
    log, algorithm = written(run, "hapo_metrics.json", "hapo.json")
    samples, metrics = rows_of(run, "samples.jsonl"), rows_of(run, "metrics.jsonl")
    check_tokens(log, algorithm, samples)
    assert log["header"]["hparams"]["entropy_floor"] == hapo.ENTROPY_FLOOR
    for entry, row in zip(log["entries"], metrics):
        found = entry["metrics"]
        for name in ("reward", "grad_norm", "entropy", "pivot", "response_length"):
            assert found[name] == row[name], name
        assert found["learning_rate"] == row["lr"] and found["policy_objective"] == -row["loss"]
    for _, response, t, get in every_token(algorithm, log):
        distance = get("log_entropy") - get("pivot")  # Eq. 6
        scale = get("h_max") if distance > 0 else -get("h_min")
        h, A = get("h"), get("group_advantages")
        assert distance == pytest.approx(h * scale, abs=1e-5)
        found = response["tokens"]["advantages"][t]  # Eq. 10-11
        assert found in (pytest.approx(A, abs=1e-4), pytest.approx(A * (1 + h), abs=1e-4))
        assert get("clip_low") == pytest.approx(get("base_low") * (1 - min(h, 0)), rel=1e-5)
        assert get("clip_high") == pytest.approx(get("base_high") * (1 + max(h, 0)), rel=1e-5)


def test_a_run_of_bupo(opened, monkeypatch):
    """Phase 1 and phase 2 have a log each, and GRPO needs no definition."""
    verdicts(monkeypatch, True, False)
    phases = ["--bupo-layer", "2", "--bupo-steps", "1"]
    run = steps_of(sharpened(opened("--algo", "grpo", *phases, "--lr", "5e-2")))
    names = ("bupo_metrics.json", "bupo.json", "grpo_metrics.json")
    log, algorithm, second = written(run, *names)
    assert [e["step"] for e in log["entries"]] == [1] and log["header"]["hparams"]["layer"] == 2
    assert [e["step"] for e in second["entries"]] == [2]
    assert second["header"]["algorithm"] == "grpo" and "layer" not in second["header"]["hparams"]
    check_tokens(log, algorithm, rows_of(run, "samples.jsonl"))
    assert "internal_entropy" in log["entries"][0]["metrics"]
    ratio = algorithm["cards"][1]["sections"][0]
    assert ratio["id"] == "what" and r"\pi_{\text{layer}}^l" in ratio["katex"]
    for *_, get in every_token(algorithm, log):
        expected = (get("reward") - get("mean_reward")) / (get("std_reward") + 1e-6)
        assert get("advantages") == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("mean", export_unipo.MEANS)
@pytest.mark.parametrize("algo", ["hapo", "dapo"])
@pytest.mark.parametrize("key", ["hapo", "bupo"])
def test_every_definition_has_the_form(key, algo, mean):
    options = dataclasses.replace(Options(), algo=algo, loss_mean=mean)
    algorithm = export_unipo.definition(key, options)
    check_definition(algorithm, f"{key}.json")
    assert "do not show" not in str(algorithm)
    ids = [card["id"] for card in algorithm["cards"]]
    assert ids == [*export_unipo.CARDS][: None if algo == "hapo" else 2]
    tooltips = {term for card in algorithm["cards"] for term in card["terms"]}
    assert algo != "hapo" or export_unipo.TOOLTIPS.keys() | export_unipo.LINKS.keys() <= tooltips
    changed = dataclasses.replace(options, adaptive_clip=False, kl=0.1)
    text = export_unipo.definition(key, changed)["cards"][0]["description"]
    assert "do not show this run's adaptive_clip = False, kl = 0.1." in text


DAMAGE = [  # of a definition
    lambda a: a["bindings"].pop("clip_eps"),
    lambda a: a["bindings"].pop("token_objective"),
    lambda a: a["bindings"]["clipped"].update(compute="clip"),
    lambda a: a["bindings"]["clipped"]["inputs"].pop(),
    lambda a: a["bindings"].update(ratios={"compute": "neg", "inputs": ["unclipped"]}),
    lambda a: a["bindings"].update(reward={"from": "samples.reward"}),
    lambda a: a["cards"].pop(1),
    lambda a: a["cards"].pop(),
    lambda a: a["cards"].append(a["cards"][1]),
    lambda a: a["cards"][0]["terms"]["ratio"].update(toSectionId="why"),
    lambda a: a["cards"][0]["sections"][1].pop("opensCardId") and a["cards"].pop(),
    lambda a: a["cards"][0]["sections"][1]["header"].update(style="bold"),
    lambda a: a["cards"][0]["sections"][1]["termValues"]["clipped"].update(format="decimal:9"),
    lambda a: a["cards"][0]["sections"][1]["termValues"]["clipped"].update(position="left"),
    lambda a: a["cards"][0]["sections"][1]["termValues"].pop("clipped"),
    lambda a: a["cards"][0]["sections"][0].update(katex=r"\frac{1}{2"),
]


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_the_checker_finds_damage(number):
    algorithm = copy.deepcopy(export_unipo.definition("hapo", Options(loss_mean="token")))
    algorithm = json.loads(json.dumps(algorithm))
    check_definition(algorithm, "hapo.json")
    DAMAGE[number](algorithm)
    with pytest.raises((AssertionError, KeyError)):
        check_definition(algorithm, "hapo.json")


def test_bad_input_is_one_line(by_hand, tmp_path, monkeypatch, capsys):
    def refused(folder, *more):
        assert program(monkeypatch, export_unipo.main, "export_unipo.py", folder, *more) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    assert "metrics.jsonl: no such file" in refused(tmp_path / "nothing")
    assert "unrecognized arguments: --fast" in refused(by_hand, "--fast")
    rows = rows_of(by_hand, "samples.jsonl")
    old = [{k: v for k, v in row.items() if k not in ("new_logp", "old_logp")} for row in rows]
    write(by_hand, "samples.jsonl", rows[:3] + old[3:])
    said = refused(by_hand)
    assert "samples.jsonl, step 2: no new_logp, old_logp; an older version" in said
    write(by_hand, "samples.jsonl", rows)
    metrics = rows_of(by_hand, "metrics.jsonl")
    for few in (metrics[:1], metrics[:1] + metrics[3:4]):
        write(by_hand, "metrics.jsonl", few)
        assert "the run has made no step yet" in refused(by_hand)
    write(by_hand, "metrics.jsonl", metrics)
    config = rows_of(by_hand, "config.json")[0]
    write(by_hand, "config.json", [config | {"algo": "dapo", "baseline": "cispo"}])
    assert "a run with --baseline cispo, whose loss is another" in refused(by_hand)
    (by_hand / "config.json").write_text("{", encoding="utf-8")
    assert "config.json: not a run's config.json" in refused(by_hand)
    assert not (by_hand / "unipo").exists()


def test_the_command_writes_where_it_is_told(by_hand, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a" / "b"
    arguments = (by_hand, "--out", out)
    assert program(monkeypatch, export_unipo.main, "export_unipo.py", *arguments) == 0
    assert sorted(path.name for path in out.iterdir()) == ["hapo.json", "hapo_metrics.json"]
    assert capsys.readouterr().out.count(str(out)) == 2 and not (by_hand / "unipo").exists()
