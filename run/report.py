"""Report a run: metrics.jsonl, samples.jsonl, console lines and held-out accuracy."""

import torch

import bupo
import hapo
import internals
from common.devices import widest_float_dtype
from engine.engine import autocast
from engine.logprobs import chunked_logprobs_and_entropy
from evaluate import sample_responses, summarise, valid_json
from losses import LOG_RATIO_LIMIT, kl_k3
from problems.latex import LATEX
from run import schedules
from run.alarms import may_differ, new_alarms
from run.state import seed_of


@torch.no_grad()
def weight_sample(run):
    """Return about a thousand entries of every weight, to measure what share a step changes."""
    parts = []
    for p in run.policy.parameters():
        parts.append(run.engine.strided_sample(p, max(1, p.numel() // 1000)))
    return torch.cat(parts).cpu()


@torch.no_grad()
def weight_norms(run):
    """Return the norm of every weight, so that a NaN or infinity is found before it is saved."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in run.policy.parameters()]
    return torch.stack([norm.float() for norm in torch._foreach_norm(local)]).cpu()


def tally(batch):
    """Return sums over the responses of a batch, {name: number}."""
    rollout, correct = batch.rollout, batch.correct
    groups, done = correct.view(-1, rollout.group_size), rollout.finished
    sums = {
        "zero_std": ~batch.has_reward_variance.view(-1, rollout.group_size)[:, 0],
        "all_correct": groups.all(1),
        "all_wrong": ~groups.any(1),
        "correct": correct,
        "strict": batch.strict,
        "lenient": batch.lenient,
        "finished": done,
        "finished_correct": correct & done,
        "finished_tokens": rollout.lengths * done,
        "tokens": rollout.lengths,
    }
    totals = torch.stack([values.sum() for values in sums.values()]).tolist()
    sums = dict(zip(sums, totals))
    rewards = float(batch.rewards.cpu().double().sum())
    return {"responses": len(correct), "groups": len(groups), "rewards": rewards, **sums}


def step_metrics(step, weights_before, run):
    """Return a step's line of metrics.jsonl. `weights_before`: weight_sample before the step."""
    batch, layer, mask = step.batch, step.layer, step.batch.rollout.mask
    counts = over_processes(tally(batch.all_drawn or batch), run)

    # LaTeX failures of this process since the last step
    latex_failures, LATEX.failures = LATEX.failures, 0

    means = {"entropy": batch.full.entropy, "temperature": batch.rollout.temperature}
    if layer is None:
        means["logp"] = batch.old.logp
    else:  # BuPO 9: in phase 1 both policies, each under its own name
        means["sampler_logp"] = batch.rollout.logp
        means["internal_entropy"] = batch.old.entropy
        means["internal_logp"] = batch.old.logp
    sums = [(values * mask).sum() for values in means.values()]
    *sums, tokens = run.dist.all_reduce_sum(*sums, mask.sum())

    metrics = {
        "step": step.number,
        "phase": "full" if layer is None else "internal",
        **response_metrics(counts),
        **{name: sum / tokens for name, sum in zip(means, sums)},
        **update_metrics(step, run),
        **signal_metrics(batch, layer, run),
        "lr": run.engine.optimizer.param_groups[0]["lr"],
        "weights_changed": share_changed(run, weights_before),
        "latex_failures": int(run.dist.all_reduce_sum(latex_failures)[0]),
        "tokens_per_second": counts["tokens"] / step.seconds["generate"],
        **{f"seconds_{name}": seconds for name, seconds in step.seconds.items()},
    }
    if run.options.dynamic_sampling:  # groups that stayed without variance
        (unfilled,) = run.dist.all_reduce_sum((~batch.in_loss).sum())
        metrics["unfilled_groups"] = int(unfilled) // run.options.num_generations
    if layer is not None:
        metrics["layer"] = layer
    return metrics


def response_metrics(counts):
    """Return metrics of all responses drawn in a step, including those of replaced groups."""
    responses, finished = counts["responses"], max(1, counts["finished"])
    return {
        "reward": counts["rewards"] / responses,
        "correct": counts["correct"] / responses,
        "strict": counts["strict"] / responses,
        "lenient": counts["lenient"] / responses,
        "response_length": counts["tokens"] / responses,
        "finished_length": counts["finished_tokens"] / finished,
        "finished_accuracy": counts["finished_correct"] / finished,
        "clipped_ratio": 1 - counts["finished"] / responses,
        "groups": int(counts["groups"]),
        "zero_std_groups": int(counts["zero_std"]),
        "all_correct": int(counts["all_correct"]),
        "all_wrong": int(counts["all_wrong"]),
    }


def over_processes(numbers, run):
    """Return a dictionary of numbers with each number summed over processes."""
    return dict(zip(numbers, run.dist.all_reduce_sum(*numbers.values())))


def update_metrics(step, run):
    """Return metrics of a step's updates; skipped ones are left out unless all were skipped."""
    outcomes = [u.outcome for u in step.updates]
    skipped, rescaled = outcomes.count("skipped"), outcomes.count("rescaled")
    applied = outcomes.count("applied")
    updates = [u for u in step.updates if u.outcome in ("applied", "no_signal")] or step.updates
    first = step.updates[0]  # made before any weight had changed
    all_counts, before = [clip_counts(u, step.batch) for u in (updates, [first])]
    both = {"of_all": all_counts, "before": before}
    sums = over_processes({(w, k): x for w, c in both.items() for k, x in c.items()}, run)
    *ratios, (_, off_before) = largest_ratios([*updates, first], step.batch, run)

    def share(name, which="of_all"):
        return sums[which, name] / max(1, sums[which, "tokens"])

    return {
        "loss": sum(u.loss for u in updates) / len(updates),
        "grad_norm": sum(u.grad_norm for u in updates) / len(updates),
        "ratio_max": max(largest for largest, _ in ratios),
        "clip_low": share("clip_low"),
        "clip_high": share("clip_high"),
        "kl_old": share("kl_old"),
        "clamped": share("clamped"),
        "outside_before_update": share("outside", "before"),
        "ratio_off_before_update": off_before,
        "loss_off": loss_off(updates, step.batch, run),
        "updates": applied,
        "useful_token_fraction": useful_token_fraction(updates, step.batch, run),
        "skipped_updates": skipped,
        "no_signal_updates": outcomes.count("no_signal"),
        **({"rescaled_updates": rescaled} if rescaled else {}),
    }


def useful_token_fraction(updates, batch, run):
    """Return the share of useful tokens among all tokens in the updates' forward passes.

    Useful tokens are each prompt's, once per pass, and the response tokens that predict another
    one. The others are padding or repeat a prompt.
    """
    rollout, needed, computed = batch.rollout, 0, 0
    lengths, prompts = rollout.lengths.tolist(), rollout.prompt_mask.sum(1).tolist()
    for some in (part.rows for update in updates for part in update.micro_batches):
        rows = rollout.row_list(some)
        needed += sum(lengths[row] - 1 for row in rows)
        needed += sum(prompts[p] for p in {row // rollout.group_size for row in rows})
        computed += run.engine.pack(rollout, some).ids.numel()
    needed, computed = run.dist.all_reduce_sum(needed, computed)
    return needed / computed if computed else 1.0


def clip_counts(updates, batch):
    """Return sums over the tokens of some updates, as tensors on the device."""
    names = ("tokens", "clip_low", "clip_high", "outside", "clamped", "kl_old")
    sums = torch.zeros(
        len(names), dtype=widest_float_dtype(batch.rewards.device), device=batch.rewards.device
    )
    for part in (part for update in updates for part in update.micro_batches):
        rows, logp, (_, ratio, clip_low, clip_high, advantages, _) = part
        valid, old_logp = batch.loss_mask[rows], batch.old.logp[rows]
        below, above = ratio < 1 - clip_low, ratio > 1 + clip_high
        kl = kl_k3(old_logp, logp)  # of KL(old || new): the old policy drew the responses
        counts = (
            valid,
            valid & below & (advantages < 0),  # tokens whose gradient is removed
            valid & above & (advantages > 0),
            valid & (below | above),
            valid & ((logp - old_logp).abs() > LOG_RATIO_LIMIT),
            torch.where(valid, kl, 0.0),
        )
        sums += torch.stack([values.sum().to(sums.dtype) for values in counts])
    return dict(zip(names, sums))


def loss_off(updates, batch, run):
    """Return how far the updates' losses are from the means over their whole mini-batches.

    The largest difference, relative to the tokens' mean absolute loss. A step adds up the losses of
    micro-batches; here each mini-batch's mean is computed at once.
    """
    device, sums = batch.rewards.device, []
    for update in updates:
        total = torch.zeros(3, dtype=widest_float_dtype(device), device=device)
        for part in update.micro_batches:
            mask, kind = batch.loss_mask[part.rows], part.loss.loss_mean
            values = torch.where(mask, part.loss.per_token, 0.0).to(total.dtype)
            count = mask.sum() if kind == "token" else batch.in_loss[part.rows].sum()
            if kind == "sequence":
                values = values / mask.sum(1, keepdim=True).clamp_min(1)
            elif kind == "fixed":
                values = values / run.options.max_new_tokens
            total += torch.stack([values.sum(), values.abs().sum(), count.to(total.dtype)])
        sums += list(total)
    sums, off = run.dist.all_reduce_sum(*sums), 0.0
    for i, update in enumerate(updates):
        loss, size, count = sums[3 * i : 3 * i + 3]
        if size > 0:
            off = max(off, abs(update.loss - loss / count) / (size / count))
    return off


def largest_ratios(updates, batch, run):
    """Return (largest ratio, largest |ratio - 1|) of each update, over all processes."""
    found = []
    for update in updates:
        largest = torch.zeros(2, device=batch.rewards.device)
        for part in update.micro_batches:
            ratio = torch.where(batch.loss_mask[part.rows], part.loss.ratio, 1.0)
            largest = torch.maximum(largest, torch.stack([ratio.max(), (ratio - 1).abs().max()]))
        found.append(largest)
    return run.dist.all_reduce_max(torch.stack(found)).tolist()


def say_skipped(updates, run):
    for u in updates:
        if u.outcome == "skipped":
            run.say(
                f"warning: update skipped: loss {u.loss}, gradient norm {u.grad_norm}; no weight "
                "has changed"
            )


def signal_metrics(batch, layer, run):
    """Return statistics of the log-entropies, and how much sampler and scorer differ.

    Sampler and scorer are compared on tokens drawn at T_base under the model's own policy, where
    their log-probabilities should agree.
    """
    metrics, mask = {}, batch.rollout.mask
    same = mask & (batch.rollout.temperature == run.options.temperature)
    floor, zero = ((batch.full.entropy <= x) & mask for x in (hapo.ENTROPY_FLOOR, 0.0))
    new, drawn = batch.old.logp, batch.rollout.logp
    differences = (kl_k3(drawn, new), (new - drawn).abs(), drawn - new)
    kl, off, gap = (torch.where(same, x, 0.0) for x in differences)
    floors, tokens, alike, kl, gap, zeros = run.dist.all_reduce_sum(
        floor.sum(), mask.sum(), same.sum(), kl.sum(), gap.sum(), zero.sum()
    )
    metrics["zero_entropies"] = zeros / tokens  # at T_base 1 the exact formula gives none
    x = hapo.log_entropy(run.dist.gather(batch.full.entropy[mask])).sort().values
    ranks = [round(k / 100 * (len(x) - 1)) for k in range(101)]  # as the pivot's: nearest rank
    quantiles = [seven_digits(value) for value in x[ranks].tolist()]
    if batch.stats is not None:
        metrics |= dict(zip(batch.stats._fields, torch.stack(batch.stats).tolist()))
        metrics["at_floor"] = floors / tokens
    if layer is None and alike:  # the sampler does not draw from an internal policy
        metrics["sampler_kl"] = kl / alike
        metrics["sampler_gap"] = gap / alike
        metrics["sampler_off"] = float(run.dist.all_reduce_max(off.max()))
    return metrics | {"log_entropy_quantiles": quantiles}


def share_changed(run, weights_before):
    changed = weight_sample(run) != weights_before
    moved, seen = run.dist.all_reduce_sum(changed.sum(), len(changed))
    return moved / seen


def console_line(m, options):
    seconds = {part: m[f"seconds_{part}"] for part in ("generate", "score", "update")}
    parts = [
        f"step {m['step']:>{len(str(options.steps))}}/{options.steps}"
        + (f" layer {m['layer']}" if m["phase"] == "internal" else ""),
        f"reward {m['reward']:.3f}",
        f"loss {m['loss']:+.4f}",
        f"grad {m['grad_norm']:.2f}",
        f"entropy {m['entropy']:.3f}",
        f"length {m['response_length']:.1f}",
        f"zero-variance groups {m['zero_std_groups']}/{m['groups']} ({m['all_correct']} correct, "
        f"{m['all_wrong']} wrong)",
        f"{sum(seconds.values()):.2f} s = "
        + " + ".join(f"{s:.2f} {part}" for part, s in seconds.items())
        + f", {m['tokens_per_second']:.0f} tok/s",
    ]
    if "eval_reward" in m:
        parts.append(f"held-out reward {m['eval_reward']:.3f}")
    if "eval_accuracy" in m:
        parts.append(f"held-out {m['eval_accuracy']:.3f} (greedy {m['eval_greedy']:.3f})")
    return "  ".join(parts)


def held_out(run, step):
    """Return metrics of held-out questions, sampled at temperature 1 and greedy.

    For sampling, questions are repeated if there are fewer than --eval-prompts.
    """
    options, name = run.options, f"evaluating step {step}"
    asked = [run.held_out[i % len(run.held_out)] for i in range(options.eval_prompts)]
    seed = seed_of(options.seed, "held out")
    own = run.reward_function
    responses = evaluate_over(run, asked, 1.0, seed, f"{name}, sampled", 1, own)
    sampled = summarise(responses)
    own = [response.reward for row in responses for response in row] if own else []
    each = run.held_out[: options.eval_prompts]
    greedy = summarise(evaluate_over(run, each, 0.0, 0, f"{name}, greedy"))
    return {
        "eval_accuracy": getattr(sampled, options.verdict),
        "eval_greedy": getattr(greedy, options.verdict),
        "eval_strict": sampled.strict,
        "eval_lenient": sampled.lenient,
        "eval_error": getattr(sampled, options.verdict + "_error"),
        **({"eval_reward": sum(own) / len(own)} if own else {}),
        "eval_finished": sampled.finished,
        "eval_length": sampled.length,
    }


def evaluate_over(run, problems, temperature, seed, name, samples=1, own_reward=None):
    """Return the responses of all processes, one list per question.

    own_reward: a reward function whose reward is added to each response.
    """
    options, dist, count = run.options, run.dist, len(problems)
    problems = dist.local_shard(problems)
    responses = sample_responses(
        run.engine.generate,
        run.tokenizer,
        problems,
        samples,
        options.max_new_tokens,
        temperature,
        seed,
        rows_at_once=max(1, options.responses_per_step // dist.size),
        progress=name if dist.main else None,
        numbers=dist.local_shard(range(count)),
    )
    by_question = {}  # a repeated question becomes one question with several responses
    if own_reward:
        paid = lambda p, a: a._replace(reward=own_reward(p, a.text))
        responses = [[paid(p, response) for response in row] for p, row in zip(problems, responses)]
    rows = [((p.question, p.history), row) for p, row in zip(problems, responses)]
    for part in dist.gather_objects(rows):
        for question, row in part:
            by_question.setdefault(question, []).extend(row)
    return list(by_question.values())


def samples_of(step, run, rows, more=None):
    """Yield some responses of the last batch as objects for samples.jsonl.

    Each has its verdicts, and for every token the entropy and the temperature. `more` has values to
    add: {name: tensor (rows, T), or a number of the whole group}.
    """
    batch, rollout = run.last_batch, run.last_batch.rollout
    G = rollout.group_size
    # a batch that was rejected before it was scored has only the sampler's entropy
    entropy = rollout.entropy if batch.full is None else batch.full.entropy
    name = "sampler_entropy" if batch.full is None else "entropy"
    columns = {name: entropy[rows], "temperature": rollout.temperature[rows]}
    more = more or {}
    of_group = {k: x for k, x in more.items() if not isinstance(x, torch.Tensor)}
    columns |= {k: x for k, x in more.items() if isinstance(x, torch.Tensor)}
    kind = {k: seven_digits if x.is_floating_point() else int for k, x in columns.items()}
    kind |= {k: nine_digits for k in columns if k.endswith("logp")}
    of_response = (batch.rewards, batch.strict, batch.lenient, rollout.finished, rollout.lengths)
    numbers = torch.stack([x[rows].float() for x in of_response], 1).tolist()
    of_token = torch.stack([x.float() for x in columns.values()], 1).tolist()
    tokens = rollout.tokens[rows].tolist()
    for i, row in enumerate(rollout.row_list(rows)):
        problem, (reward, strict, lenient, finished, n) = batch.problems[row // G], numbers[i]
        n = int(n)
        yield {
            "step": step,
            "question": problem.question,
            "reference_answer": problem.answer,
            "response": batch.texts[row],
            "reward": reward,
            "strict": bool(strict),
            "lenient": bool(lenient),
            "finished": bool(finished),
            **of_group,
            "tokens": [run.tokenizer.decode([t]) for t in tokens[i][:n]],
            **{k: [kind[k](v) for v in of_token[i][c][:n]] for c, k in enumerate(columns)},
        }


def seven_digits(x):
    """Return x with seven significant digits, about as many as float32 has: log H needs them."""
    return float(f"{x:.7g}")


def nine_digits(x):
    """Return x with nine significant digits, all that float32 has: a ratio is a difference."""
    return float(f"{x:.9g}")


def duration(seconds):
    """Return a time as text: seconds below two minutes, else minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def measure_boundary(batch, run):
    """Return the boundary layer for --bupo-layer auto, measured on 64 of a batch's responses."""
    ids, attention, response = batch.rollout.with_response_mask(64 // run.dist.size)
    with autocast(run.dist.device, run.options.dtype):
        boundary = bupo.measure_boundary(
            run.policy,
            ids,
            attention,
            response,
            run.vocab_size,
            run.dist,
            token_scores=chunked_logprobs_and_entropy,
        )
    say_boundary(boundary, len(ids), run)
    return boundary.layer


def say_boundary(boundary, responses, run):
    """Print which layer --bupo-layer auto has found, and how reliable the result is."""
    layer, found, change = boundary
    where = f"{layer} of {len(change)} ({change[layer - 1]:+.3f} nats)"
    if not found:
        run.say(
            "warning: --bupo-layer auto: no feed-forward block raises entropy; "
            f"falling back to layer {where}, where it falls least"
        )
        return
    margin = change[layer - 1 :].abs().min()  # over the layers whose signs decide
    steps = schedules.shown_steps(schedules.phase_1_steps(run.options))
    run.say(
        f"boundary layer: {where}, the last whose feed-forward block raises entropy, on "
        f"{responses} responses; no deciding change is nearer to 0 than {margin:.3f} nats. Its "
        f"policy is trained in steps {steps}"
    )


def diagnose(run):
    """Return BuPO's diagnostics, measured on fixed responses: those of the first step diagnosed.

    The metrics of a sharded run are those of process 0's responses.
    """
    if run.diagnosed is None:
        run.diagnosed = run.last_batch.rollout.with_response_mask(32)
    responses, vocab = run.diagnosed, run.vocab_size
    batch = internals.diagnostic_batch_size(int(run.dist.all_reduce_max(responses[0].shape[1])))
    fast = dict(token_scores=chunked_logprobs_and_entropy)
    with autocast(run.dist.device, run.options.dtype):
        cosine, kl = internals.layer_similarity(run.policy, *responses, run.layer, vocab, batch)
        entropy = internals.internal_entropy(run.policy, *responses, vocab, batch, **fast)
        perplexity = internals.perplexity(run.policy, *responses, vocab, batch, **fast)
    run.dist.reshard(run.policy)
    return {
        "diagnose_cosine": cosine.tolist(),
        "diagnose_kl": kl.tolist(),
        "diagnose_layer_change": entropy.layer_change.tolist(),
        "diagnose_policy_entropy": entropy.policy.item(),
        "diagnose_perplexity": perplexity,
    }


def record(step, metrics, bad, run):
    """Write a step's lines to the console, metrics.jsonl and samples.jsonl."""
    options = run.options
    if bad:
        run.guard.bad_step(bad)
    else:
        run.guard.good_step(metrics)
        run.say(console_line(metrics, options))
        run.history.add(metrics)
        if run.history.count == 1 and step < options.steps:
            seconds = sum(metrics[f"seconds_{part}"] for part in ("generate", "score", "update"))
            left = duration(seconds * (options.steps - step))
            run.say(f"expected: {options.steps - step} more steps like this one take {left}")
        for alarm in new_alarms(run.history, run.known_alarms, may_differ(options)):
            run.known_alarms.add(alarm.name)
            run.say(str(alarm))
        if metrics.get("unfilled_groups"):
            run.say(
                f"warning: after {options.max_rounds} rounds of dynamic sampling, "
                f"{metrics['unfilled_groups']} of {options.prompts_per_step} groups still have no "
                "reward variance; training on the others"
            )
    if run.dist.main:
        write_lines(run.out / "metrics.jsonl", [metrics])
        if "reward" in metrics:
            more = dict(run.inspected_group)
            write_lines(run.out / "samples.jsonl", samples_of(step, run, more.pop("rows"), more))


def write_lines(path, rows):
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(valid_json(row) + "\n" for row in rows)
