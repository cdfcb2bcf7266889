"""What a run says of itself: metrics.jsonl, samples.jsonl, console lines, held-out accuracy, BuPO's diagnostics."""

import torch

import internals
from evaluate import sample_answers, summarise, valid_json
from sampling import NonFinite
from scale import shard
from scale.latex import LATEX
from scale.seeds import seed_of


@torch.no_grad()
def weight_sample(policy):
    """About a thousand entries of every weight, to see what share of the weights a step really changes."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in policy.parameters()]
    return torch.cat([p.flatten()[:: max(1, p.numel() // 1000)].cpu() for p in local])


def counts_of(rollout, grades, rewards):
    """What one round of sampling adds to the step's counts; verdicts as they are before any length penalty."""
    groups = rewards.view(-1, rollout.group_size)
    return {
        "answers": len(rewards), "groups": len(groups), "right": int(rewards.sum()), "all_right": int((groups.amin(1) == 1).sum()), "all_wrong": int((groups.amax(1) == 0).sum()),
        "strict": sum(g.strict for g in grades), "lenient": sum(g.lenient for g in grades),
        "finished": int(rollout.finished.sum()), "finished_right": int(rewards[rollout.finished].sum()), "finished_tokens": int(rollout.lengths[rollout.finished].sum()), "tokens": int(rollout.mask.sum()),
    }


def step_metrics(step, run, batch, layer, trained_entropy, updates, before, clock):
    """The line of metrics.jsonl. Token shares are over every token of every update, sums over all processes."""
    world = run.world
    counts = {k: world.sum(v).item() for k, v in batch.counts.items()}
    tokens = max(1, sum(u["tokens"] for u in updates))
    total = lambda key: sum(u.get(key, 0) for u in updates)
    over = lambda values: (world.sum((values * batch.rollout.mask).sum()) / world.sum(batch.rollout.mask.sum())).item()
    seconds = [b - a for a, b in zip(clock, clock[1:])]
    changed = (weight_sample(run.policy) != before).double()
    metrics = {
        "step": step, "phase": "full" if layer is None else "internal",
        "loss": total("loss") / len(updates), "reward": counts["right"] / counts["answers"], "entropy": over(batch.entropy),
        "grad_norm": sum(u["grad_norm"] for u in updates) / len(updates),
        "response_length": counts["tokens"] / counts["answers"], "clipped_ratio": 1 - counts["finished"] / counts["answers"],
        "clip_low": total("clip_low") / tokens, "clip_high": total("clip_high") / tokens, "ratio_max": max(u.get("ratio_max", 0.0) for u in updates), "kl_old": total("kl_old") / tokens,
        "outside_before_update": updates[0].get("outside", 0.0) / max(1, updates[0]["tokens"]),
        "dead_groups": counts["all_right"] + counts["all_wrong"], "all_right": counts["all_right"], "all_wrong": counts["all_wrong"], "groups": counts["groups"],
        "strict": counts["strict"] / counts["answers"], "lenient": counts["lenient"] / counts["answers"],
        "finished_length": counts["finished_tokens"] / max(1, counts["finished"]), "finished_accuracy": counts["finished_right"] / max(1, counts["finished"]),
        "temperature": over(batch.rollout.temperature), "lr": run.optimizer.param_groups[0]["lr"],
        "updates": total("applied"), "skipped_updates": total("skipped"), "dead_updates": total("dead"),
        "weights_changed": (world.sum(changed.sum()) / world.sum(len(changed))).item(),
        "latex_failures": LATEX.failures, "tokens_per_second": counts["tokens"] / seconds[0], "seconds_generate": seconds[0], "seconds_score": seconds[1], "seconds_update": seconds[2],
    }
    if layer is None:
        metrics["logp"] = over(batch.old_logp)
    else:  # phase 1: both policies, each under its own name
        metrics |= {"layer": layer, "logp": over(batch.rollout.logp), "internal_entropy": over(trained_entropy), "internal_logp": over(batch.old_logp)}
    if "not_filled" in counts:
        metrics["not_filled"] = counts["not_filled"]
    return metrics


def console_line(m, o):
    part = f"step {m['step']:>{len(str(o.steps))}}/{o.steps}" + (f" layer {m['layer']}" if m["phase"] == "internal" else "")
    held = f"  held-out {m['eval_accuracy']:.3f} (greedy {m['eval_greedy']:.3f})" if "eval_accuracy" in m else ""
    return (f"{part}  reward {m['reward']:.3f}  loss {m['loss']:+.4f}  grad {m['grad_norm']:.2f}  entropy {m['entropy']:.3f}  length {m['response_length']:.1f}  "
            f"dead {m['dead_groups']}/{m['groups']} ({m['all_right']} right, {m['all_wrong']} wrong)  "
            f"{m['seconds_generate'] + m['seconds_score'] + m['seconds_update']:.2f} s = {m['seconds_generate']:.2f} generate + {m['seconds_score']:.2f} score + {m['seconds_update']:.2f} update, {m['tokens_per_second']:.0f} tok/s{held}")


def held_out(run, step):
    """Accuracy on held-out questions: sampled at T = 1 and greedy; the questions are repeated if they are fewer than asked for."""
    o, world = run.options, run.world
    shard.refresh_actor(run.actor, run.policy)
    asked = [run.held_out[i % len(run.held_out)] for i in range(o.eval_prompts)]
    sampled = evaluate_over(world, run, asked, 1.0, seed_of(o.seed, "held out"), f"evaluating step {step}, sampled")
    greedy = evaluate_over(world, run, run.held_out[: o.eval_prompts], 0.0, 0, f"evaluating step {step}, greedy")
    return {"eval_accuracy": getattr(sampled, o.reward), "eval_greedy": getattr(greedy, o.reward), "eval_strict": sampled.strict, "eval_lenient": sampled.lenient,
            "eval_error": getattr(sampled, o.reward + "_error"), "eval_finished": sampled.finished, "eval_length": sampled.length}


def evaluate_over(world, run, problems, temperature, seed, name):
    o = run.options
    problems = world.mine(problems)
    answers = world.together(NonFinite, sample_answers, run.actor, run.tokenizer, problems, 1, o.max_new_tokens, run.eos_ids, temperature, seed + world.rank,
                             rows_at_once=max(1, o.answers_per_step // world.size), progress=name if world.main else None)
    by_question = {}  # a question that was asked twice is one question with two answers
    for part in world.gather_objects([(p.question, row) for p, row in zip(problems, answers)]):
        for question, row in part:
            by_question.setdefault(question, []).extend(row)
    return summarise(list(by_question.values()))


def samples_of(step, run, rows=(0, 1)):
    """A few answers of the last batch, readable: text, verdict, and entropy and temperature of every token."""
    batch = run.last_batch
    entropy = batch.rollout.entropy if batch.entropy is None else batch.entropy  # a batch that was refused before it was scored
    for row in rows:
        n = int(batch.rollout.lengths[row])
        problem = batch.problems[row // run.options.answers_per_prompt]
        yield {
            "step": step, "question": problem.question, "truth": problem.answer,
            "answer": batch.texts[row], "reward": float(batch.rewards[row]), "finished": bool(batch.rollout.finished[row]),
            "tokens": [run.tokenizer.decode([t]) for t in batch.rollout.tokens[row, :n].tolist()],
            "entropy": [round(x, 4) for x in entropy[row, :n].tolist()], "temperature": [round(x, 4) for x in batch.rollout.temperature[row, :n].tolist()],
        }


def first_look(run):
    """Before training: held-out accuracy, the pass rate on training prompts, and what they let one expect."""
    o = run.options
    metrics = {"step": 0, **held_out(run, 0)}
    probe = [p for p, _ in run.items[:64]]
    rate = getattr(evaluate_over(run.world, run, probe, o.temperature, seed_of(o.seed, "probe"), "pass rate of 64 prompts"), o.reward)
    live = 1 - rate**o.answers_per_prompt - (1 - rate) ** o.answers_per_prompt
    metrics |= {"pass_rate": rate, "expected_live_groups": live}
    run.say(f"before training: held-out {metrics['eval_accuracy']:.3f} sampled, {metrics['eval_greedy']:.3f} greedy (strict {metrics['eval_strict']:.3f}, lenient {metrics['eval_lenient']:.3f}); "
            f"pass rate of {len(probe)} training prompts {rate:.3f}, so about {live:.0%} of the groups will have both right and wrong answers")
    if not 0.05 <= rate <= 0.95:
        run.say(f"warning: the model is {'almost never' if rate < 0.05 else 'almost always'} right on this task; groups that are all {'wrong' if rate < 0.05 else 'right'} teach nothing (expected live groups {live:.1%}). Try {'an easier task, a stronger model' if rate < 0.05 else 'a harder task'} or more --answers-per-prompt")
    if metrics["eval_finished"] < 0.8:
        run.say(f"warning: {1 - metrics['eval_finished']:.0%} of the answers reach --max-new-tokens {o.max_new_tokens} and are cut; a cut answer is rarely right")
    run.say("a loss near 0 is right: advantages are centred and the ratio starts at 1. What shows learning is a gradient norm above 0, few dead groups, and a rising held-out accuracy.")
    if run.world.main:
        write_lines(run.out / "metrics.jsonl", [metrics])


def diagnose(run):
    """BuPO's diagnostics on a fixed set of answers, those of the first step they are asked for (sharded: process 0's)."""
    if run.diagnosed is None:
        run.diagnosed = run.last_batch.rollout.with_response_mask(32)
    ids, attention, response = run.diagnosed
    vocab = len(run.tokenizer)
    cosine, kl = internals.layer_similarity(run.policy, ids, attention, response, run.layer, vocab)
    entropy = internals.internal_entropy(run.policy, ids, attention, response, vocab)
    perplexity = internals.perplexity(run.policy, ids, attention, response, vocab)
    shard.reshard(run.policy)
    return {"diagnose_cosine": cosine.tolist(), "diagnose_kl": kl.tolist(), "diagnose_layer_change": entropy.layer_change.tolist(),
            "diagnose_policy_entropy": entropy.policy.item(), "diagnose_perplexity": perplexity}


def record(step, metrics, bad, run):
    """One step's lines: on the console, in metrics.jsonl and in samples.jsonl."""
    if bad:
        run.guard.bad_step(bad)
    else:
        run.guard.good_step(metrics)
        run.say(console_line(metrics, run.options))
        if metrics.get("not_filled"):
            run.say(f"warning: after {run.options.max_rounds} rounds of dynamic sampling {metrics['not_filled']:.0f} of {run.options.prompts_per_step} groups are still all right or all wrong; training on the others")
    if run.world.main:
        write_lines(run.out / "metrics.jsonl", [metrics])
        if "reward" in metrics:
            write_lines(run.out / "samples.jsonl", samples_of(step, run))


def write_lines(path, rows):
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(valid_json(row) + "\n" for row in rows)
