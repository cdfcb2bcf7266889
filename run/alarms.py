"""Tell failures of a run by its metrics: what went wrong, the likely cause, what to change.

`find_alarms` reads lines of metrics.jsonl. A run asks it after every step (run/report.py), and
scripts/diagnose.py long after a run has ended. Each alarm has a section of its name in
docs/troubleshooting.md and, where it can be made on purpose, a part of lessons/failures.py.

A check takes the history of a run and returns an Alarm or None. Values are means over the
last three steps: a single step of some hundred responses varies too much. Thresholds lie between
the failing and the healthy runs that docs/troubleshooting.md counts.
"""

import collections
import statistics
from collections.abc import Iterable
from typing import NamedTuple

WINDOW = 3  # steps


class Alarm(NamedTuple):
    """A failure that the metrics show."""

    name: str  # section of docs/troubleshooting.md
    step: int
    finding: str  # the metric with its value and its threshold
    cause: str
    remedy: str

    def __str__(self):
        return (
            f"alarm at step {self.step}, {self.name}: {self.finding}. Likely cause: {self.cause}. "
            f"Try: {self.remedy}. See docs/troubleshooting.md#{self.name}"
        )


class History:
    """The steps of a run so far: the last rows, and the means over every WINDOW adjacent ones."""

    NAMES = ("correct", "reward", "clipped_ratio", "response_length")

    def __init__(self, rows: Iterable[dict] = ()):
        self.count, self.last = 0, collections.deque(maxlen=WINDOW)
        self.means = {name: [] for name in self.NAMES}
        for row in rows:
            self.add(row)

    def add(self, row: dict):
        """Add a line of metrics.jsonl; one without the metrics of a step changes nothing."""
        if "reward" not in row or "skipped" in row:
            return
        self.count += 1
        self.last.append({"correct": row["reward"]} | row)  # older runs have the reward alone
        if len(self.last) == WINDOW:
            for name, means in self.means.items():
                values = [old[name] for old in self.last if old.get(name) is not None]
                if len(values) == WINDOW:
                    means.append(sum(values) / WINDOW)

    @property
    def step(self):
        return self.last[-1]["step"]

    def of_step(self, name):
        """Return a metric of the last step, or None."""
        return self.last[-1].get(name)

    def groups(self):
        """Return (groups, those with zero reward variance) of the last steps; (0, 0) if unknown."""
        if any("groups" not in row or "zero_std_groups" not in row for row in self.last):
            return 0, 0
        names = ("groups", "zero_std_groups")
        return tuple(sum(row[name] for row in self.last) for name in names)

    def zero_variance_share(self):
        """Return the share of groups with zero reward variance in the last steps; 0 if unknown."""
        groups, zero = self.groups()
        return zero / groups if groups and len(self.last) == WINDOW else 0.0


def find_alarms(rows: list[dict], own_reward: bool = True) -> list[Alarm]:
    """Return the alarms of a run, each once, in the order of their steps.

    rows: lines of metrics.jsonl. own_reward: whether the reward may be another than the share of
    correct responses (--reward-function).
    """
    history, found = History(), []
    for row in rows:
        history.add(row)
        found += new_alarms(history, {alarm.name for alarm in found}, own_reward)
    return found


def new_alarms(history: History, known: set[str], own_reward: bool = True) -> list[Alarm]:
    """Return the alarms that the last step of a history shows and whose names are not known."""
    found = []
    if not history.count:
        return found
    for check in CHECKS:
        alarm = check(history, known | {alarm.name for alarm in found}, own_reward)
        if alarm and alarm.name not in known:
            found.append(alarm)
    return found


def may_differ(options) -> bool:
    """Return whether a run's reward may be another than the share of correct responses.

    options: run.options.Options. A length penalty alone is known; a reward function, or a reward
    that somebody has edited, is not.
    """
    return bool(options.reward_function) or not options.overlong_buffer


# ------------------------------------------------------------------------------------------ checks


def collapse(history, known, own_reward):
    """The share of correct responses fell to half of its best. In BuPO's phase 1, to 65 %.

    The best of many means is high by chance, and a low one comes in any long run. So the fall must
    be larger than chance allows (five standard deviations if the responses of a group are all
    alike), or nine tenths of at least 30 groups have zero reward variance now.
    """
    shares = history.means["correct"]
    if len(shares) < 2 or max(shares) < 0.1 or "long-phase-1" in known:
        return None
    best, now, internal = max(shares[:-1]), shares[-1], history.of_step("phase") == "internal"
    part, (groups, _) = 0.65 if internal else 0.5, history.groups()
    middle = min(max(0.5, now), best)  # the share between the two whose variance is largest
    chance = 5 * (middle * (1 - middle) / max(groups, 1)) ** 0.5
    no_signal = groups >= 30 and history.zero_variance_share() > 0.9
    if now >= part * best or not (internal or no_signal or best - now > chance):
        return None
    if is_hacked(history, own_reward):
        return None
    finding = (
        f"the share of correct responses is {now:.2f} (mean of {WINDOW} steps), below "
        f"{part * best:.2f}, {part:.0%} of its best"
    )
    if internal:
        cause = (
            f"the policy of layer {history.of_step('layer')} has been trained for too long: the "
            "full policy, which is not trained in phase 1, forgets the task"
        )
        return Alarm("long-phase-1", history.step, finding, cause, "a third of --bupo-steps")
    cause, remedy = "updates are too large", "a third or a tenth of --lr, more --warmup-steps"
    return Alarm("collapse", history.step, finding, cause, remedy)


def no_variance(history, known, own_reward):
    """Most groups have zero reward variance, since all responses are correct or none is."""
    share, correct = history.zero_variance_share(), history.means["correct"]
    if share <= 0.8 or not correct:
        return None
    finding = f"{share:.0%} of the groups have zero reward variance (more than 80 %)"
    if max(correct) < 0.05:
        finding += f", and {correct[-1]:.0%} of the responses are correct"
        remedy = "an easier task or a stronger model; more --num-generations if some are correct"
        return Alarm("too-hard", history.step, finding, "the task is too hard", remedy)
    if correct[-1] > 0.9:
        finding += f", and {correct[-1]:.0%} of the responses are correct"
        cause = "the task is too easy, or has been learned"
        return Alarm("too-easy", history.step, finding, cause, "a harder task, or stop here")
    return None


def length_cap(history, known, own_reward):
    """A fifth of the responses are cut at --max-new-tokens.

    If they were cut from the start, the model may learn to end in time. Then there is an alarm only
    if within six steps the share of correct responses has not risen by half, and by 0.1, or half of
    the way to 1.
    """
    cut, correct = history.means["clipped_ratio"], history.means["correct"]
    if not cut or not correct or cut[-1] <= 0.2:
        return None
    finding = f"{cut[-1]:.0%} of the responses are cut at --max-new-tokens (more than 20 %)"
    if cut[0] > 0.1:
        first = correct[0]
        learns = correct[-1] >= min(max(1.5 * first, first + 0.1), (1 + first) / 2)
        if history.count < 2 * WINDOW or learns:
            return None
        finding += (
            f", and the share of correct responses went from {first:.2f} to {correct[-1]:.2f}"
        )
        cause = "the cap is too small for this task; a cut response is rarely correct"
        return Alarm("cap", history.step, finding, cause, "a larger --max-new-tokens")
    if "collapse" in known:
        return None
    cause = "responses grow without ending: the reward pays length, or updates are too large"
    remedy = "samples.jsonl: read some; then --overlong-buffer, or a lower --lr"
    return Alarm("growing", history.step, finding, cause, remedy)


def is_hacked(history, own_reward):
    """Return whether the reward is at its best while the share of correct responses is not.

    Either the share of correct responses has fallen by a fifth below its best, or the reward has
    gained half of its value, and the share of correct responses less than a fifth of that gain. A
    reward that moves with the share of correct responses (say, 1 and -1) is not hacked.
    """
    rewards, correct = history.means["reward"], history.means["correct"]
    if not own_reward or len(rewards) < 2 or not correct or rewards == correct:
        return False
    if len(rewards) != len(correct) or is_constant(rewards):
        return False
    if not is_constant(correct) and statistics.correlation(rewards, correct) > 0.95:
        return False
    gain, spread = rewards[-1] - rewards[0], max(rewards) - min(rewards)
    if gain <= 0 or max(rewards) - rewards[-1] > 0.1 * spread:
        return False
    fallen = max(correct) - correct[-1] > max(0.05, 0.2 * max(correct))
    gained = gain / max(abs(rewards[0]), abs(rewards[-1]))
    learned = (correct[-1] - correct[0]) / max(correct[0], correct[-1], 1e-9)
    return fallen or (gained >= 0.5 and learned < 0.2 * gained)


def is_constant(values):
    return max(values) == min(values)


def reward_hacking(history, known, own_reward):
    """The reward rises and the share of correct responses does not."""
    if not is_hacked(history, own_reward) or known & {"length-reward", "format-reward"}:
        return None
    correct, lengths = history.means["correct"], history.means["response_length"]
    finding = (
        f"the reward is at its best, {history.means['reward'][-1]:.3g}, and the share of correct "
        f"responses is {correct[-1]:.2f} (it was {max(correct):.2f} at its best; mean of {WINDOW} "
        "steps)"
    )
    remedy = "samples.jsonl: read what earns the reward; then pay correct responses alone"
    same = history.zero_variance_share()  # if all earn the same, length no longer pays
    if lengths and lengths[-1] > 1.5 * lengths[0] and same < 0.5:
        finding += f"; responses have grown from {lengths[0]:.0f} to {lengths[-1]:.0f} tokens"
        cause = "the reward pays length, or something that comes with it"
        return Alarm("length-reward", history.step, finding, cause, remedy)
    cause = "the reward pays something else than a correct answer, for example the format"
    return Alarm("format-reward", history.step, finding, cause, remedy)


def another_sampler(history, known, own_reward):
    """The sampler gives its tokens more probability than the scorer does.

    Rounding changes log-probabilities in both directions, so it shows in sampler_kl, not in their
    mean difference.
    """
    gap = history.of_step("sampler_gap")
    if gap is None or gap <= 0.01:
        return None
    finding = (
        f"sampler_gap is {gap:.2g}: the sampler's log-probabilities are larger than the trainer's "
        "for the same tokens (mean difference, more than 0.01)"
    )
    cause = "the sampler draws from another distribution (top-p, top-k, a penalty, other weights)"
    remedy = "a sampler without such settings; --sampler-correction if it must differ"
    return Alarm("sampler", history.step, finding, cause, remedy)


def wrong_mean(history, known, own_reward):
    """An update's loss is not the mean over its mini-batch."""
    off = history.of_step("loss_off")
    if off is None or off <= 1e-3:
        return None
    finding = (
        f"the loss of an update differs from the mean over its mini-batch by {off:.2g} of the "
        "tokens' mean absolute loss (more than 0.001)"
    )
    cause = "each micro-batch's loss is divided by its own number of tokens"
    remedy = "the mini-batch's number as the normalizer; compare --micro-batch 1 with the default"
    return Alarm("loss-mean", history.step, finding, cause, remedy)


def zero_entropy(history, known, own_reward):
    """Entropies are 0 or negative, so they are differences of rounded numbers.

    At low temperatures true entropies become 0 in float32, too.
    """
    share = history.of_step("zero_entropies")
    if share is None or share <= 0.01 or (history.of_step("temperature") or 1) < 0.5:
        return None
    finding = f"{share:.0%} of the tokens have an entropy of 0 or below (more than 1 %)"
    cause = (
        "entropies are computed as log Z minus the mean logit, or in bfloat16; HAPO's h is noise"
    )
    remedy = "losses.row_logprobs_and_entropy, in float32"
    return Alarm("entropy-formula", history.step, finding, cause, remedy)


def another_scorer(history, known, own_reward):
    """A ratio differs from 1 before the first update."""
    off = history.of_step("ratio_off_before_update")
    if off is None or off <= 1e-3:
        return None
    finding = f"before the first update a ratio differs from 1 by {off:.2g} (more than 0.001)"
    cause = (
        "old and new log-probabilities are computed differently: dropout, other micro-batches, or "
        "another precision"
    )
    remedy = "no dropout; score each mini-batch in the micro-batches of its update"
    return Alarm("scoring", history.step, finding, cause, remedy)


CHECKS = (
    another_scorer,
    another_sampler,
    wrong_mean,
    zero_entropy,
    collapse,
    no_variance,
    length_cap,
    reward_hacking,
)
