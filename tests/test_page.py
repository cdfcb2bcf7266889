"""The pages: what they hold, that nothing a model writes can leave its place, one line for bad
input. How they look in a browser is checked by experiments/browser.py."""

import json
import math
import re
import shutil

import pytest
import torch
from conftest import ROOT, sharpened, verdicts

import train
from common import renamed
from common.errors import UserError
from run import report
from scripts import page

HOSTILE = ["</script><script>document.title=1</script>", "\u202e\u2028", "\x00\x1b[31m", "\"'&<b>"]


def two_steps(run):
    for step in (1, 2):
        report.record(step, *train.guarded_step(step, run), run)
    run.lock.lock.release()
    return run.out


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("page") / "run"


@pytest.fixture
def a_run(kept, opened, monkeypatch, tmp_path):
    """The folder of two steps of a run, a copy of its own for every test."""
    verdicts(monkeypatch, True, False)
    if not kept.exists():
        shutil.copytree(two_steps(opened()), kept)
    return shutil.copytree(kept, tmp_path / "a_run")


def another(run, folder, **options):
    """The same run, as one of other options."""
    copy = shutil.copytree(run, folder / "other")
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    assert options.keys() < config.keys()
    (copy / "config.json").write_text(json.dumps(config | options), encoding="utf-8")
    return copy


def lines_of(folder, name="samples"):
    text = (folder / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def write_lines(folder, rows, name="samples"):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def data_of(path):
    text = path.read_text(encoding="utf-8")
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    assert not re.search("[<\u2028]", found.group(1))  # what could end the element or a line
    return json.loads(found.group(1))


def test_samples_and_their_page_hold_one_whole_group_and_what_was_made_of_it(a_run):
    rows = lines_of(a_run)
    assert [r["step"] for r in rows] == [1, 1, 2, 2]
    for pair in (rows[:2], rows[2:]):
        assert pair[0]["question"] == pair[1]["question"]
        assert sorted(r["reward"] for r in pair) == [0, 1]
    for r in rows:
        for name in page.TOKENS:
            assert len(r[name]) == len(r["tokens"]), name
        for old, new, ratio in zip(r["old_logp"], r["new_logp"], r["ratio"]):
            assert math.exp(new - old) == pytest.approx(ratio, rel=1e-5)
    assert all(-1 <= x <= 1 for r in rows for x in r["h"])
    # h from what the file and metrics.jsonl hold, by hand: Eq. 6
    stats = lines_of(a_run, "metrics")[0]
    for H, h in zip(rows[0]["entropy"], rows[0]["h"]):
        d = math.log(H) - stats["pivot"]
        scale = stats["h_max"] if d > 0 else abs(stats["h_min"])
        assert d / scale == pytest.approx(h, abs=1e-4)  # a nearly uniform model: scale is small
    # A's temperatures, from the entropies and the statistics of the step before, by hand: Eq. 8
    assert rows[0]["temperature"] == [1.0] * len(rows[0]["tokens"])
    for H, T, logp in zip(*(rows[2][k] for k in ("entropy", "temperature", "sampler_logp"))):
        d = math.log(H) - stats["pivot"]
        h = max(-1, min(1, d / (stats["h_max"] if d > 0 else -stats["h_min"])))
        assert 1 + 0.05 * h == pytest.approx(T, abs=1e-4) and logp < 0
    # the quantiles are those that Eq. 5 takes
    low, pivot, high = (stats["log_entropy_quantiles"][k] for k in (0, 80, 100))
    assert len(stats["log_entropy_quantiles"]) == 101
    by_hand = [low - pivot, pivot, high - pivot]
    assert by_hand == pytest.approx([stats[k] for k in ("h_min", "pivot", "h_max")], abs=2e-6)
    # the update has made a right answer likelier and a wrong one less so, by and large
    mean = {r["reward"]: sum(r["ratio"]) / len(r["ratio"]) for r in rows[:2]}
    assert mean[1] > mean[0]
    path = page.write_page([a_run])
    assert path == a_run / "page.html"
    run = data_of(path)["runs"][0]
    assert [s["step"] for s in run["steps"]] == [1, 2] and len(run["steps"][0]["responses"]) == 2
    assert run["steps"][0]["responses"][0]["tokens"] == rows[0]["tokens"]
    assert run["settings"]["clip_high"] == 0.28 and run["settings"]["adaptive_clip"] is True
    assert run["steps"][0]["stats"]["pivot"] == stats["pivot"] and run["steps"][0]["before"] is None
    assert run["steps"][1]["before"]["quantiles"] == stats["log_entropy_quantiles"]
    entropy = stats["entropy"]
    assert run["curves"]["entropy"][0][1] == pytest.approx(entropy, rel=1e-3)


def test_a_close_up_by_hand(opened, monkeypatch):
    """Ratio, redistributed advantage and clipping of the group shown, from the new weights."""
    verdicts(monkeypatch, True, True, True, False, False, False, True, True)
    run = opened("--lr", "3e-2", "--updates-per-rollout", "2")
    step = train.train_step(1, run)
    shown = train.inspect_group(step, run)
    assert shown["rows"] == slice(2, 4)  # the only mixed group
    # its update had the first half of the responses
    assert shown["update_tokens"] == int(step.batch.rollout.lengths[:4].sum())
    assert shown["update_responses"] == 4
    parts = [slice(0, 8)]
    logp = run.engine.batch_logprobs(run.policy, step.batch.rollout, parts, None).logp
    ratio = (logp - step.batch.old.logp).exp()[[2, 3]]
    assert (ratio - shown["ratio"]).abs().max() < 1e-4
    h, mask = step.batch.h[[2, 3]], step.batch.rollout.mask[[2, 3]]
    low = 0.2 * (1 - h.clamp(max=0))
    fell = mask & (ratio < 1 - low) & (shown["advantage"] < 0)
    assert fell.any() and bool((shown["clipped"][fell] == -1).all())


def test_quantiles_of_log_entropies_are_by_nearest_rank(opened):
    run = sharpened(opened())
    batch = train.train_step(1, run).batch
    batch.rollout.mask[:] = False
    batch.rollout.mask[0, :4] = True  # four tokens: ranks 0, 0.99, 1.5 and 3 are 0, 1, 2 and 3
    batch.full.entropy[0, :4] = torch.tensor([4.0, 1.0, 3.0, 2.0])
    quantiles = report.signal_metrics(batch, None, run)["log_entropy_quantiles"]
    found = [quantiles[k] for k in (0, 33, 50, 100)]
    assert found == pytest.approx([math.log(x) for x in (1, 2, 3, 4)])


def test_hostile_texts_stay_data(a_run):
    rows = lines_of(a_run)
    for row, text in zip(rows, HOSTILE):
        row["tokens"][0] = row["question"] = row["reference_answer"] = text
    write_lines(a_run, rows)
    written = page.write_page([a_run])
    text = written.read_text(encoding="utf-8")
    assert text.count("</script>") == 5
    assert "document.title" not in text.replace("script\\u003edocument.title", "")
    assert not re.search("[\u202e\u2028\x00\x1b]", text)
    steps = data_of(written)["runs"][0]["steps"]
    assert [r["tokens"][0] for step in steps for r in step["responses"]] == HOSTILE
    assert [step["reference_answer"] for step in steps] == [HOSTILE[0], HOSTILE[2]]
    # no request leaves it, and its code writes no markup
    assert "default-src 'none'" in text
    assert not re.search(r"(src|href)=|@import|https?://(?!www.w3)", text)
    assert not re.search("innerHTML|outerHTML|insertAdjacent|document.write|eval\\(", text)


def test_a_long_run_is_thinned_out_until_it_fits(a_run, monkeypatch):
    rows = lines_of(a_run)
    write_lines(a_run, [row | {"step": step} for step in range(1, 41) for row in rows[:2]])
    whole = len(page.write_page([a_run]).read_text(encoding="utf-8"))
    monkeypatch.setattr(page, "LARGEST", whole - 10_000)
    path = page.write_page([a_run])
    steps = [s["step"] for s in data_of(path)["runs"][0]["steps"]]
    assert len(path.read_text(encoding="utf-8")) <= page.LARGEST
    assert steps[-1] == 40 and 5 < len(steps) < 40


def test_two_runs_show_the_same_questions_on_a_page_of_their_own(a_run, tmp_path):
    other = another(a_run, tmp_path)
    rows = lines_of(other)
    for row in rows:
        row["question"] += "?" if row["step"] == 2 else ""
    write_lines(other, rows)
    single = page.write_page([a_run])
    before = single.read_text(encoding="utf-8")
    both = page.write_page([a_run, other])
    assert both == a_run / "page-beside-other.html"
    assert single.read_text(encoding="utf-8") == before
    data = data_of(both)
    assert [[s["step"] for s in run["steps"]] for run in data["runs"]] == [[1], [1]]
    assert data["all"] == 2 and len({run["steps"][0]["question"] for run in data["runs"]}) == 1
    write_lines(other, [row | {"question": "new"} for row in rows])
    with pytest.raises(UserError, match="no step shows the same question") as error:
        page.write_page([a_run, other])
    assert "\n" not in str(error.value)


def test_bad_input_is_one_line(a_run, tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl: no such file"):
        page.write_page([tmp_path / "nothing"])
    samples, other = a_run / "samples.jsonl", another(a_run, tmp_path, task="arithmetic")
    with pytest.raises(UserError, match="another task or file"):
        page.write_page([a_run, other])
    for text, message in (
        ("", "empty; the run has made no step"),
        (samples.read_text(encoding="utf-8")[:-20], "line 4: not JSON"),
        ('{"step": 1, "question": "q", "tokens": []}\n', "of an older version"),
    ):
        samples.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            page.write_page([a_run])
    samples.unlink()
    with pytest.raises(UserError, match="samples.jsonl: no such file"):
        page.write_page([a_run])


def test_two_runs_are_shaded_by_their_own_settings(a_run, tmp_path):
    other = another(a_run, tmp_path, temperature=0.7, tau=0.2)
    settings = [run["settings"] for run in data_of(page.write_page([a_run, other]))["runs"]]
    assert [(s["temperature"], s["tau"]) for s in settings] == [(1.0, 0.05), (0.7, 0.2)]


def test_a_page_and_curves_read_a_run_with_older_names(a_run, tmp_path):
    folder = shutil.copytree(a_run, tmp_path / "old")
    for name, names in (("metrics", renamed.METRICS), ("samples", renamed.SAMPLES)):
        rows = lines_of(folder, name)
        write_lines(folder, [renamed.with_old_names(row, names) for row in rows], name)
    assert "dead_groups" in (folder / "metrics.jsonl").read_text(encoding="utf-8")
    new, old = (data_of(page.write_page([f]))["runs"][0] for f in (a_run, folder))
    assert new["steps"] == old["steps"] and new["curves"] == old["curves"]


def test_the_explorer_is_the_page_of_a_default_run():
    path = ROOT / "docs" / "explorer.html"
    data = data_of(path)
    assert page.fill("run.html", data) == path.read_text(encoding="utf-8")
    (run,) = data["runs"]
    assert run["name"] == "hapo-addition" and len(run["steps"]) == 40
    assert data["lessons"] == "../lessons" and path.stat().st_size <= 1.5e6
