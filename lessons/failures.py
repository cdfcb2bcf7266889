# %% [markdown]
# # When it does not learn: eleven failures, made on purpose
#
# Reinforcement learning often fails without an error. The program prints its lines, and the model
# does not learn, or learns something else. On this page eleven failures are made on purpose, each
# by one changed option or a few changed lines, next to a healthy run of the same seed. For each
# there is the metric that tells it apart, the alarm that the program prints, and what to change.
# [Troubleshooting](../docs/troubleshooting.md) is the table to look things up in.
#
# [One step of HAPO](hapo_step.ipynb) comes first: it explains rewards, advantages, ratios and
# entropies. Unlike the first two lessons, this one runs the project itself: `train.py`, on the
# shipped model, with small batches. All runs together take two to four minutes on two cores.
# Questions in **bold** are worth a guess before you read on.
#
# `python lessons/failures.py collapse` makes one failure alone. The names are those of the alarms.

# %%
import os
import pathlib
import subprocess
import sys

ADDRESS = ""  # of the project, for git clone, on a free notebook


def find_project():
    """The folder that holds assets/tiny-qwen3: around this page, or fetched."""
    page = pathlib.Path(globals().get("__file__", "page")).resolve()
    here = pathlib.Path.cwd()
    around = [*page.parents, here, *here.parents]
    for folder in [*around, here / "project"]:
        if (folder / "assets" / "tiny-qwen3").is_dir():
            return folder
    if not ADDRESS:
        raise SystemExit("no assets/tiny-qwen3 here: start in the project, or set ADDRESS")
    print("fetching the project from", ADDRESS)
    clone = ["git", "clone", "--depth", "1", ADDRESS, "project"]
    subprocess.run(clone, check=True)
    return here / "project"


PROJECT = find_project()
sys.path.insert(0, str(PROJECT))

# %%
import contextlib
import io
import json
import tempfile
import textwrap
from unittest import mock

try:
    import torch
    import transformers
except ImportError as missing:
    raise SystemExit(f"{missing}: pip install torch transformers") from None
if not hasattr(transformers, "Qwen3ForCausalLM"):
    old_version = transformers.__version__
    raise SystemExit(f"transformers {old_version} is too old: pip install -U transformers")
try:
    import matplotlib.pyplot as plt

    plt.rcParams |= {"figure.dpi": 60, "font.size": 9}
except ImportError:
    plt = None
    print("no figures without matplotlib: pip install matplotlib")

import losses
import tasks
import train
from engine import decoding, rows
from run import setup
from run.option_checks import parse

MODEL = str(PROJECT / "assets" / "tiny-qwen3")
SEED = os.environ.get("LESSON_SEED", "1")
FAST = "too-hard too-easy cap sampler loss-mean entropy-formula scoring".split()
SLOW = "collapse length-reward format-reward long-phase-1".split()
CHOSEN = sys.argv[1:] if "__file__" in globals() else []  # a notebook makes all
for name in CHOSEN:
    if name not in FAST + SLOW:
        raise SystemExit(f"no failure {name}; there are {', '.join(FAST + SLOW)}")
FOLDER = tempfile.TemporaryDirectory()
HERE = str(PROJECT) + os.sep  # not printed

# %% [markdown]
# ## 0. The healthy run
#
# Sixteen questions with eight responses each, twice updated: 128 responses per step, for twelve
# steps. `run` starts the trainer with some options and returns what it has written to
# metrics.jsonl and the alarms that it has printed. `patch` changes lines of the program while the
# run lasts. `show` prints one metric of some runs, and `draw` draws it.

# %%
BASE = f"""--model {MODEL} --prompts-per-step 16 --num-generations 8 --updates-per-rollout 2
--max-new-tokens 40 --lr 3e-4 --warmup-steps 3 --eval-every 6 --eval-prompts 128 --save-every 100
--device cpu --seed {SEED}""".split()
ALARMS = {}  # {name of a failure: names of the alarms of its run}


def run(name, *options, steps=12, patch=contextlib.nullcontext):
    """Return (lines of metrics.jsonl, alarms) of a run of train.py with these options."""
    folder = pathlib.Path(FOLDER.name) / name
    command = [*BASE, "--steps", str(steps), "--out", str(folder), *options]
    quiet = contextlib.redirect_stderr(io.StringIO())
    said = contextlib.redirect_stdout(io.StringIO())
    no_files = mock.patch.object(train, "finish", lambda run: None)
    with patch(), no_files, quiet, said as text:
        train.train(parse(command, ""))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    alarms = [x for x in text.getvalue().splitlines() if x.startswith("alarm")]
    return [json.loads(line) for line in lines][1:], alarms


def wanted(name):
    """Return whether to make a failure: all, or those named on the command line."""
    fast = os.environ.get("LESSON_FAST") and name in SLOW
    return name in CHOSEN if CHOSEN else not fast


# %%
def show(failure, metric, **runs):
    """Print a metric of some runs, and the alarms of the run called failing."""
    for name, (metrics, _) in runs.items():
        some = [m for m in metrics if m["step"] in (1, 2, 3, 6, 9, 12, 16, 18, 24)]
        values = "  ".join(f"{m[metric]:.3g}" for m in some)
        correct = "  ".join(f"{m['correct']:.2f}" for m in some)
        print(f"{name:8s} {metric}: {values}   correct: {correct}")
        held_out = [f"{m['eval_accuracy']:.2f}" for m in metrics if "eval_accuracy" in m]
        if len(held_out) > 1:
            print(f"{'':8s} held-out accuracy: {'  '.join(held_out)}")
    alarms = runs["failing"][1]
    ALARMS[failure] = [alarm.split(", ")[1].split(":")[0] for alarm in alarms]
    for alarm in alarms or ["no alarm"]:
        print(textwrap.fill(alarm, 96))


def draw(title, metric, **runs):
    """Draw a metric and the share of correct responses of some runs, over the steps."""
    if not plt:
        return
    fig, pair = plt.subplots(1, 2, figsize=(6.6, 2.0), layout="constrained")
    styles = {"healthy": "k-", "failing": "o-", "remedy": "k--"}
    for name, (metrics, _) in runs.items():
        steps = [m["step"] for m in metrics]
        for axes, key in zip(pair, (metric, "correct")):
            values = [m[key] for m in metrics]
            axes.plot(steps, values, styles[name], label=name, markersize=3)
            axes.set(xlabel="step", title=key)
    pair[0].legend()
    fig.suptitle(title)
    plt.show()


healthy = run("healthy", steps=12 if any(map(wanted, SLOW)) else 3)
show("healthy", "zero_std_groups", failing=healthy)

# %% [markdown]
# The share of correct responses rises, few groups have zero reward variance, and there is no alarm.
# (Here the healthy run takes the place of the failing one.)
#
# ## 1. A task too hard: too-hard
#
# Sums of four digits instead of three. **What is the loss? What is the gradient?**

# %%
if wanted("too-hard"):
    hard = run("hard", "--difficulty", "4", steps=3)
    show("too-hard", "grad_norm", healthy=healthy, failing=hard)
    draw("Too hard: without a correct response there is no gradient", "grad_norm",
         healthy=healthy, failing=hard)  # fmt: skip

# %% [markdown]
# Both are exactly 0. All rewards of a group are equal, so every advantage is 0. The program says so
# before the first step, since it asks for the pass rate. The remedy is a task of which the model
# can do a part: here three digits, which is the healthy run.
#
# ## 2. A task too easy: too-easy
#
# Sums without a carry, sampled at temperature 0.2. **The model is right nearly always. Does it
# learn nothing because there is nothing to learn?**


# %%
@contextlib.contextmanager
def without_carries():
    def draw_problem(random, level):
        pairs = [(x := random.randint(1, 8), random.randint(1, 9 - x)) for _ in range(level)]
        a, b = (int("".join(map(str, digits))) for digits in zip(*pairs))
        return tasks.Problem(f"What is {a} + {b}?", str(a + b), "integer")

    addition = tasks.BUILT_IN["addition"]._replace(draw=draw_problem)
    with mock.patch.dict(tasks.BUILT_IN, addition=addition):
        yield


if wanted("too-easy"):
    easy = run("easy", "--temperature", "0.2", steps=3, patch=without_carries)
    show("too-easy", "zero_std_groups", healthy=healthy, failing=easy)
    draw("Too easy: most groups have no wrong response", "zero_std_groups",
         healthy=healthy, failing=easy)  # fmt: skip

# %% [markdown]
# It does not even learn what is left to learn: a group teaches only if it has both kinds of
# responses. The remedy is a harder task or a higher temperature.
#
# ## 3. A cap that cuts: cap
#
# `--max-new-tokens 4`. A guess of three digits and the end of the response take four tokens, a sum
# above a thousand five, and a worked sum thirty. **What can the model still learn?**

# %%
if wanted("cap"):
    cut = run("cap", "--max-new-tokens", "4", steps=9)
    show("cap", "clipped_ratio", healthy=healthy, failing=cut)
    draw("A cap that cuts: what is not finished is not rewarded", "clipped_ratio",
         healthy=healthy, failing=cut)  # fmt: skip

# %% [markdown]
# To guess small sums. A cut response has no answer and no reward, so working out a sum never pays,
# and the share of correct responses stays where it was. With a cap of twenty tokens the share of
# cut responses falls within some steps, which looks like success: the model gives up the worked
# sums. Look at it in the first steps. The remedy is a larger cap.
#
# ## 4. A learning rate ten times too high: collapse
#
# **Does the entropy fall when the policy collapses?**

# %%
if wanted("collapse"):
    fast = run("fast", "--lr", "3e-3")
    show("collapse", "entropy", healthy=healthy, failing=fast)
    draw("Ten times the learning rate: the model forgets the task", "zero_std_groups",
         healthy=healthy, failing=fast)  # fmt: skip
    print("groups with zero reward variance, of 16:", [m["zero_std_groups"] for m in fast[0]])

# %% [markdown]
# Not here: the healthy run's entropy falls, and that of the collapsed one does not. What tells is
# the share of correct responses, and then the groups: when no response is correct, no group has
# reward variance, and nothing can bring the model back. The remedy is a third or a tenth of the
# learning rate, and a checkpoint from before.
#
# ## 5. A reward that pays length: length-reward
#
# The reward is the number of characters, over 100. **The reward rises. How long until somebody
# notices?**

# %%
REWARDS = pathlib.Path(FOLDER.name) / "rewards.py"
REWARDS.write_text(
    "import re\n"
    "def length(question, answer, text):\n"
    "    return len(text) / 100\n"
    "def bare(question, answer, text):\n"
    "    return float(re.fullmatch('[0-9]{3,4}', text) is not None)\n",
    encoding="utf-8",
)
if wanted("length-reward"):
    longer = run("length", "--reward-function", f"{REWARDS}:length", steps=16)
    show("length-reward", "reward", healthy=healthy, failing=longer)
    draw("A reward that pays length: it rises while fewer responses are correct", "reward",
         healthy=healthy, failing=longer)  # fmt: skip

# %% [markdown]
# Longer responses are the worked ones at first, so even the share of correct responses rises for
# some steps. Then the model finds out that length alone is enough. `correct` in metrics.jsonl is
# graded whatever the reward is: compare the two. The remedy is to pay correct answers.
#
# ## 6. A reward that pays the format alone: format-reward
#
# The reward is 1 for a text that is nothing but a number. **What happens to the worked sums?**

# %%
if wanted("format-reward"):
    bare = run("bare", "--reward-function", f"{REWARDS}:bare")
    show("format-reward", "reward", healthy=healthy, failing=bare)
    draw("A reward for the format: nearly all get it, few are correct", "reward",
         healthy=healthy, failing=bare)  # fmt: skip

# %% [markdown]
# They disappear, since they do not have the format. The reward reaches nearly 1 within some steps,
# sooner than the answers can. Add a reward for the format to one for the answer, and keep it small.
#
# ## 7. BuPO's first phase three times too long: long-phase-1
#
# GRPO with BuPO on layer 3, for 24 steps: six of them in phase 1, or eighteen. **Whose reward is
# it that falls?**

# %%
if wanted("long-phase-1"):
    bupo = "--algo grpo --lr 4e-4 --bupo-layer 3 --bupo-steps".split()
    short_phase = run("bupo-6", *bupo, "6", steps=24)
    long_phase = run("bupo-18", *bupo, "18", steps=24)
    show("long-phase-1", "entropy", healthy=short_phase, failing=long_phase)
    draw("Eighteen steps of phase 1: the full policy forgets", "entropy",
         healthy=short_phase, failing=long_phase)  # fmt: skip

# %% [markdown]
# The full policy's: it writes the responses, and phase 1 trains another one, that of layer 3. The
# weights below layer 3 move, and those above still expect the old ones. The remedy is a short first
# phase, a few steps.
#
# ## 8. Another sampler: sampler
#
# The sampler keeps only the likeliest ids whose probabilities add up to 0.8 (top-p), as the
# defaults of some engines do, and nobody mentions it. **Which ratio does the first update see?**


# %%
@contextlib.contextmanager
def top_p(share=0.8):
    draw_ids = decoding.index_and_shares

    def of_the_likeliest(probs, uniform):
        ordered, order = probs.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        beyond = (before >= share).gather(-1, order.argsort(-1))
        return draw_ids(probs.masked_fill(beyond, 0.0), uniform)

    with mock.patch.object(decoding, "index_and_shares", of_the_likeliest):
        yield


if wanted("sampler"):
    try:
        run("checked", steps=1, patch=top_p)
    except Exception as refused:
        print(textwrap.fill(f"with the self-check: {refused}".replace(HERE, ""), 96))
    nucleus = run("top-p", "--no-self-check", steps=3, patch=top_p)
    show("sampler", "ratio_off_before_update", healthy=healthy, failing=nucleus)
    print("sampler_gap at step 1:", *(f"{x[0][0]['sampler_gap']:.1g}" for x in (healthy, nucleus)))
    draw("Top-p: more responses are correct, and no ratio tells why", "ratio_off_before_update",
         healthy=healthy, failing=nucleus)  # fmt: skip

# %% [markdown]
# Still exactly 1, since the old log-probabilities are not the sampler's: the trainer computes them
# again. So no ratio shows it. Two things do: the self-check, which ends the program, and
# `sampler_gap`, the mean difference of the sampler's log-probability and the trainer's. (With
# mechanism A it is there at step 1 only, since later no token is drawn at exactly the base
# temperature.) Rounding moves log-probabilities up and down, a cut distribution only up.
#
# ## 9. A loss divided by each micro-batch's own tokens: loss-mean
#
# A mini-batch of 64 responses goes through the model in eight micro-batches. Each is averaged over
# its own tokens, and then over the eight. **Is that not the same mean?**


# %%
@contextlib.contextmanager
def own_number_of_tokens():
    mean = losses.masked_mean
    eighth = lambda values, mask, number: mean(values, mask) / 8
    with mock.patch.object(losses, "masked_mean", eighth):
        yield


if wanted("loss-mean"):
    parts = ("--micro-batch", "8")
    eight = run("eight", *parts, steps=3)
    own = run("own", *parts, steps=3, patch=own_number_of_tokens)
    show("loss-mean", "loss", healthy=healthy, remedy=eight, failing=own)
    print("loss_off at step 1:", *(f"{x[0][0]['loss_off']:.1g}" for x in (healthy, eight, own)))
    draw("A mean of means: wrong, and nearly invisible", "loss",
         healthy=healthy, remedy=eight, failing=own)  # fmt: skip

# %% [markdown]
# Only if all have the same number of tokens. A token in a micro-batch of short responses counts
# more. The loss is wrong by some percent, the model still learns, and nobody sees it in a curve.
# The test for it is in the first two lines: one micro-batch or eight must give the same loss. The
# program computes each mini-batch's mean a second time and compares (`loss_off`).
#
# ## 10. The usual entropy formula in bfloat16: entropy-formula
#
# log Z minus the mean logit, rounded to bfloat16. **Can an entropy be 0?**


# %%
@contextlib.contextmanager
def usual_entropy():
    exact = rows.row_scores

    def usual(logits, targets, measure_entropy=True):
        z = logits.to(torch.bfloat16)
        entropy = z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)
        log_p, _, log_z = exact(logits, targets, measure_entropy)
        return log_p, entropy.float(), log_z

    with mock.patch.object(rows, "row_scores", usual):
        yield


if wanted("entropy-formula"):
    noisy = run("noisy", steps=3, patch=usual_entropy)
    show("entropy-formula", "zero_entropies", healthy=healthy, failing=noisy)
    print("h_min at step 1:", *(f"{x[0][0]['h_min']:.1f}" for x in (healthy, noisy)))
    draw("Half of the entropies are 0, and no other curve shows it", "zero_entropies",
         healthy=healthy, failing=noisy)  # fmt: skip
    print("entropies at the floor:", *(f"{x[0][0]['at_floor']:.0%}" for x in (healthy, noisy)))

# %% [markdown]
# Only if one token has all the probability, which no softmax gives. A rounded difference can, and
# here half of them are. Their logarithm means nothing, and the smallest sets the scale of all h
# below 0. So HAPO's mechanisms A, C and D work on noise, while rewards hardly change. The remedy is
# the exact formula, in float32.
#
# ## 11. Dropout left on: scoring
#
# A rate of a tenth in the attention, as some configurations have it. **How large can a ratio be
# before anything has been updated?**


# %%
@contextlib.contextmanager
def dropout(rate=0.1):
    def switch_on(policy):
        for module in policy.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = rate

    with mock.patch.object(setup, "no_dropout", switch_on):
        yield


if wanted("scoring"):
    try:
        run("refused", steps=1, patch=dropout)
    except Exception as refused:
        print(textwrap.fill(f"with the self-check: {refused}".replace(HERE, ""), 96))
    random = run("dropout", "--no-self-check", steps=3, patch=dropout)
    show("scoring", "ratio_off_before_update", healthy=healthy, failing=random)
    draw("Dropout: ratios far from 1 before anything has been updated", "ratio_off_before_update",
         healthy=healthy, failing=random)  # fmt: skip

# %% [markdown]
# Any size. Each pass through the model drops other weights, so old and new log-probabilities are
# those of two different models. In the healthy run the difference from 1 is exactly 0. The program
# switches dropout off, and the self-check ends the program if something has left it on.
#
# ## What tells them apart

# %%
for failure, alarms in ALARMS.items():
    print(f"{failure:16s} alarms: {', '.join(alarms) or 'none'}")
FOLDER.cleanup()
