"""Reinforcement learning of a causal language model with GRPO, DAPO or HAPO; bottom-up with BuPO.

    python train.py                                             a tiny Qwen3 learns on a laptop
    python train.py --model Qwen/Qwen3-0.6B --data train.jsonl  a real model, a file of questions

Read `train_step` first: six paragraphs, in the order in which things happen, and the functions that
they call, in the same order. HAPO differs from its baseline DAPO in four mechanisms, marked HAPO A
to D: C and D read the h of paragraph 4; A makes one as it draws, by the statistics of the batch
before. BuPO differs at the places marked BuPO 1 to 10, here and elsewhere (grep -rn "# BuPO").

What the two papers do not speak of was chosen when the run opened (run/choices.py) and hangs behind
names, which run/state.py lists: run.rounds (dynamic sampling), run.arms, run.movers and run.rival
(comparisons), run.ranks (processes), run.weights (precisions), run.generate, run.layout and
run.scorer (fast or, with --plain, readable).

A run is a function of its options and its seed: every random draw is seeded by (seed, step). With
the same processor and threads nothing else is random; a GPU may add in another order.

Shapes: P prompts a step, G answers each, B = P G answers, T positions of the longest answer.
"""

import contextlib

import program.threads  # before torch

# isort: split
import torch
from torch import Tensor, nn

import bupo
import hapo
import internals
import losses
from grading.answers import Grade, answer_texts, grade
from program.command import run_main
from program.errors import NonFinite
from program.models import load_config
from run import checkpoint, report
from run.batch import Batch, Pass, Step, Update
from run.ending import finish, give_up
from run.guard import StopRequest
from run.opening import open_run
from run.options import Options, parse
from run.state import Run
from sampling import Rollout, Rows
from scale import memory
from scale.shard import open_ranks

# whose policy: layer l's, counted from 1 ("auto" until step 1 has measured it), or the model's own
Layer = int | str | None

# ---------------------------------------------------------------------------------------- one step


def train_step(step: int, run: Run) -> Step:
    """One batch of answers, from prompts to updated weights."""
    options, clock = run.options, run.clock()

    # 1. Whose policy learns? The model's own (None) or, in BuPO's first phase, layer l's.
    layer = run.schedule(step)  # BuPO 1: the schedule

    # 2. Sample G answers to each prompt from the policy as it is, and grade them right or wrong.
    batch = run.last_batch = run.rounds(collect, step, layer, run)  # once, by default
    run.check_finite(batch.rewards, "a reward")
    clock.lap("generate")
    if run.layer == bupo.AUTO:  # BuPO 3: the boundary layer, measured on the first answers
        run.layer = find_boundary(batch, run)
        layer = run.schedule(step)

    # 3. Score every token under the policy that learns: the ratio's denominator (rollout.logp is at
    # the temperature of each draw). A part: the answers of one update, scored in the very passes
    # that it will make, so that the first one's ratios are exactly 1.
    size = len(batch.texts) // options.updates_per_rollout
    parts = [slice(i, i + size) for i in range(0, len(batch.texts), size)]
    batch.old_logp, batch.trained_entropy = score(run.policy, batch.rollout, parts, layer, run)
    # BuPO 4: phase 1 scores layer l alone; the full policy's entropy was measured while sampling
    batch.entropy = batch.trained_entropy if layer is None else batch.rollout.entropy
    run.check_finite(batch.old_logp + batch.entropy, "an old log-probability or entropy")
    if run.reference is not None and layer is None:  # BuPO 5: no KL to the initial model in phase 1
        batch.ref_logp, _ = score(run.reference, batch.rollout, parts, None, run)

    # 4. One h in [-1, 1] a token, from the statistics of the batch: how sure, how uncertain?
    if "A" in run.mechanisms:  # what the next batch's HAPO A reads: entropies of raw logits
        run.sampler_stats = statistics(batch.rollout.entropy, batch, run)
    if options.algo == "hapo":
        batch.stats = statistics(batch.entropy, batch, run)
        batch.h = hapo.modulation(batch.entropy, batch.stats, batch.loss_mask, options.released)

    # 5. How much better is an answer than the others to its prompt, and how far may ratios go?
    batch.advantages = advantages(batch, run)
    batch.clip_low, batch.clip_high = clip_range(batch, run)
    for arm in run.arms:  # empty, unless something is compared
        arm(batch, run)
    clock.lap("score")

    # 6. Update the policy on each part of the batch in turn.
    prepare_updates(step, run)
    updates = [update(batch, part, layer, run) for part in parts]
    clock.lap("update")
    return Step(step, layer, batch, updates, clock.seconds)


# ------------------------------------------------------------------------------ 2. sample and grade


def collect(step: int, layer: Layer, run: Run, attempt: int = 0) -> Batch:
    """P prompts, G answers to each, and what each answer is paid."""
    options, G = run.options, run.options.answers_per_prompt
    problems, prompts = zip(*run.draw_items())
    temperature = options.temperature
    if "A" in run.mechanisms:  # HAPO A: no longer a number, a function of an entropy
        temperature = lambda entropy: run.temperature(entropy, run.sampler_stats)
    rollout = run.generate(
        run.actor(),
        prompts,
        G,
        options.max_new_tokens,
        run.eos_ids,
        temperature,
        run.vocab_size,
        uniform=run.uniform(step, attempt),
        measure_entropy=layer is not None,  # BuPO 2: h is made of it in phase 1
    )
    texts = answer_texts(rollout.answers(), run.tokenizer)
    grades = [grade(problems[row // G], text) for row, text in enumerate(texts)]
    strict, lenient = torch.tensor(grades, device=rollout.mask.device).unbind(1)
    # the first of equal answers speaks for all: paid differently, say by chance, their gradients
    # would cancel but for rounding, and AdamW makes a whole step of any gradient
    first = [texts.index(text, row // G * G) for row, text in enumerate(texts)]
    right = run.verdict(Grade(strict, lenient), step, attempt)[first]
    rewards = run.pay(right, problems, texts)[first]  # by default 1 if right, else 0
    live = losses.differ(rewards, G)  # a dead group teaches nothing; no length penalty wakes it
    if options.overlong_buffer:
        cap, buffer = options.max_new_tokens, options.overlong_buffer
        rewards = rewards + losses.overlong_penalty(rollout.lengths, cap, buffer)
    return Batch(
        problems=list(problems),
        texts=texts,
        rollout=rollout,
        strict=strict,
        lenient=lenient,
        right=right,
        rewards=rewards,
        live=live,
        in_loss=torch.ones_like(live),
        loss_mask=rollout.mask,
    )


def find_boundary(batch: Batch, run: Run) -> int:
    """--bupo-layer auto: the boundary layer, measured on 64 of the answers."""
    share = 64 // run.ranks.size
    ids, attention, response = batch.rollout.with_response_mask(share)
    answers = (ids, attention, response)
    with run.autocast():
        found = bupo.measure_boundary(
            run.policy,
            *answers,
            run.vocab_size,
            run.ranks,
        )
    report.say_boundary(found, len(ids), run)
    return found.layer


# ---------------------------------------------------------------------------------------- 3. score


@torch.no_grad()
def score(model: nn.Module, rollout: Rollout, parts: list, layer: Layer, run: Run) -> tuple:
    """Log-probability and entropy of every token, (B, T), in the passes that each update, on its
    rows, will make. The initial model's entropy is not needed."""
    logp = torch.zeros_like(rollout.logp)
    entropy = torch.zeros_like(rollout.logp)
    for part in parts:
        for rows in run.passes(rollout, part):
            scores = token_scores(model, rollout, rows, layer, run, model is run.policy)
            logp[rows], entropy[rows] = scores
    run.ranks.reshard(model)
    return logp, entropy


def token_scores(
    model: nn.Module, rollout: Rollout, rows: Rows, layer: Layer, run: Run, measure_entropy: bool
) -> tuple:
    """Log-probability and entropy of some answers at T_base, (rows, T), of layer l's policy or the
    model's own (None), 0 at padding: one function for old, new and reference."""
    mask, temperature = rollout.mask[rows], run.options.temperature
    norm = layer is None or run.options.bupo_norm  # BuPO 6: an internal policy has no final norm
    with run.autocast():
        states, tokens = internals.answer_states(model, rollout, rows, layer, norm, run.layout)
        weight = internals.unembedding(model)[: run.vocab_size]  # the tokenizer's ids alone
        scores = run.scorer(states, weight, tokens, temperature, measure_entropy=measure_entropy)
    blank = torch.zeros_like(rollout.logp[rows])  # filled answer by answer, as the scores come
    logp, entropy = [blank if x is None else blank.masked_scatter(mask, x) for x in scores]
    return logp, entropy.detach()


# ----------------------------------------------------------------------------------- 4. statistics


def statistics(entropy: Tensor, batch: Batch, run: Run) -> hapo.EntropyStats:
    """Of every token of the batch, over all processes; a dead group's are as sure as others."""
    pool = run.ranks.gather(entropy[batch.rollout.mask])
    return hapo.entropy_stats(pool, torch.ones_like(pool), run.options.rho)


# -------------------------------------------------------------------- 5. advantages and clip ranges


def advantages(batch: Batch, run: Run) -> Tensor:
    """(B, T): HAPO's mechanism B, or a group rule, one value an answer; 0 in dead groups."""
    options, G = run.options, run.options.answers_per_prompt
    mask = batch.loss_mask & batch.live[:, None]
    if "B" in run.mechanisms:  # HAPO B
        return hapo.token_group_advantages(batch.rewards, mask, G, options.released)
    rule = losses.GROUP_RULES[options.advantage]
    return rule(batch.rewards, G)[:, None] * mask


def clip_range(batch: Batch, run: Run) -> tuple:
    """How far each token's ratio may fall below 1 and rise above it, (B, T) each."""
    low, high = run.options.clip_low, run.options.clip_high
    if "D" in run.mechanisms:  # HAPO D
        return hapo.adaptive_clip(batch.h, low, high)
    return torch.full_like(batch.entropy, low), torch.full_like(batch.entropy, high)


# --------------------------------------------------------------------------------------- 6. update


def prepare_updates(step: int, run: Run) -> None:
    """The learning rate of this step, and what may move."""
    for mover in run.movers:  # empty, unless something keeps still
        mover(step, run)
    for group in run.weights.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share_of_peak(step, run.options)


def share_of_peak(step: int, options: Options) -> float:
    """Linear warm-up to the peak learning rate, then constant."""
    return min(1.0, step / max(1, options.warmup_steps))


def update(batch: Batch, part: Rows, layer: Layer, run: Run) -> Update:
    """One optimiser step on a part of the batch; no step at all, not even weight decay, where no
    token learns (with a KL all do). The loss is divided by the tokens of the whole update."""
    mask = batch.loss_mask[part]
    learns = mask if batch.ref_logp is not None else batch.advantages[part] != 0
    sums = (mask.sum(), batch.in_loss[part].sum(), learns.any())
    tokens, answers, learning = run.ranks.total(*sums)
    if not learning:
        return Update()
    rule = run.rival or policy_loss  # a rival: of a comparison
    total, passes = 0.0, []
    for rows in run.passes(batch.rollout, part):
        logp, _ = token_scores(run.policy, batch.rollout, rows, layer, run, measure_entropy=False)
        per_token, ratio, advantage = rule(logp, batch, rows, run)
        loss = run.mean_loss(per_token, batch.loss_mask[rows], tokens, answers)
        run.weights.backward(loss)
        total = total + loss.detach()
        passes.append(Pass(rows, logp.detach(), ratio.detach(), advantage))
    (total,) = run.ranks.total(total)
    outcome, grad_norm = run.weights.step(total)
    return Update(outcome, total, grad_norm, passes)


def policy_loss(logp: Tensor, batch: Batch, rows: Rows, run: Run) -> tuple:
    """The loss of some answers, one value a token; its ratio; the advantage that was used."""
    options, ratio = run.options, token_ratio(logp, batch, rows)
    advantage = advantage_at(ratio, batch, rows, run)
    low, high = batch.clip_low[rows], batch.clip_high[rows]
    loss = losses.clipped_surrogate(ratio, advantage, low, high, options.dual_clip or None)
    if batch.weight is not None:
        loss = loss * batch.weight[rows]
    if batch.ref_logp is not None:
        loss = loss + options.kl * losses.kl_k3(logp, batch.ref_logp[rows])
    return loss, ratio, advantage


def token_ratio(logp: Tensor, batch: Batch, rows: Rows) -> Tensor:
    """How much likelier each token has become under the policy that learns, (rows, T)."""
    return losses.likelihood_ratio(logp, batch.old_logp[rows])


def advantage_at(ratio: Tensor, batch: Batch, rows: Rows, run: Run) -> Tensor:
    """The advantage of each token at its current ratio, (rows, T)."""
    options, advantage = run.options, batch.advantages[rows]
    if "C" in run.mechanisms:  # HAPO C
        low, high = options.clip_low, options.clip_high
        if options.released:
            low, high = batch.clip_low[rows], batch.clip_high[rows]
        h = batch.h[rows]
        return hapo.redistribute_advantages(advantage, h, ratio, low, high, options.released)
    return advantage


# ----------------------------------------------------------------------------------------- the run


def train(options: Options) -> None:
    """Set a run up (or pick it up where it stopped), take its steps, leave its files."""
    ranks = open_ranks(options.device)
    say = print if ranks.main else str
    program.threads.use_threads(options.threads, say)
    run, step = open_run(options, ranks)
    lock = run.lock or contextlib.nullcontext()
    with lock, StopRequest(run.say) as stop:
        if step is None:
            report.first_look(run)
            step = 0
            checkpoint.save(run, step)
        stopped = False
        while step < options.steps and not stopped:
            step += 1
            metrics, bad = guarded_step(step, run)
            report.record(step, metrics, bad, run)
            bad_steps = run.guard.bad_in_a_row
            last = step == options.steps
            if bad and (last or bad_steps >= options.max_bad_steps):
                give_up(run, step)
            stopped = run.ranks.any(stop.asked)
            due = step % options.save_every == 0
            if not bad and (due or last or stopped):
                checkpoint.save(run, step)
        if step == options.steps:
            finish(run)
        else:
            again = f"python train.py --resume --out {options.out}"
            where = f"stopped after step {step}"
            run.say(f"{where}; go on with: {again}")
    run.ranks.close()


def guarded_step(step: int, run: Run) -> tuple:
    """One step with its evaluation: (metrics, None), or (what there is, why the step is bad)."""
    options = run.options
    due = step % options.eval_every == 0
    last = step == options.steps
    every = options.diagnose_every
    try:
        before = report.weight_sample(run)
        done = train_step(step, run)
        run.check_finite(report.weight_norms(run), "a weight")
        report.say_skipped(done.updates, run)
        metrics = report.step_metrics(done, before, run)
        run.shown = inspect_group(done, run)
        skipped = metrics["skipped_updates"]
        if skipped and not metrics["updates"]:
            return metrics, f"no update applied, {skipped} were not finite"
        if due or last:
            metrics |= report.held_out(run, step)
        if every and step % every == 0:
            metrics |= report.diagnose(run)
        return metrics, None
    except NonFinite as error:
        reason = str(error)
        return {"step": step, "skipped": reason}, reason


def inspect_group(step: Step, run: Run) -> dict:
    """One whole group for samples.jsonl, the most mixed: its rows, and what the step has made of
    every token, (G, T) each; ratios are those after the last update."""
    batch = step.batch
    G = run.options.answers_per_prompt
    right = batch.right.view(-1, G)
    share_right = right.float().mean(1)
    distance = (share_right - 0.5).abs()
    most_mixed = int(distance.argmin())
    first = G * most_mixed
    rows = slice(first, first + G)
    logp, _ = score(run.policy, batch.rollout, [rows], step.layer, run)
    rule = run.rival or policy_loss
    _, ratio, advantage = rule(logp[rows], batch, rows, run)
    lowest = 1 - batch.clip_low[rows]
    highest = 1 + batch.clip_high[rows]
    fell = (ratio < lowest) & (advantage < 0)
    rose = (ratio > highest) & (advantage > 0)
    clipped = rose.int() - fell.int()
    shown = {
        "rows": rows,
        "ratio": ratio,
        "h": None if batch.h is None else batch.h[rows],
        "advantage": advantage,
        "clipped": clipped,
    }
    return {name: value for name, value in shown.items() if value is not None}


def main(argv: list[str] | None = None) -> None:
    options = parse(argv, __doc__)
    if options.estimate:
        config = load_config(options.model)
        print(memory.overview(config, options))
    else:
        train(options)


if __name__ == "__main__":
    run_main(main)
