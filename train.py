"""Reinforcement learning of a causal language model with GRPO, DAPO or HAPO; bottom-up with BuPO.

    python train.py                                             a tiny Qwen3 learns on a laptop
    python train.py --model Qwen/Qwen3-0.6B --data train.jsonl  a real model, a file of questions

Read `train_step` first, from the prompts to the updated weights. HAPO differs from its baseline
DAPO in four mechanisms, marked HAPO A to D. BuPO differs in the places marked BuPO 1 to 9, here and
elsewhere (grep -rn "# BuPO"). The choices of an experiment are `if`s in the step. The choices that
depend on the machine (precision, memory, processes, the decoder) are methods of the engine.
engine/engine.py has the plain engine, which --plain runs in float32. engine/fast.py has the engine
that runs by default.

A run is a function of its options and its seed: every random draw is seeded by (seed, step). On the
same processor with the same number of threads nothing else is random; a GPU may add numbers in
another order.

Shapes: P prompts per step, G responses to each, B = P G responses, T positions of the longest one.
"""

import contextlib

import common.threads  # before torch
from common.command import run_main
from run.options import Options, check_command_line

if __name__ == "__main__":  # before torch, whose import takes seconds: report mistakes at once
    run_main(check_command_line, None, __doc__)

# isort: split
import torch
from torch import Tensor

import bupo
import hapo
import losses
from common.models import load_config
from engine import memory
from engine.fsdp import open_processes
from problems.grading import grade, response_texts
from run import (
    baselines,
    checkpoint,
    doctor,
    dynamic_sampling,
    first_look,
    report,
    schedules,
)
from run.batch import Batch, MicroBatchResult, PolicyLoss, StepRecord, Update, join
from run.finalize import finish, give_up
from run.guard import StopRequest
from run.option_checks import parse
from run.setup import open_run
from run.state import Run, Stopwatch
from sampling import NonFinite, Rows, Temperature

# ---------------------------------------------------------------------------------------- one step


def train_step(step: int, run: Run) -> StepRecord:
    """Train on one batch of responses, from the prompts to the updated weights."""
    options, engine, dist, clock = run.options, run.engine, run.dist, Stopwatch(run.dist.device)

    # 1. Whose policy is trained? In BuPO's first phase layer l's, otherwise the model's own (None).
    # Change the phases in bupo.target_layer: the console, the options and a resume call it, too.
    layer = schedules.target_layer(step, options, run.layer)  # BuPO 1

    # 2. Sample G responses to each prompt from the current policy, and compute their rewards.
    temperature = options.temperature
    if "A" in run.mechanisms:  # HAPO A: a rule that the decoder calls at every token
        stats, base, tau = run.sampler_stats, options.temperature, options.tau  # last batch's stats
        if options.temperature_form == "two":  # a baseline
            temperature = lambda entropy, position: baselines.two_temperatures(
                entropy, stats, base, tau
            )
        else:
            temperature = lambda entropy, position: hapo.adaptive_temperature(
                entropy, stats, base, tau, options.temperature_form, options.released
            )
    batch = run.last_batch = generate_and_grade(step, 0, layer, temperature, run)
    if options.dynamic_sampling:  # DAPO: replace zero-variance groups, in at most max_rounds
        for attempt in range(1, options.max_rounds):
            if dynamic_sampling.is_filled(batch, run):
                break
            batch = join([batch, generate_and_grade(step, attempt, layer, temperature, run)])
        batch = run.last_batch = dynamic_sampling.select_groups(batch, run)
    rollout, mask = batch.rollout, batch.rollout.mask
    run.check_finite((batch.all_drawn or batch).rewards, "a reward")
    clock.lap("generate")
    if run.layer == bupo.AUTO:  # BuPO 3: the boundary layer, measured on the first responses
        run.layer = report.measure_boundary(batch, run)
        layer = schedules.target_layer(step, options, run.layer)

    # 3. Compute the ratio's denominator: log-probabilities under the policy being trained. (The
    # sampler's are at each draw's temperature.) A mini-batch holds the responses of one update.
    size = len(batch.texts) // options.updates_per_rollout
    mini_batches = [slice(i, i + size) for i in range(0, len(batch.texts), size)]
    batch.old = engine.batch_logprobs(engine.policy, rollout, mini_batches, layer)
    if layer is None:
        batch.full = batch.old
    elif options.temperature == 1:  # BuPO 6: the sampler has measured the full policy's entropies
        batch.full = rollout.scores
    else:
        batch.full = engine.batch_logprobs(engine.policy, rollout, mini_batches, None)
    run.check_finite(batch.old.logp + batch.full.entropy, "an old log-probability or entropy")
    if run.reference is not None and layer is None:  # BuPO 7: no KL to the initial model in phase 1
        batch.reference = engine.batch_logprobs(
            run.reference, rollout, mini_batches, None, measure_entropy=False
        )
    if options.sampler_correction:
        batch.importance_weights = baselines.truncated_weight(batch.old.logp, rollout.logp)

    # 4. How uncertain was the full policy at each token? One h in [-1, 1] per token. Two sets of
    # statistics, each over all tokens of all processes, zero-variance groups included: those of all
    # responses drawn, for mechanism A in the next step, and those of this batch, for its h.
    if "A" in run.mechanisms:
        drawn = (batch.all_drawn or batch).rollout
        pool = dist.gather(drawn.entropy[drawn.mask])
        run.sampler_stats = hapo.entropy_stats(pool, torch.ones_like(pool), options.rho)
    if options.algo == "hapo":
        pool = dist.gather(batch.full.entropy[mask])
        batch.stats = hapo.entropy_stats(pool, torch.ones_like(pool), options.rho)
        batch.h = hapo.modulation(
            batch.full.entropy, batch.stats, batch.loss_mask, options.released
        )

    # 5. How much better is a response than the others to its prompt? Advantages (B, T), 0 in
    # zero-variance groups.
    G, counted = options.num_generations, batch.loss_mask & batch.has_reward_variance[:, None]
    if "B" in run.mechanisms:  # HAPO B
        batch.advantages = hapo.token_group_advantages(batch.rewards, counted, G, options.released)
    elif options.advantage == "rloo":
        batch.advantages = losses.rloo_advantages(batch.rewards, G)[:, None] * counted
    else:
        batch.advantages = losses.grpo_advantages(batch.rewards, G)[:, None] * counted
    if options.baseline in baselines.ADVANTAGE_BASELINES:
        batch.advantages = baselines.change_advantages(batch.advantages, batch, run)
    clock.lap("score")

    # 6. Update the policy on each mini-batch in turn. The loss is a mean over the whole mini-batch,
    # whatever the number of micro-batches. If no token has an advantage, skip the optimizer step
    # and its weight decay (with a KL term, every token in the loss has a gradient).
    if options.bupo_baseline != "align" or options.bupo_norm:  # BuPO 8: baselines and ablation
        baselines.set_trainable_weights(step, run)
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * schedules.learning_rate_factor(step, options)
    updates = []
    for mini_batch in mini_batches:
        learns = batch.loss_mask if batch.reference is not None else batch.advantages != 0
        tokens, responses, learning = dist.all_reduce_sum(
            batch.loss_mask[mini_batch].sum(),
            batch.in_loss[mini_batch].sum(),
            learns[mini_batch].any(),
        )
        if not learning:
            updates.append(Update("no_signal"))
            continue
        total, results = 0.0, []
        for rows in engine.micro_batches(rollout, mini_batch):
            new = engine.token_logprobs(engine.policy, rollout, rows, layer, measure_entropy=False)
            of_tokens = policy_loss(new.logp, batch, rows, run)  # applies HAPO's C and D
            if of_tokens.loss_mean == "token":
                loss = losses.masked_mean(of_tokens.per_token, batch.loss_mask[rows], tokens)
            elif of_tokens.loss_mean == "sequence":
                loss = losses.sequence_mean(of_tokens.per_token, batch.loss_mask[rows], responses)
            else:
                loss = losses.fixed_length_mean(
                    of_tokens.per_token, batch.loss_mask[rows], options.max_new_tokens, responses
                )
            engine.backward(loss)
            total = total + loss.detach()
            per_token, ratio = of_tokens.per_token.detach(), of_tokens.ratio.detach()
            kept = of_tokens._replace(per_token=per_token, ratio=ratio)
            results.append(MicroBatchResult(rows, new.logp.detach(), kept))
        (total,) = dist.all_reduce_sum(total)
        outcome, grad_norm = engine.optimizer_step(total)
        updates.append(Update(outcome, total, grad_norm, results))
    clock.lap("update")
    return StepRecord(step, layer, batch, updates, clock.seconds)


def generate_and_grade(
    step: int, attempt: int, layer: int | str | None, temperature: Temperature, run: Run
) -> Batch:
    """Return a Batch: the next P prompts, G responses to each, and the reward of each response."""
    options, G = run.options, run.options.num_generations
    problems, prompts = zip(*run.next_prompts())
    rollout = run.engine.generate(
        prompts,
        G,
        options.max_new_tokens,
        temperature,
        run.uniform(step, attempt),
        measure_entropy=layer is not None,  # BuPO 2: in phase 1, h is computed from these entropies
    )
    texts = response_texts(rollout.responses(), run.tokenizer)
    ends = [run.tokenizer.decode(ids[-16:]) for ids in prompts]  # which may have opened <think>
    rows = enumerate(zip(texts, rollout.finished.tolist()))
    grades = [grade(problems[i // G], text, finished, ends[i // G]) for i, (text, finished) in rows]
    strict, lenient = torch.tensor(grades, device=rollout.mask.device).unbind(1)
    correct = lenient
    if options.reward == "strict":
        correct = strict
    elif options.reward == "random":
        correct = baselines.random_verdicts(step, attempt, run)
    # Duplicate responses share the first one's outcome. With different outcomes (by chance, say)
    # their gradients would cancel up to rounding, and AdamW turns a tiny gradient into a full step.
    first = [texts.index(text, row // G * G) for row, text in enumerate(texts)]
    correct = correct[first]

    if run.reward_function is None:
        outcome = correct.float()
    else:  # --reward-function; NaN where it failed
        own = [run.reward_function(problems[row // G], text) for row, text in enumerate(texts)]
        outcome = torch.tensor(own, device=rollout.mask.device)[first]
    # Add reward terms of your own here, a bonus for the format for example. A group whose outcomes
    # are all equal at this line has zero reward variance and advantage 0, whatever terms are added
    # to its rewards below.
    has_variance = losses.has_reward_variance(outcome, G)
    reward = outcome
    if options.overlong_buffer:  # after the line above: a length penalty alone gives no variance
        cap, buffer = options.max_new_tokens, options.overlong_buffer
        reward = outcome + losses.overlong_penalty(rollout.lengths, cap, buffer)
    return Batch(
        problems=list(problems),
        texts=texts,
        rollout=rollout,
        strict=strict,
        lenient=lenient,
        correct=correct,
        rewards=reward,
        has_reward_variance=has_variance,
        in_loss=torch.ones_like(has_variance),
        loss_mask=rollout.mask,
    )


def policy_loss(logp: Tensor, batch: Batch, rows: Rows, run: Run) -> PolicyLoss:
    """Return the PolicyLoss of some responses from their current log-probabilities, (rows, T).

    The ratio, its clip bounds and the mean of the loss depend on each other: all are chosen here.
    """
    options, advantages = run.options, batch.advantages[rows]
    h = None if batch.h is None else batch.h[rows]
    if options.baseline in baselines.LOSS_BASELINES:
        loss, ratio, low, high, _, loss_mean = baselines.policy_loss(logp, batch, rows, options)
    else:
        ratio, loss_mean = losses.likelihood_ratio(logp, batch.old.logp[rows]), options.loss_mean
        base = (options.clip_low, options.clip_high)  # this ratio's bounds, before C and D
        if "C" in run.mechanisms:  # HAPO C: its neutral zone is built from the base bounds
            zone = base
            if options.released and "D" in run.mechanisms:  # the released code takes D's bounds
                zone = hapo.adaptive_clip(h, *base)
            advantages = hapo.redistribute_advantages(advantages, h, ratio, *zone, options.released)
        low, high = (torch.full_like(logp, bound) for bound in base)
        if "D" in run.mechanisms:  # HAPO D
            low, high = hapo.adaptive_clip(h, *base)
        dual_clip = options.dual_clip or None
        loss = losses.clipped_surrogate(ratio, advantages, low, high, dual_clip)
    if options.sampler_correction:
        loss = loss * batch.importance_weights[rows]
    if batch.reference is not None:
        loss = loss + options.kl * losses.kl_k3(logp, batch.reference.logp[rows])
    return PolicyLoss(loss, ratio, low, high, advantages, loss_mean)


# ----------------------------------------------------------------------------------------- the run


def train(options: Options) -> None:
    """Start or resume a run, take its steps, and write its files."""
    processes = open_processes(options.device)
    common.threads.use_threads(options.threads, print if processes.main else str)
    run, step = open_run(options, processes)
    lock = run.lock or contextlib.nullcontext()
    with lock, StopRequest(run.say) as stop:
        if step is None:
            first_look.first_look(run)
            step = 0
            checkpoint.save(run, step)
        stopped = False
        while step < options.steps and not stopped:
            step += 1
            metrics, bad = guarded_step(step, run)
            report.record(step, metrics, bad, run)
            last = step == options.steps
            if bad and (last or run.guard.bad_in_a_row >= options.max_bad_steps):
                give_up(run, step)
            stopped = run.dist.any_process(stop.asked)
            if not bad and (step % options.save_every == 0 or last or stopped):
                checkpoint.save(run, step)
        if step == options.steps:
            finish(run)
        else:
            resume = f"python train.py --resume --out {options.out}"
            run.say(f"stopped after step {step}; continue with: {resume}")
    run.dist.close()


def guarded_step(step: int, run: Run) -> tuple[dict, str | None]:
    """Take one step, and evaluate where one is due.

    Return (metrics, None), or (metrics, reason) if NaN or infinite values made the step bad.
    """
    options = run.options
    try:
        before = report.weight_sample(run)
        done = train_step(step, run)
        run.check_finite(report.weight_norms(run), "a weight")
        report.say_skipped(done.updates, run)
        metrics = report.step_metrics(done, before, run)
        run.inspected_group = inspect_group(done, run)
        skipped = metrics["skipped_updates"]
        if skipped and not metrics["updates"]:
            return metrics, f"no update applied, {skipped} were not finite"
        if step % options.eval_every == 0 or step == options.steps:
            metrics |= report.held_out(run, step)
        if options.diagnose_every and step % options.diagnose_every == 0:
            metrics |= report.diagnose(run)
        return metrics, None
    except NonFinite as error:
        return {"step": step, "skipped": str(error)}, str(error)


def inspect_group(done: StepRecord, run: Run) -> dict:
    """Return one group for samples.jsonl: {name: (G, T)} for each value, and the group's rows.

    The group is the one whose share of correct responses is nearest to one half. Ratios are
    computed after the last update, from old_logp and new_logp of the policy that the step trained.
    `clipped` is -1 or +1 where the lower or upper clip bound removes a token's gradient, elsewhere
    0. Without clipping (CISPO) there are no bounds. `update_tokens` and `update_responses` are the
    numbers of tokens and responses that the loss of the group's update is a mean over.
    """
    batch, G, dist = done.batch, run.options.num_generations, run.dist
    share_correct = batch.correct.view(-1, G).float().mean(1)
    first = G * int((share_correct - 0.5).abs().argmin())
    rows = slice(first, first + G)
    new = run.engine.batch_logprobs(run.policy, batch.rollout, [rows], done.layer)
    loss = policy_loss(new.logp[rows], batch, rows, run)
    fell = (loss.ratio < 1 - loss.clip_low) & (loss.advantages < 0)
    rose = (loss.ratio > 1 + loss.clip_high) & (loss.advantages > 0)
    size = len(batch.texts) // run.options.updates_per_rollout  # responses of an update
    tokens = dist.all_reduce_sum(*batch.loss_mask.sum(1).view(-1, size).sum(1))
    responses = dist.all_reduce_sum(*batch.in_loss.view(-1, size).sum(1))
    group = {"rows": rows, "ratio": loss.ratio, "sampler_logp": batch.rollout.logp[rows]}
    group |= {"update_tokens": tokens[first // size], "update_responses": responses[first // size]}
    group |= {"old_logp": batch.old.logp[rows], "new_logp": new.logp[rows]}
    if bool(loss.clip_high.isfinite().all()):
        group |= {"clip_low": loss.clip_low, "clip_high": loss.clip_high}
    if batch.h is not None:
        group["h"] = batch.h[rows]
    return group | {"advantage": loss.advantages, "clipped": rose.int() - fell.int()}


def main(argv: list[str] | None = None) -> None:
    options = parse(argv, __doc__)
    if options.estimate:
        print(memory.overview(load_config(options.model), options))
    elif options.doctor:
        processes = open_processes(options.device)
        common.threads.use_threads(options.threads, print if processes.main else str)
        doctor.examine(options, processes, guarded_step)
    else:
        train(options)


if __name__ == "__main__":
    run_main(main)
