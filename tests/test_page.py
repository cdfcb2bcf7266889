"""The pages: what they hold, that nothing a model writes can leave its place, one line for bad
input. How they look in a browser is checked by experiments/browser.py."""

import json
import re
import shutil

import pytest
from conftest import verdicts

import train
from common.errors import UserError
from run import report
from scripts import page

HOSTILE = ["</script><script>document.title='x'</script>", "\u202eabc", "\x00\x1b[31m", "\"'&<b>"]


@pytest.fixture
def a_run(opened, monkeypatch):
    """A folder with two steps of a run."""
    verdicts(monkeypatch, True, False)
    run = opened()
    for step in (1, 2):
        report.record(step, *train.guarded_step(step, run), run)
    run.lock.lock.release()
    return run


def data_of(path):
    text = path.read_text(encoding="utf-8")
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    return json.loads(found.group(1))


def test_samples_hold_one_whole_group_and_what_was_made_of_it(a_run):
    rows = [json.loads(line) for line in open(a_run.out / "samples.jsonl", encoding="utf-8")]
    assert [r["step"] for r in rows] == [1, 1, 2, 2]
    for pair in (rows[:2], rows[2:]):
        assert pair[0]["question"] == pair[1]["question"]
        assert sorted(r["reward"] for r in pair) == [0, 1]
    for r in rows:
        for name in set(page.TOKENS) - {"sampler_entropy"}:  # of BuPO's first phase
            assert len(r[name]) == len(r["tokens"]), name
    assert all(-1 <= x <= 1 for r in rows for x in r["h"])
    # the update has made a right answer likelier and a wrong one less so, by and large
    mean = {r["reward"]: sum(r["ratio"]) / len(r["ratio"]) for r in rows[:2]}
    assert mean[1] > mean[0]


def test_a_close_up_by_hand(opened, monkeypatch):
    """Ratio, redistributed advantage and clipping of the group shown, from the new weights."""
    verdicts(monkeypatch, True, True, True, False, False, False, True, True)
    run = opened("--lr", "3e-2")
    step = train.train_step(1, run)
    shown = train.inspect_group(step, run)
    assert shown["rows"] == slice(2, 4)  # the only mixed group
    parts = [slice(0, 8)]
    logp = run.engine.batch_logprobs(run.policy, step.batch.rollout, parts, None).logp
    ratio = (logp - step.batch.old.logp).exp()[[2, 3]]
    assert (ratio - shown["ratio"]).abs().max() < 1e-4
    h, mask = step.batch.h[[2, 3]], step.batch.rollout.mask[[2, 3]]
    low = 0.2 * (1 - h.clamp(max=0))
    fell = mask & (ratio < 1 - low) & (shown["advantage"] < 0)
    assert fell.any() and bool((shown["clipped"][fell] == -1).all())


def test_a_page_holds_the_run(a_run):
    path = page.write_page([a_run.out])
    assert path == a_run.out / "page.html"
    run = data_of(path)["runs"][0]
    assert [s["step"] for s in run["steps"]] == [1, 2] and len(run["steps"][0]["answers"]) == 2
    rows = [json.loads(line) for line in open(a_run.out / "samples.jsonl", encoding="utf-8")]
    assert run["steps"][0]["answers"][0]["tokens"] == rows[0]["tokens"]
    assert run["curves"]["entropy"][0][1] == pytest.approx(
        json.loads(open(a_run.out / "metrics.jsonl", encoding="utf-8").readline())["entropy"],
        rel=1e-3,
    )


def test_hostile_texts_stay_data(a_run):
    path = a_run.out / "samples.jsonl"
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    for row, text in zip(rows, HOSTILE):
        row["tokens"][0] = row["question"] = row["truth"] = text
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    written = page.write_page([a_run.out])
    text = written.read_text(encoding="utf-8")
    assert text.count("</script>") == 3 and "document.title" not in text.replace(
        "script\\u003edocument.title", ""
    )
    assert not re.search("[\u202e\x00\x1b]", text)
    answers = [a for s in data_of(written)["runs"][0]["steps"] for a in s["answers"]]
    assert [a["tokens"][0] for a in answers] == HOSTILE
    # no request leaves it, and its code writes no markup
    assert "default-src 'none'" in text and not re.search(
        r"(src|href)=|@import|https?://(?!www.w3)", text
    )
    assert not re.search("innerHTML|outerHTML|insertAdjacent|document.write|eval\\(", text)


def test_a_long_run_is_thinned_out_until_it_fits(a_run, monkeypatch):
    samples = a_run.out / "samples.jsonl"
    rows = [json.loads(line) for line in open(samples, encoding="utf-8")]
    many = [row | {"step": step} for step in range(1, 41) for row in rows[:2]]
    samples.write_text("".join(json.dumps(row) + "\n" for row in many), encoding="utf-8")
    whole = len(page.write_page([a_run.out]).read_text(encoding="utf-8"))
    monkeypatch.setattr(page, "LARGEST", whole - 10_000)
    path = page.write_page([a_run.out])
    steps = [s["step"] for s in data_of(path)["runs"][0]["steps"]]
    assert (
        len(path.read_text(encoding="utf-8")) <= page.LARGEST
        and steps[-1] == 40
        and 5 < len(steps) < 40
    )


def test_two_runs_show_the_same_questions_on_a_page_of_their_own(a_run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("metrics.jsonl", "samples.jsonl", "config.json"):
        (other / name).write_text((a_run.out / name).read_text(encoding="utf-8"), encoding="utf-8")
    samples = other / "samples.jsonl"
    rows = [json.loads(line) for line in open(samples, encoding="utf-8")]
    for row in rows:
        row["question"] += "?" if row["step"] == 2 else ""
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    single = page.write_page([a_run.out])
    before = single.read_text(encoding="utf-8")
    both = page.write_page([a_run.out, other])
    assert (
        both == a_run.out / "page-beside-other.html"
        and single.read_text(encoding="utf-8") == before
    )
    data = data_of(both)
    assert [[s["step"] for s in run["steps"]] for run in data["runs"]] == [[1], [1]]
    assert data["all"] == 2 and len({run["steps"][0]["question"] for run in data["runs"]}) == 1
    samples.write_text(
        "".join(json.dumps(r | {"question": "new"}) + "\n" for r in rows), encoding="utf-8"
    )
    with pytest.raises(UserError, match="no step shows the same question") as error:
        page.write_page([a_run.out, other])
    assert "\n" not in str(error.value)


def test_bad_input_is_one_line(a_run, tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl: no such file"):
        page.write_page([tmp_path / "nothing"])
    samples = a_run.out / "samples.jsonl"
    kept = samples.read_text(encoding="utf-8")
    other = tmp_path / "other"
    other.mkdir()
    for name in ("metrics.jsonl", "samples.jsonl"):
        (other / name).write_text((a_run.out / name).read_text(encoding="utf-8"), encoding="utf-8")
    config = json.loads((a_run.out / "config.json").read_text(encoding="utf-8")) | {
        "task": "arithmetic"
    }
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="another task or file"):
        page.write_page([a_run.out, other])
    samples.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="empty; the run has made no step"):
        page.write_page([a_run.out])
    samples.write_text(kept[:-20], encoding="utf-8")
    with pytest.raises(UserError, match="line 4: not JSON"):
        page.write_page([a_run.out])
    samples.write_text('{"step": 1, "question": "q", "tokens": []}\n', encoding="utf-8")
    with pytest.raises(UserError, match="of an older version"):
        page.write_page([a_run.out])
    samples.unlink()
    with pytest.raises(UserError, match="samples.jsonl: no such file"):
        page.write_page([a_run.out])


def test_two_runs_are_shaded_by_their_own_settings(a_run, opened, monkeypatch):
    verdicts(monkeypatch, True, False)
    other = opened("--temperature", "0.7", "--tau", "0.2")
    for step in (1, 2):
        report.record(step, *train.guarded_step(step, other), other)
    other.lock.lock.release()
    runs = data_of(page.write_page([a_run.out, other.out]))["runs"]
    assert [(run["base"], run["tau"]) for run in runs] == [(1.0, 0.05), (0.7, 0.2)]


def test_a_page_and_curves_read_a_run_with_older_names(a_run, tmp_path):
    from common import renamed

    folder = tmp_path / "old"
    shutil.copytree(a_run.out, folder)
    for name, names in (("metrics", renamed.METRICS), ("samples", renamed.SAMPLES)):
        path = folder / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [json.dumps(renamed.with_old_names(row, names)) + "\n" for row in rows]
        path.write_text("".join(rows), encoding="utf-8")
    assert "dead_groups" in (folder / "metrics.jsonl").read_text(encoding="utf-8")
    new, old = (data_of(page.write_page([f]))["runs"][0] for f in (a_run.out, folder))
    assert new["steps"] == old["steps"] and new["curves"] == old["curves"]
