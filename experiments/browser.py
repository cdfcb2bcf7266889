"""Open the pages of a run and of a model in a real browser: python experiments/browser.py RUN

Needs Chromium. Hostile texts are put into a copy of the run, its page is opened headless, wide and
narrow, light and dark, walked through by keyboard, every control is pressed, and what was rendered
is checked. The numbers that the page computes are compared with the recorded ones, and under
changed settings with those of hapo.py and losses.py. A fault ends the program with 1. Pictures of
the run's own page are left in --out.
"""

import argparse
import html
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import hapo  # noqa: E402
import losses  # noqa: E402
from scripts.page import write_page  # noqa: E402

HOSTILE = [
    "</script><script>document.title='broken out'</script>",
    "<img src=x onerror=\"document.title='broken out'\">",
    "\u202ereversed\u0007",
    "\"'`&amp;",
]
# presses keys, moves the slider, chooses each quantity, and notes what the page then says
DRIVE = """
<script>
const told = {};
const note = (k, v) => { told[k] = v; document.body.dataset.seen = JSON.stringify(told); };
const box = document.querySelector(".tokens"), key = k => box.dispatchEvent(
  new KeyboardEvent("keydown", {key: k, bubbles: true, cancelable: true}));
box.focus(); key("ArrowRight"); note("second", document.querySelector(".token.here").dataset.i);
note("detail", document.getElementById("detail").textContent);
key("End"); note("last", +document.querySelector(".token.here").dataset.i
  === box.querySelectorAll(".token").length - 1);
const q = document.getElementById("quantity"), shades = new Set();
for (const o of q.options) { q.value = o.value; q.dispatchEvent(new Event("change"));
  shades.add([...document.querySelectorAll(".token")].map(t => t.style.background).join()); }
note("shadings", shades.size); note("quantities", q.options.length);
// the page's arithmetic against what the run has recorded
let off = 0, offT = 0, shown = 0, other = 0;
for (const run of runs) for (const g of run.steps) {
  const c = contextOf(g, run);
  computeGroup(c).flat().forEach(v => {
    const a = g.responses[v.k], near = (x, y) => {
      if (x === null || y === undefined || y === null) return;
      shown += 1; off = Math.max(off, Math.abs(x - y) / Math.max(1, Math.abs(y))); };
    near(v.h, a.h && a.h[v.i]); near(v.ratio, a.ratio && a.ratio[v.i]);
    near(v.low, a.clip_low && a.clip_low[v.i]); near(v.high, a.clip_high && a.clip_high[v.i]);
    near(v.redistributed, a.advantage && a.advantage[v.i]);
    near(v.stopped, a.clipped && a.clipped[v.i]);
    const T = c.s.A && c.knowsA ? temperature(v.x, v.before, c.s) : a.temperature[v.i];
    offT = Math.max(offT, Math.abs(T - a.temperature[v.i]));
    other += v.other.length;
  });
}
note("other", other); note("compared", shown); note("off", off); note("offT", offT);
document.querySelector(".token").click();
note("lines", document.querySelectorAll("#panels tr").length - 1);
const values = [...document.querySelectorAll("#panels .value")].map(x => x.textContent);
note("values", values.filter(x => x !== "\u2013").length);
note("formulas", document.querySelectorAll("#panels math").length);
note("told", document.querySelectorAll("#panels .told li").length);
const stages = [];  // the walk: its title and the lines of the panel at each stage
document.getElementById("walk").open = document.getElementById("what-if").open = true;
for (let i = 0; i < 7; i++) { document.getElementById("next").click();
  stages.push([document.getElementById("stage").textContent,
    document.querySelectorAll("#panels tr").length - 1]); }
note("stages", stages);
document.getElementById("back").click();
note("back", document.getElementById("stage").textContent); document.getElementById("next").click();
note("link", document.querySelector("#told a").getAttribute("href"));
note("unlabelled", [...document.querySelectorAll("input,select,button")].filter(
  x => !(x.labels && x.labels.length) && !x.textContent).length);
note("roles", ["listbox", "option", "status", "group"].filter(
  role => document.querySelector(`[role=${role}]`)).length);
const s = document.getElementById("step"); s.value = s.max; s.dispatchEvent(new Event("input"));
note("step", document.getElementById("number").textContent);
note("wide", document.documentElement.scrollWidth <= innerWidth);
</script>
"""


def chromium(*arguments, real_time=False):
    """What headless Chromium prints; its own profile, no network."""
    name = shutil.which("chromium") or shutil.which("google-chrome")
    if name is None:
        sys.exit("experiments/browser.py: needs Chromium; apt-get install chromium")
    with tempfile.TemporaryDirectory() as profile:
        quiet = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
            "--disable-background-networking --disable-component-update --disable-sync "
            "--enable-logging=stderr"
        ).split()
        quiet += [] if real_time else ["--virtual-time-budget=4000"]
        command = [name, *quiet, f"--user-data-dir={profile}", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, encoding="utf-8"
        )


def rendered(path, size="1200,1400", real_time=False):
    """(DOM after the scripts have run, messages of the page's console, seconds)"""
    started = time.perf_counter()
    done = chromium(f"--window-size={size}", "--dump-dom", path.as_uri(), real_time=real_time)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console, time.perf_counter() - started


def spoil(run, folder):
    """A copy of the run's files, hostile texts in the first tokens and questions of every step."""
    copy = pathlib.Path(folder) / "hostile"
    copy.mkdir()
    for name in ("metrics.jsonl", "config.json"):
        shutil.copy(run / name, copy)
    rows = [json.loads(line) for line in open(run / "samples.jsonl", encoding="utf-8")]
    for i, row in enumerate(rows):
        row["tokens"][0], row["question"] = HOSTILE[i % 4], HOSTILE[row["step"] % 4]
    (copy / "samples.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    return copy, rows


def check(name, condition):
    print(f"{'ok   ' if condition else 'FAULT'} {name}", flush=True)
    check.faults += not condition


check.faults = 0


LEGEND = ("reward of the responses", "held out, sampled", "held out, greedy")


def charts_in(dom):
    return dom.count('<svg viewBox="0 0 340 170"')


def look_at_two(run, folder):
    """The run beside a copy of it: other answers to its questions, one spike, a step missing."""
    other = pathlib.Path(folder) / "other"
    other.mkdir()
    shutil.copy(run / "config.json", other)
    metrics = [json.loads(line) for line in open(run / "metrics.jsonl", encoding="utf-8")]
    metrics[-1]["grad_norm"] = 1e4
    (other / "metrics.jsonl").write_text(
        "".join(json.dumps(m) + "\n" for m in metrics), encoding="utf-8"
    )
    rows = [json.loads(line) for line in open(run / "samples.jsonl", encoding="utf-8")]
    last = rows[-1]["step"]
    for row in rows:
        row["question"] += "?" if row["step"] == last else ""
    (other / "samples.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    page = write_page([run, other], pathlib.Path(folder) / "two.html")
    for size in ("1200,1400", "400,800"):
        driven = page.with_name("two-driven.html")
        driven.write_text(
            page.read_text(encoding="utf-8").replace("</body>", DRIVE_TWO + "</body>"),
            encoding="utf-8",
        )
        dom, console, _ = rendered(driven, size)
        told = json.loads(html.unescape(re.search(r'data-seen="(.*?)"', dom).group(1)))
        check(f"two, {size}: both responses to one question", told["sections"] == 2 and not console)
        check(f"two, {size}: a step without a common question is left out", told["step"] < last)
        check(f"two, {size}: a spike does not flatten its chart", told["spikes"] == 1)
        check(f"two, {size}: six accuracies in the legend", told["legend"] == 6)
        check(f"two, {size}: a click opens the panels of both", told["panels"] == 2)
        check(f"two, {size}: nothing sticks out sideways", told["wide"])


# changes of the settings, made with the controls; the page tells what it computes with each
CHANGES = [
    {},
    {"algo": "grpo"},
    {"algo": "dapo"},
    {"algo": "hapo", "tau": 0.1},
    {"adaptive_temperature": False},
    {"token_group_average": False},
    {"advantage_redistribution": False},
    {"adaptive_clip": False},
    {"tau": 0.3},
    {"rho": 0.5},
    {"clip_low": 0.02},
    {"clip_high": 0.03},
    {"released": True},
    {"released": True, "rho": 0.95, "tau": 0.2, "clip_low": 0.1, "adaptive_clip": False},
]
NUMBERS = "T h A redistributed low high objective loss stopped".split()
DRIVE_WHAT_IF = """
<script>
const found = [], told = {};
const press = (name, value) => { const x = document.getElementById("set-" + name);
  if (x.type === "checkbox") { if (x.checked !== value) x.click(); return; }
  x.value = value; x.dispatchEvent(new Event(x.tagName === "SELECT" ? "change" : "input")); };
const s = document.getElementById("step"); s.value = STEP; s.dispatchEvent(new Event("input"));
document.querySelectorAll(".token")[3].click();
for (const changed of CHANGES) {
  document.getElementById("reset").click();
  for (const [name, value] of Object.entries(changed)) press(name, value);
  const row = name => views[0].values.map(r => r.map(v => v[name]));
  found.push({values: Object.fromEntries(NUMBERS.map(name => [name, row(name)])),
    counted: document.getElementById("consequences").textContent,
    columns: document.querySelectorAll("#panels th[scope=col]").length,
    marked: document.querySelectorAll("#panels .changed").length,
    underlined: document.querySelectorAll(".token.other").length});
}
const shades = () => [...document.querySelectorAll(".token")].map(t => t.style.background).join();
const plain = shades(); document.getElementById("difference").click();
told.differenceShades = shades() !== plain;
const times = [];  // a drag of rho, with the layout that follows
for (const value of [0.3, 0.6, 0.7, 0.9]) { const start = performance.now();
  press("rho", value); document.body.offsetHeight; times.push(performance.now() - start); }
told.milliseconds = times.sort((a, b) => a - b)[2];
told.tokens = document.querySelectorAll(".token").length;
told.group = views[0].group; told.settings = runs[0].settings; told.found = found;
document.body.dataset.seen = JSON.stringify(told);
</script>
"""


def batch_stats(batch, s, settings):
    """Return the recorded statistics of a batch, or those of its quantiles with another rho."""
    names = ("pivot", "sigma", "h_max", "h_min")
    recorded = [float("nan") if batch[name] is None else batch[name] for name in names]
    pivot, sigma, h_max, h_min = torch.tensor(recorded, dtype=torch.float64)
    if s["rho"] != settings["rho"] or batch["pivot"] is None:
        quantiles = torch.tensor(batch["quantiles"], dtype=torch.float64)
        pivot = quantiles[round(100 * s["rho"])]
        h_max, h_min = quantiles[-1] - pivot, quantiles[0] - pivot
        h_max, h_min = h_max.clamp_min(1e-8), h_min.clamp_max(-1e-8)
    return hapo.EntropyStats(pivot, sigma, h_max, h_min)


def expected(group, settings, changed):
    """Return what hapo.py and losses.py compute for a group with changed settings, {name: rows}."""
    s = {**settings, **changed}
    if s["algo"] != settings["algo"]:
        grpo = s["algo"] == "grpo"
        s |= {"clip_high": 0.2 if grpo else 0.28, "loss_mean": "sequence" if grpo else "token"}
    rows, on = group["responses"], s["algo"] == "hapo"
    lengths = [len(row["tokens"]) for row in rows]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

    def column(name):
        padded = [row[name] + [0.0] * (max(lengths) - len(row[name])) for row in rows]
        return torch.tensor(padded, dtype=torch.float64)

    entropy, released, G = column("entropy"), s["released"], len(rows)
    rewards = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
    T = torch.full_like(entropy, s["temperature"])
    if on and s["adaptive_temperature"]:
        before = batch_stats(group["before"], s, settings) if group["before"] else None
        form = s["temperature_form"]
        T = hapo.adaptive_temperature(entropy, before, s["temperature"], s["tau"], form, released)
    h = hapo.modulation(entropy, batch_stats(group["stats"], s, settings), mask, released)
    A = losses.grpo_advantages(rewards, G)[:, None] * mask
    if on and s["token_group_average"]:
        A = hapo.token_group_advantages(rewards, mask, G, released)
    base = (s["clip_low"], s["clip_high"])
    low, high = (torch.full_like(h, bound) for bound in base)
    if on and s["adaptive_clip"]:
        low, high = hapo.adaptive_clip(h, *base)
    logp = column("new_logp").requires_grad_()
    ratio, redistributed = losses.likelihood_ratio(logp, column("old_logp")), A
    if on and s["advantage_redistribution"]:
        zone = (low, high) if released and s["adaptive_clip"] else base
        redistributed = hapo.redistribute_advantages(A, h, ratio, *zone, released)
    loss = losses.clipped_surrogate(ratio, redistributed, low, high)
    (gradient,) = torch.autograd.grad(loss[mask].sum(), logp)
    stopped = redistributed.sign() * ((gradient == 0) & (redistributed != 0))
    if s["loss_mean"] == "token":
        weight = 1 / rows[0]["update_tokens"]
    else:
        weight = (1 / torch.tensor(lengths) / rows[0]["update_responses"])[:, None]
    found = (T, h, A, redistributed, low, high, -loss.detach(), loss.detach() * weight, stopped)
    cut = [[row[:n].tolist() for row, n in zip(x, lengths)] for x in found]
    return dict(zip(NUMBERS, cut))


def largest_difference(found, wanted):
    """Return the largest relative difference of two {name: rows of numbers}; None is infinite."""
    worst = 0.0
    for name in NUMBERS:
        for row, want in zip(found[name], wanted[name], strict=True):
            for x, y in zip(row, want, strict=True):
                off = float("inf") if x is None else abs(x - y) / max(abs(y), 1e-3)
                worst = max(worst, off)
    return worst


def look_at_what_if(run, folder):
    """Every control, and the page's numbers under changed settings against Python's."""
    page = write_page([run], pathlib.Path(folder) / "what-if.html")
    told = driven_what_if(page, 5, folder)
    for changed, page_says in zip(CHANGES, told["found"], strict=True):
        wanted = expected(told["group"], told["settings"], changed)
        off = largest_difference(page_says["values"], wanted)
        check(f"what if {changed}: as Python (off by {off:.1e})", off < 1e-6)
        same = page_says["columns"] == 4 and not page_says["underlined"]
        marked = page_says["columns"] == 5 and "tokens change" in page_says["counted"]
        check(f"what if {changed}: differences are marked", marked if changed else same)
    check("what if: tokens are shaded by the change", told["differenceShades"])
    milliseconds = told["milliseconds"]
    check(f"a drag of rho: {milliseconds:.0f} ms, {told['tokens']} tokens", milliseconds <= 50)
    long = pathlib.Path(folder) / "long"
    long.mkdir()
    for name in ("metrics.jsonl", "config.json"):
        shutil.copy(run / name, long)
    rows = [json.loads(line) for line in open(run / "samples.jsonl", encoding="utf-8")]
    second = [row for row in rows if row["step"] == 2]
    with open(long / "samples.jsonl", "w", encoding="utf-8") as file:
        for row in second * 2:
            file.write(json.dumps({k: stretched(x, 1000) for k, x in row.items()}) + "\n")
    told = driven_what_if(write_page([long], long / "page.html"), 0, folder)
    milliseconds = told["milliseconds"]
    check(f"a drag of rho: {milliseconds:.0f} ms, {told['tokens']} tokens", milliseconds <= 300)


def look_at_old(run, folder):
    """A run of before the page computed: it opens with what its files hold."""
    old = pathlib.Path(folder) / "old"
    old.mkdir()
    shutil.copy(run / "config.json", old)
    lost = "sampler_logp old_logp new_logp update_tokens update_responses log_entropy_quantiles"
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = [json.loads(line) for line in open(run / name, encoding="utf-8")]
        rows = [{k: x for k, x in row.items() if k not in lost.split()} for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (old / name).write_text(text, encoding="utf-8")
    page = write_page([old])
    driven = page.with_name("driven.html")
    text = page.read_text(encoding="utf-8").replace("</body>", DRIVE_OLD + "</body>")
    driven.write_text(text, encoding="utf-8")
    dom, console, _ = rendered(driven)
    told = json.loads(html.unescape(re.search(r'data-seen="(.*?)"', dom, re.S).group(1)))
    check("old: one line says what is missing", told["missing"].count("was made before") == 1)
    check("old: log-probabilities are called missing, h is there", told["lacks"] > 5 and told["h"])
    check("old: no message on the console", not console)


DRIVE_OLD = """
<script>
document.querySelectorAll(".token")[3].click();
const rows = [...document.querySelectorAll("#panels tr")].map(r => r.textContent);
document.body.dataset.seen = JSON.stringify({
  missing: document.getElementById("missing").textContent,
  lacks: rows.filter(r => r.includes(MISSING)).length,
  h: rows.some(r => /^h \\(Eq. 6\\).*\\d$/.test(r))});
</script>
"""


def stretched(value, length):
    """Return a list repeated up to `length` items; other values unchanged."""
    if not isinstance(value, list):
        return value
    return (value * (length // len(value) + 1))[:length]


def driven_what_if(page, step, folder):
    """Return what DRIVE_WHAT_IF has noted of a page at its step of this number."""
    constants = f"<script>const STEP = {step}, CHANGES = {json.dumps(CHANGES)}, "
    constants += f"NUMBERS = {json.dumps(NUMBERS)};</script>"
    driven = pathlib.Path(folder) / "what-if-driven.html"
    text = page.read_text(encoding="utf-8").replace(
        "</body>", constants + DRIVE_WHAT_IF + "</body>"
    )
    driven.write_text(text, encoding="utf-8")
    dom, console, _ = rendered(driven, real_time=True)
    check("what if: no message on the console", not console)
    return json.loads(html.unescape(re.search(r'data-seen="(.*?)"', dom, re.S).group(1)))


DRIVE_TWO = """
<script>
const told = {};
const s = document.getElementById("step"); s.value = s.max; s.dispatchEvent(new Event("input"));
told.step = +document.getElementById("number").textContent;
told.sections = document.querySelectorAll("#groups > section").length;
told.spikes = document.querySelectorAll(".spikes").length;
told.legend = document.querySelector("#charts figure").querySelectorAll(".key > span").length;
document.querySelectorAll(".token")[2].click();
told.panels = document.querySelectorAll("#panels > section").length;
told.wide = document.documentElement.scrollWidth <= innerWidth;
document.body.dataset.seen = JSON.stringify(told);
</script>
"""


def look_at_run(run, folder):
    copy, rows = spoil(run, folder)
    page = write_page([copy])
    dom, console, seconds = rendered(page)
    first = [row for row in rows if row["step"] == rows[0]["step"]]
    tokens = re.findall(r'<span class="token[^>]*>(.*?)</span>', dom, re.S)
    check("the page draws itself", 'data-drawn="yes"' in dom)
    check("no message on its console", not console)
    check("every token of the group is there", len(tokens) == sum(len(r["tokens"]) for r in first))
    texts = [html.unescape(t) for t in tokens]
    check("markup is shown as text", HOSTILE[0] in texts and HOSTILE[1] in texts)
    check("direction marks are spelled out", "\\u202ereversed\\u0007" in texts)
    check("nothing has run", "<title>A run, token by token</title>" in dom and "<img" not in dom)
    check("five curves", charts_in(dom) == 5 and dom.count("<polyline") >= 7)
    check("a legend for the three accuracies", all(x in dom for x in LEGEND))
    check(f"opens in {seconds:.1f} s, the browser's start included", seconds < 10)
    for size in ("1200,1400", "400,800"):
        driven = page.with_name("driven.html")
        driven.write_text(
            page.read_text(encoding="utf-8").replace("</body>", DRIVE + "</body>"), encoding="utf-8"
        )
        dom, _, _ = rendered(driven, size)
        told = json.loads(html.unescape(re.search(r'data-seen="(.*?)"', dom).group(1)))
        check(f"{size}: arrow keys walk", told["second"] == "1" and told["last"])
        names = ("entropy", "temperature", "h ", "advantage", "ratio", "clipped")
        check(f"{size}: the detail names all", all(name in told["detail"] for name in names))
        # nothing is clipped in the first step and nothing heated: those two may look alike
        check(
            f"{size}: each quantity has its own shades",
            told["quantities"] == 7 and told["shadings"] >= 6,
        )
        held = told["compared"] > 4 * len(tokens) and told["off"] < 2e-6 and not told["other"]
        check(f"{size}: the panel computes what was recorded (off by {told['off']:.1e})", held)
        # the sampler's own entropies, which T was computed from, are not in the file
        check(f"{size}: and the temperatures (off by {told['offT']:.1e})", told["offT"] < 2e-5)
        full = told["lines"] == told["formulas"] >= 30 and told["values"] >= 30
        check(f"{size}: a click opens {told['lines']} formulas, {told['values']} values", full)
        check(f"{size}: four sentences explain the token", told["told"] >= 4)
        titles, shown = zip(*told["stages"])
        grows = list(shown[:6]) == sorted(set(shown)) and shown[6] == shown[5] == told["lines"]
        walked = grows and titles[0] == "1 policy" and titles[6] == "the whole step"
        check(f"{size}: a walk through six stages, {shown[:6]} lines", walked)
        check(
            f"{size}: back, and a link to the lesson",
            told["back"] == "6 updates" and told["link"].endswith("lessons/hapo_step.ipynb"),
        )
        check(
            f"{size}: every control has a label, roles",
            not told["unlabelled"] and told["roles"] == 4,
        )
        check(f"{size}: the slider reaches the last step", told["step"] == str(rows[-1]["step"]))
        check(f"{size}: nothing sticks out sideways", told["wide"])


DRIVE_MODEL = """
<script>
const told = {};
const note = (k, v) => { told[k] = v; document.body.dataset.seen = JSON.stringify(told); };
const box = document.querySelector("table"), key = k => box.dispatchEvent(
  new KeyboardEvent("keydown", {key: k, bubbles: true, cancelable: true}));
box.focus(); key("ArrowDown"); key("ArrowRight");
const here = document.querySelector(".token.here");
note("column", here.dataset.t); note("below", +here.dataset.l);
note("detail", document.getElementById("detail").textContent);
const shades = new Set();
for (const id of ["kind", "measure"]) for (const o of document.getElementById(id).options) {
  document.getElementById(id).value = o.value;
  document.getElementById(id).dispatchEvent(new Event("change"));
  shades.add([...document.querySelectorAll(".token")].map(t => t.style.background).join()); }
note("shadings", shades.size);
note("wide", document.documentElement.scrollWidth <= innerWidth);
</script>
"""


def look_at_model(model, folder):
    """The page that internals.py writes of a model."""
    out = pathlib.Path(folder) / "internals"
    command = [sys.executable, "internals.py", "--model", model, "--samples", "8", "--out", out]
    subprocess.run([*map(str, command)], cwd=ROOT, check=True, capture_output=True)
    dom, console, _ = rendered(out / "page.html")
    layers = len(
        json.loads((out / "internals.json").read_text(encoding="utf-8"))[str(model)]["attention"]
    )
    check("model: the page draws itself", 'data-drawn="yes"' in dom and not console)
    check("model: two charts", charts_in(dom) == 2)
    menu = re.search(r'<select id="answer">(.*?)</select>', dom, re.S).group(1)
    check("model: the menu shows questions alone", "user" not in menu and "What is" in menu)
    check("model: nothing is called darker", "darker" not in dom)
    check("model: a row a layer", len(re.findall('<th scope="row">', dom)) == layers + 1)
    for size in ("1200,1400", "400,800"):
        driven = out / "driven.html"
        text = (out / "page.html").read_text(encoding="utf-8")
        driven.write_text(text.replace("</body>", DRIVE_MODEL + "</body>"), encoding="utf-8")
        dom, _, _ = rendered(driven, size)
        told = json.loads(html.unescape(re.search(r'data-seen="(.*?)"', dom).group(1)))
        check(f"model {size}: arrows walk", (told["column"], told["below"]) == ("1", layers - 1))
        check(f"model {size}: the detail names all", "KL" in told["detail"])
        check(f"model {size}: each policy and measure has its own shades", told["shadings"] >= 6)
        check(f"model {size}: nothing sticks out sideways", told["wide"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=pathlib.Path, help="folder of a run of HAPO, as the default")
    parser.add_argument("--out", type=pathlib.Path, help="folder for pictures")
    parser.add_argument(
        "--at", default="12.2.1", help="step, response and token on the pictures, default 12.2.1"
    )
    args = parser.parse_args()
    config = json.loads((args.run / "config.json").read_text(encoding="utf-8"))
    if config["algo"] != "hapo":
        sys.exit(f"{args.run}: a run of {config['algo']}; these checks are for a run of HAPO")
    with tempfile.TemporaryDirectory() as folder:
        look_at_run(args.run, folder)
        look_at_two(args.run, folder)
        look_at_what_if(args.run, folder)
        look_at_old(args.run, folder)
        look_at_model((args.run / "final").resolve(), folder)
    page = write_page([args.run]).resolve()
    check(f"{page.stat().st_size / 1e6:.2f} MB are at most 1.5", page.stat().st_size <= 1.5e6)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        looks = {"light": [], "dark": ["--blink-settings=preferredColorScheme=0"]}
        for name, more in looks.items():
            picture = args.out / f"page-{name}.png"
            size = "--window-size=1100,1250"
            chromium(size, f"--screenshot={picture}", *more, f"{page.as_uri()}#{args.at}")
            print(f"{picture}")
    print(f"{check.faults} faults")
    sys.exit(check.faults > 0)


if __name__ == "__main__":
    main()
