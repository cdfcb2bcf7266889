"""The lessons compute what train.train_step computes, and their notebooks are the pages, run."""

import ast
import contextlib
import io
import json
import re
import runpy
import shutil
import sys
import types

import pytest
import torch
from conftest import ROOT, TINY

import hapo
import train
from engine.engine import SingleProcess
from run.option_checks import parse
from run.setup import open_run
from tasks import Problem

PAGES = [ROOT / "lessons" / name for name in ("hapo_step.py", "bupo_phase.py")]
FAILURES = ROOT / "lessons" / "failures.py"
MARKED = pytest.mark.parametrize("page", [*PAGES, FAILURES], ids=lambda page: page.stem)
STEP = (
    "--plain --device cpu --prompts-per-step 8 --num-generations 8 --updates-per-rollout 4 "
    "--max-new-tokens 40 --warmup-steps 0 --steps 3 --no-self-check"
).split()


def run_page(page, folder, monkeypatch):
    """(the names a page has in the end, what it printed), run from another folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LESSON_STEPS", "0")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [str(page)])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        names = runpy.run_path(str(page))
    return names, printed.getvalue()


@pytest.fixture(scope="module")
def lessons(tmp_path_factory):
    """{name of the page: its names}; without matplotlib, which draws and computes nothing."""
    folder, found = tmp_path_factory.mktemp("elsewhere"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        patch.setitem(sys.modules, "matplotlib.pyplot", None)
        for page in PAGES:
            found[page.stem], printed = run_page(page, folder, patch)
            assert "no figures without matplotlib: pip install matplotlib" in printed
            assert printed.count("largest difference") >= 3
    return found


def step_of_the_project(page, seed, folder, *more, stats=None):
    """train_step on a page's questions, with its random numbers."""
    options = [*STEP, "--model", str(TINY), "--lr", str(page["LR"]), "--out", str(folder), *more]
    run, _ = open_run(parse(options, ""), SingleProcess("cpu"))
    problems = [Problem(f"What is {a} + {b}?", str(a + b), "integer") for a, b in page["SUMS"]]
    items = list(zip(problems, page["prompts_of"](page["SUMS"]).tolist()))
    random = torch.Generator().manual_seed(seed)
    draws = torch.rand(page["CAP"], 64, generator=random)
    run.next_prompts, run.uniform = lambda: items, lambda step, attempt: draws
    run.sampler_stats = stats
    return train.train_step(1, run)


def assert_same_updates(step, updates):
    assert len(step.updates) == len(updates) == 4
    for done, (loss, norm) in zip(step.updates, updates):
        assert done.loss == pytest.approx(loss, abs=2e-5)
        assert done.grad_norm == pytest.approx(norm, rel=1e-4)


def test_the_step_of_hapo_is_the_projects(lessons, tmp_path):
    page = lessons["hapo_step"]
    quantile, h_max, h_min = page["before"]
    stats = hapo.EntropyStats(quantile, torch.ones(()), h_max, h_min)
    step = step_of_the_project(page, 8, tmp_path / "run", stats=stats)
    batch = step.batch
    assert torch.equal(batch.rollout.tokens, page["tokens"])
    assert torch.equal(batch.rewards, page["R"])
    assert (batch.rollout.temperature - page["T"]).abs().max() < 1e-5
    assert (batch.h - page["h"]).abs().max() < 1e-6
    assert (batch.advantages - page["A"]).abs().max() < 1e-6
    assert_same_updates(step, page["updates"])


def test_the_phase_of_bupo_is_the_projects(lessons, tmp_path):
    page = lessons["bupo_phase"]
    more = "--algo grpo --bupo-layer auto --bupo-steps 2".split()
    step = step_of_the_project(page, 9, tmp_path / "run", *more)
    assert torch.equal(step.batch.rollout.tokens, page["lines"][:, page["S"] :])
    assert torch.equal(step.batch.rewards, page["R"])
    assert step.layer == page["boundary"]
    assert (step.batch.advantages - page["A"][:, None] * page["mask"]).abs().max() < 1e-6
    total = page["total"]
    assert_same_updates(step, [(loss, total(norms)) for loss, norms in page["updates"]])


def test_it_learns(lessons):
    """Four smaller steps than the page's, at twice its learning rate: answers grow."""
    page = lessons["hapo_step"]
    policy, stats, lengths = page["new_model"](), None, []
    optimizer = page["new_optimizer"](policy, lr=4e-4)
    for step in range(1, 5):
        seen, stats = page["one_step"](policy, optimizer, page["some_sums"](4, step), step, stats)
        lengths.append(float(seen["batch"][2].sum(1).float().mean()))
    assert lengths[-1] > 1.5 * lengths[0] and sum(lengths[:2]) < sum(lengths[2:])


def test_each_failure_is_told_by_its_alarm_and_the_healthy_run_by_none(tmp_path, monkeypatch):
    """The faster seven of the eleven; without figures, which compute nothing."""
    monkeypatch.setenv("LESSON_FAST", "1")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    names, printed = run_page(FAILURES, tmp_path, monkeypatch)
    told = dict(names["ALARMS"])
    assert told.pop("healthy") == [] and sorted(told) == sorted(names["FAST"])
    for failure, alarms in told.items():
        assert alarms[0] == failure
    assert printed.count("with the self-check: ") == 2
    # the healthy run and the remedy of loss-mean have the same losses
    losses = [[row["loss"] for row in names[run][0]] for run in ("healthy", "eight", "own")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert abs(losses[0][0] - losses[2][0]) > 1e-4


def test_an_unknown_failure_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [str(FAILURES), "colapse"])
    with pytest.raises(SystemExit, match="no failure colapse; there are too-hard, "):
        runpy.run_path(str(FAILURES))


# ------------------------------------------------------------------------------ pages and notebooks


def cells(page):
    """[(kind, text)] of a page in percent format."""
    found = []
    for part in re.split(r"^# %%", page.read_text(encoding="utf-8"), flags=re.M)[1:]:
        head, _, body = part.partition("\n")
        kind = "markdown" if "[markdown]" in head else "code"
        body = body.strip("\n")
        if kind == "markdown":
            body = re.sub(r"^# ?", "", body, flags=re.M)
        found.append((kind, body))
    return found


def notebook(page):
    return json.loads(page.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]


def outputs(page):
    """[(the cell's source, an output)] of a notebook."""
    cells = notebook(page)
    return [("".join(c["source"]), output) for c in cells for output in c.get("outputs", ())]


@MARKED
def test_a_notebook_is_its_page_and_holds_no_warning_and_no_path_of_its_machine(page):
    stored = [(c["cell_type"], "".join(c["source"])) for c in notebook(page)]
    assert stored == cells(page)
    assert page.with_suffix(".ipynb").stat().st_size <= 300_000
    shown = {source for source, _ in outputs(page)}
    for kind, source in stored:
        if kind == "code" and re.search(r"^print\(|^    plt.show", source, re.M):
            assert source in shown, source
    for _, output in outputs(page):
        assert output["output_type"] != "error"
        text = "".join(output.get("text", ()))
        assert output.get("name") != "stderr", text
        assert not re.search(r"site-packages|/home/|/tmp/|/root/|[A-Z]:\\\\", text), text


def test_there_are_figures_and_each_says_what_to_see():
    figures = [
        source for page in [*PAGES, FAILURES] for source, output in outputs(page)
        if "image/png" in output.get("data", {})
    ]  # fmt: skip
    titles = r"set_title|suptitle|draw\("
    assert len(figures) >= 16 and all(re.search(titles, text) for text in figures)


NOT_MEASURED = re.compile(
    r"Eq\. [\d-]+|arXiv \d+\.\d+|\$\$.*?\$\$|\$.*?\$|`.*?`|^\|.*\|$|^#.*$", re.S | re.M
)


@MARKED
def test_numbers_in_prose_are_printed(page):
    """Every number with a decimal point, and every one of two digits or more."""
    printed = "".join(text for kind, text in cells(page) if kind == "code")
    printed += "".join("".join(output.get("text", ())) for _, output in outputs(page))
    printed = set(re.findall(r"\d+(?:[.,]\d+)*", printed))
    printed |= {f"{float(x):g}" for x in printed if "," not in x}
    allowed = {"150,000"}  # of real vocabularies
    for kind, text in cells(page):
        if kind == "markdown":
            for number in re.findall(r"\d+(?:[.,]\d+)*", NOT_MEASURED.sub(" ", text)):
                small = number.isdigit() and len(number) == 1
                assert small or number in printed | allowed, f"{number}: {text[:60]}"


@MARKED
def test_functions_have_at_most_25_lines(page):
    for node in ast.walk(ast.parse(page.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 25, node.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_nothing_of_the_project_before_the_last_cell(page):
    *before, last = [text for kind, text in cells(page) if kind == "code"]
    ours = {path.stem for path in ROOT.glob("*.py")}
    ours |= {path.parent.name for path in ROOT.glob("*/*.py")}
    for node in (node for text in before for node in ast.walk(ast.parse(text))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not ours & {name.partition(".")[0] for name in names}
    assert "import losses" in last


# ------------------------------------------------------------------------------------- other places


@MARKED
def test_an_old_transformers_ends_with_one_line(page, tmp_path, monkeypatch):
    old = types.ModuleType("transformers")
    old.__version__, old.AutoModelForCausalLM, old.AutoTokenizer = "4.40.0", None, None
    monkeypatch.setitem(sys.modules, "transformers", old)
    with pytest.raises(SystemExit, match="too old: pip install -U transformers"):
        run_page(page, tmp_path, monkeypatch)


def test_alone_it_asks_for_the_address_and_fetches_the_project(tmp_path, monkeypatch):
    page = tmp_path / "alone" / "hapo_step.py"
    page.parent.mkdir()
    shutil.copy(PAGES[0], page)
    with pytest.raises(SystemExit, match="start in the project, or set ADDRESS"):
        run_page(page, page.parent, monkeypatch)
    source = tmp_path / "source"
    shutil.copytree(TINY, source / "assets" / "tiny-qwen3")
    fetched = []

    def clone(command, check):
        fetched.append(command[-2])
        shutil.copytree(source, page.parent / "project")

    monkeypatch.setattr("subprocess.run", clone)
    text = page.read_text(encoding="utf-8")
    text = text.replace('ADDRESS = ""', 'ADDRESS = "https://example.org/it"')
    page.write_text(text.partition("# %%\ntry:")[0], encoding="utf-8")
    names, printed = run_page(page, page.parent, monkeypatch)
    assert fetched == ["https://example.org/it"] and "fetching the project from" in printed
    assert names["PROJECT"] == page.parent / "project"
