"""Look at model and data before the first step: what was found, and what will follow from it."""

import math
import random
import time

from run import report
from run.state import seed_of


def first_look(run):
    """Print and record held-out accuracy and the pass rate on training prompts, before training.

    Return what is wrong, a list of texts.
    """
    options, seed = run.options, seed_of(run.options.seed, "probe")
    metrics = {"step": 0, **report.held_out(run, 0)}
    some = random.Random(seed).sample(
        range(len(run.train_examples)), min(64, len(run.train_examples))
    )
    probe, G = [run.train_examples[i][0] for i in some], options.num_generations
    name = f"pass rate of {len(probe)} prompts"
    started = time.perf_counter()
    groups = report.evaluate_over(run, probe, options.temperature, seed, name, G)
    seconds = (time.perf_counter() - started) / (len(probe) * G)  # per response
    right = [[getattr(response.grade, options.verdict) for response in group] for group in groups]
    rates = [sum(group) / len(group) for group in right]
    rate = sum(map(sum, right)) / sum(map(len, right))
    live = sum(any(group) and not all(group) for group in right) / len(right)
    metrics |= {"pass_rate": rate, "expected_live_groups": live}
    run.say(
        f"before training: held-out {metrics['eval_accuracy']:.3f} sampled, "
        f"{metrics['eval_greedy']:.3f} greedy (strict {metrics['eval_strict']:.3f}, lenient "
        f"{metrics['eval_lenient']:.3f}); {len(probe)} training prompts x {G} responses: "
        f"{rate:.3f} correct; {live:.0%} of the groups have both correct and wrong responses"
    )
    sizes = (f"{share_with_variance(rates, G, g):.0%} with {g}" for g in (2 * G, 4 * G))
    sampling = report.duration(seconds * options.responses_per_step * options.steps)
    template = (
        "the tokenizer's chat template" if run.tokenizer.chat_template else "no chat template"
    )
    run.say(
        f"expected: with --num-generations {G}, {live:.0%} of the groups have reward variance; "
        f"about {', '.join(sizes)}. {1 - metrics['eval_finished']:.0%} of the responses are cut at "
        f"{options.max_new_tokens} tokens. Prompts use {template}. Sampling takes "
        f"{sampling} for {options.steps} steps at this speed and length; scoring and updates come "
        "on top"
    )
    wrong = warnings_of(rate, live, 1 - metrics["eval_finished"], options)
    for text in wrong:
        run.say(f"warning: {text}")
    run.say(
        "note: expect a loss near 0: advantages are centred and ratios start at 1. It can differ "
        "with HAPO's mechanism C, or if correct and wrong responses differ in length. Signs of "
        "learning are a gradient norm above 0, few zero-variance groups, and a rising held-out "
        "accuracy."
    )
    if run.dist.main:
        report.write_lines(run.out / "metrics.jsonl", [metrics])
    return wrong


def share_with_variance(rates, samples, size):
    """Return the expected share of groups of `size` responses that have reward variance.

    rates: each prompt's share of correct responses among `samples`. A beta distribution of the
    prompts' pass rates p is fitted to their mean and variance; a group has variance with the
    probability 1 - E[p^size] - E[(1 - p)^size]. 0 if all rates are 0, or all 1.
    """
    mean = sum(rates) / len(rates)
    if mean in (0, 1):
        return 0.0
    spread = sum((rate - mean) ** 2 for rate in rates) / len(rates) / (mean * (1 - mean))
    # of the spread, 1 / samples is chance: `alike` is the correlation of a prompt's responses
    alike = (spread - 1 / samples) / (1 - 1 / samples) if samples > 1 else 0.5
    alike = min(max(alike, 1e-3), 1 - 1e-3)
    a, b = (share * (1 / alike - 1) for share in (mean, 1 - mean))

    def all_alike(a, b):  # E[p^size] of Beta(a, b)
        terms = (
            math.lgamma(a + size),
            math.lgamma(a + b),
            -math.lgamma(a),
            -math.lgamma(a + b + size),
        )
        return math.exp(sum(terms))

    return 1 - all_alike(a, b) - all_alike(b, a)


def warnings_of(rate, live, cut, options):
    """Return what the first look warns of, a list of texts.

    rate, live, cut: shares of correct responses, of groups with variance, of responses cut.
    """
    found = []
    if not 0.05 <= rate <= 0.95:
        never = rate < 0.05
        found.append(
            f"the model is almost {'never' if never else 'always'} correct on this task. "
            f"Groups that are all {'wrong' if never else 'correct'} have no reward variance, and "
            f"nothing is learned from them ({live:.1%} of the groups have variance). Try "
            f"{'an easier task, a stronger model' if never else 'a harder task'} or more "
            "--num-generations"
        )
    if cut > 0.2:
        found.append(
            f"{cut:.0%} of the responses reach --max-new-tokens {options.max_new_tokens} and are "
            "cut; a cut response is rarely correct"
        )
    return found
