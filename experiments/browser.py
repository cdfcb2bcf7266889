"""Open the pages of a run and of a model in a real browser: python experiments/browser.py RUN

Needs Chromium. Hostile texts are put into a copy of the run, its page is opened headless, wide and
narrow, light and dark, walked through by keyboard, and what was rendered is looked at: a fault ends
the program with 1. Pictures of the run's own page are left in --out.
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

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
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
let off = 0, shown = 0, other = 0;  // the panel's arithmetic against what the run has recorded
for (const run of runs) for (const g of run.steps) for (const a of g.answers)
  a.tokens.forEach((t, i) => {
    const v = compute(a, i, g, run), near = (x, y) => {
      if (x === null || y === undefined || y === null) return;
      shown += 1; off = Math.max(off, Math.abs(x - y) / Math.max(1, Math.abs(y))); };
    near(v.h, a.h && a.h[i]); near(v.ratio, a.ratio && a.ratio[i]);
    near(v.low, a.clip_low && a.clip_low[i]); near(v.high, a.clip_high && a.clip_high[i]);
    near(v.A_C, a.advantage && a.advantage[i]); other += v.other;
  });
note("other", other); note("compared", shown); note("off", off);
document.querySelector(".token").click();
note("lines", document.querySelectorAll("#panel tr").length - 1);
const values = [...document.querySelectorAll("#panel .value")].map(x => x.textContent);
note("values", values.filter(x => x !== "\u2013").length);
note("formulas", document.querySelectorAll("#panel math").length);
const s = document.getElementById("step"); s.value = s.max; s.dispatchEvent(new Event("input"));
note("step", document.getElementById("number").textContent);
note("wide", document.documentElement.scrollWidth <= innerWidth);
</script>
"""


def chromium(*arguments):
    """What headless Chromium prints; its own profile, no network."""
    name = shutil.which("chromium") or shutil.which("google-chrome")
    if name is None:
        sys.exit("experiments/browser.py: needs Chromium; apt-get install chromium")
    with tempfile.TemporaryDirectory() as profile:
        quiet = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
            "--disable-background-networking --disable-component-update --disable-sync "
            "--enable-logging=stderr --virtual-time-budget=4000"
        ).split()
        command = [name, *quiet, f"--user-data-dir={profile}", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, encoding="utf-8"
        )


def rendered(path, size="1200,1400"):
    """(DOM after the scripts have run, messages of the page's console, seconds)"""
    started = time.perf_counter()
    done = chromium(f"--window-size={size}", "--dump-dom", path.as_uri())
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


LEGEND = ("reward of the answers", "held out, sampled", "held out, greedy")


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
        check(f"two, {size}: both answers to one question", told["sections"] == 2 and not console)
        check(f"two, {size}: a step without a common question is left out", told["step"] < last)
        check(f"two, {size}: a spike does not flatten its chart", told["spikes"] == 1)
        check(f"two, {size}: six accuracies in the legend", told["legend"] == 6)
        check(f"two, {size}: nothing sticks out sideways", told["wide"])


DRIVE_TWO = """
<script>
const told = {};
const s = document.getElementById("step"); s.value = s.max; s.dispatchEvent(new Event("input"));
told.step = +document.getElementById("number").textContent;
told.sections = document.querySelectorAll("#groups > section").length;
told.spikes = document.querySelectorAll(".spikes").length;
told.legend = document.querySelector("#charts figure").querySelectorAll(".key > span").length;
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
        check(f"{size}: quantities shade anew", told["quantities"] == 6 and told["shadings"] >= 5)
        held = told["compared"] > 4 * len(tokens) and told["off"] < 2e-6 and not told["other"]
        check(f"{size}: the panel computes what was recorded (off by {told['off']:.1e})", held)
        full = told["lines"] == told["formulas"] >= 18 and told["values"] >= 18
        check(f"{size}: a click opens {told['lines']} formulas, {told['values']} values", full)
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
        check(f"model {size}: policies and measures shade anew", told["shadings"] >= 6)
        check(f"model {size}: nothing sticks out sideways", told["wide"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=pathlib.Path, help="folder of a run")
    parser.add_argument("--out", type=pathlib.Path, help="folder for pictures")
    parser.add_argument("--step", type=int, default=1, help="step on the pictures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        look_at_run(args.run, folder)
        look_at_two(args.run, folder)
        look_at_model((args.run / "final").resolve(), folder)
    page = write_page([args.run]).resolve()
    check(f"{page.stat().st_size / 1e6:.1f} MB are at most 3", page.stat().st_size <= 3e6)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        looks = {"light": [], "dark": ["--blink-settings=preferredColorScheme=0"]}
        for name, more in looks.items():
            picture = args.out / f"page-{name}.png"
            size = "--window-size=1100,900"
            chromium(size, f"--screenshot={picture}", *more, f"{page.as_uri()}#{args.step}")
            print(f"{picture}")
    print(f"{check.faults} faults")
    sys.exit(check.faults > 0)


if __name__ == "__main__":
    main()
