"""Reinforcement learning of a causal language model with GRPO, DAPO or HAPO, bottom-up (BuPO) if asked to.

    python train.py                                             a 1-million-parameter Qwen3 learns Countdown on a laptop
    python train.py --model Qwen/Qwen3-0.6B --data train.jsonl  the same loop on a real model and a file of questions

One step, in the order of `train_step`: draw prompts, sample G answers to each, grade them, score them under the old policy, turn
grades into advantages, update the policy a few times, log. HAPO differs from its baseline DAPO in three visible `if`s
(`temperature_rule`, the advantages in `train_step`, `policy_loss`), BuPO in `layer`: whose log-probabilities are trained.

A run is a function of its options and its seed: every random draw is seeded by (seed, step). On a CPU nothing else is random; a
GPU may add in another order.
"""

import time
from dataclasses import dataclass

import torch

import bupo
import hapo
import internals
import losses
from sampling import NonFinite, Rollout, generate
from scale import checkpoint, memory, options, report, shard
from scale.guard import StopRequest
from scale.load import load_config
from scale.run import draw_items, finish, give_up, open_run
from scale.seeds import seed_of
from tasks import grade

# ------------------------------------------------------------------------------------------------------- one step


@dataclass
class Batch:
    """The answers of one step on their way from sampling to the update. (B, T) unless said otherwise."""

    problems: list  # P
    texts: list  # B decoded answers
    rollout: Rollout
    rewards: torch.Tensor  # (B,)
    mask: torch.Tensor  # tokens that enter the loss: the rollout's, less groups that stayed dead under dynamic sampling
    counts: dict  # of answers, groups, verdicts and lengths, for the metrics
    entropy: torch.Tensor = None  # of the old full policy
    old_logp: torch.Tensor = None  # of the policy that is trained, before the first update
    ref_logp: torch.Tensor = None
    advantages: torch.Tensor = None
    h: torch.Tensor = None  # HAPO's modulation
    bounds: torch.Tensor = None  # clip distances of --comparison archer


def train_step(step, run):
    """One rollout batch from prompts to updated weights; returns the step's metrics. `run`: a scale.run.Run, what lives from step to step."""
    o, world, policy = run.options, run.world, run.policy
    clock = [time.perf_counter()]

    # Sample answers from the current policy and grade them.
    shard.refresh_actor(run.actor, policy)  # on a CPU they are one model
    batch = run.last_batch = collect(step, run)
    if world.any(not batch.rewards.isfinite().all()):
        raise NonFinite("a reward is NaN or infinite")
    clock.append(time.perf_counter())

    # BuPO: in phase 1 the policy that is trained is layer l's, and nothing above layer l runs.
    if o.bupo_layer and run.layer is None:
        run.layer = choose_layer(batch, run)
        run.optimizer = run.make_optimizer()  # nothing has been updated yet; --bupo-arm layer-lr groups weights by layer
    layer = bupo.target_layer(step, o.bupo_steps, run.layer) if o.bupo_arm == "align" else None

    # Score the answers under the old policy, at T_base: rollout.logp is at the temperature each token was drawn at. The full policy's
    # entropy drives HAPO; in phase 1 the sampler has measured it (temperature_rule sees to that), as no layer above l runs here.
    batch.old_logp, trained_entropy = score(policy, batch, layer, run)
    batch.entropy = trained_entropy if layer is None else batch.rollout.entropy
    if run.reference is not None and layer is None:
        batch.ref_logp, _ = score(run.reference, batch, None, run)
    if world.any(not (batch.old_logp + batch.entropy)[batch.rollout.mask].isfinite().all()):
        raise NonFinite("a log-probability or entropy of the old policy is NaN or infinite")

    # Advantages: one number a response, relative to the group's mean over responses or (HAPO's B) over tokens. HAPO's C makes it one
    # number a token in policy_loss, since that depends on the ratio.
    if o.algo == "hapo":
        # of every sampled token, over all processes; tokens of dead groups count here, though not in the loss. The next step samples with them.
        entropies = world.gather(batch.entropy[batch.rollout.mask])
        run.stats = hapo.entropy_stats(entropies, torch.ones_like(entropies), o.rho)
        batch.h = hapo.modulation(batch.entropy, run.stats, batch.mask, o.released)
    if o.algo == "hapo" and o.token_group_average:
        batch.advantages = hapo.token_group_advantages(batch.rewards, batch.mask, o.answers_per_prompt, o.released)
    else:
        batch.advantages = losses.grpo_advantages(batch.rewards, o.answers_per_prompt)[:, None] * batch.mask
    if o.comparison != "none":
        apply_comparison(batch, run)
    clock.append(time.perf_counter())

    # Update the policy on equal parts of the batch; every part is made of whole groups.
    prepare_updates(run, step)
    before = report.weight_sample(policy)
    rows = torch.arange(len(batch.rewards)).view(o.updates_per_rollout, -1)
    updates = [update(run, batch, part.tolist(), layer) for part in rows]
    clock.append(time.perf_counter())
    return report.step_metrics(step, run, batch, layer, trained_entropy, updates, before, clock)


def collect(step, run):
    """The step's answers; with dynamic sampling, groups whose rewards are all equal make room for new ones (DAPO)."""
    o, world = run.options, run.world
    batch = sample_round(step, 0, run)
    if o.dynamic_sampling:
        for attempt in range(1, o.max_rounds):
            if not world.any(not live_groups(batch, o).all()):
                break
            batch = keep_live(batch, sample_round(step, attempt, run), o)
        live = live_groups(batch, o).repeat_interleave(o.answers_per_prompt)
        batch.mask = batch.mask & live[:, None]  # groups that are still dead keep their place and stay out of the loss
        batch.counts["not_filled"] = int((~live).sum()) // o.answers_per_prompt
    return batch


def sample_round(step, attempt, run):
    """Draw P prompts, sample G answers to each, grade them."""
    o, world, G = run.options, run.world, run.options.answers_per_prompt
    items = world.mine(draw_items(run))
    # the same random numbers whatever the number of processes: each takes the columns of its own answers
    uniform = torch.rand(o.max_new_tokens, o.prompts_per_step, G, generator=torch.Generator().manual_seed(seed_of(o.seed, step, attempt)))
    uniform = uniform[:, world.rank :: world.size].flatten(1)
    prompts, temperature = [ids for _, ids in items], temperature_rule(step, run)
    rollout = world.together(NonFinite, generate, run.actor, prompts, G, o.max_new_tokens, run.eos_ids, temperature, len(run.tokenizer), uniform=uniform)

    texts = run.tokenizer.batch_decode(rollout.answers(), skip_special_tokens=True)
    grades = [grade(items[i // G][0], text) for i, text in enumerate(texts)]
    rewards = torch.tensor([float(getattr(g, o.reward)) for g in grades], device=world.device)
    counts = report.counts_of(rollout, grades, rewards)
    if o.overlong_buffer:
        rewards = rewards + losses.overlong_penalty(rollout.lengths, o.max_new_tokens, o.overlong_buffer)
    return Batch([problem for problem, _ in items], texts, rollout, rewards, rollout.mask, counts)


def live_groups(batch, o):
    groups = batch.rewards.view(-1, o.answers_per_prompt)
    return groups.amax(1) > groups.amin(1)


def keep_live(batch, more, o):
    """As many groups as `batch` has, taken from both batches, live ones first."""
    counts = {key: batch.counts[key] + more.counts[key] for key in batch.counts}
    G, wanted = o.answers_per_prompt, len(batch.problems)
    both = Batch(batch.problems + more.problems, batch.texts + more.texts, Rollout.join([batch.rollout, more.rollout]), torch.cat([batch.rewards, more.rewards]), None, counts)
    chosen = live_groups(both, o).int().argsort(descending=True, stable=True)[:wanted].tolist()
    rollout = both.rollout.select(chosen)
    texts = [both.texts[p * G + g] for p in chosen for g in range(G)]
    return Batch([both.problems[p] for p in chosen], texts, rollout, both.rewards.view(-1, G)[chosen].flatten(), rollout.mask, counts)


def temperature_rule(step, run):
    """What the sampler divides logits by: HAPO's adaptive temperature (A), or the base temperature."""
    o = run.options
    if o.algo == "hapo" and o.adaptive_temperature:
        return lambda entropy: hapo.adaptive_temperature(entropy, run.stats, o.temperature, o.tau, o.temperature_form, o.released)
    if o.bupo_layer and o.bupo_arm == "align" and step <= o.bupo_steps:  # phase 1
        return lambda entropy: torch.full_like(entropy, o.temperature)  # a function, so that the sampler measures the entropy that scoring cannot
    return o.temperature


def token_scores(model, rollout, rows, layer, run):
    """Log-probability and entropy of the answers `rows` at T_base, (rows, T), 0 at padding: one function for old, new and reference.

    layer None: the model's own policy; l: the internal policy of layer l, computing layers 1 ... l alone.
    """
    o, mask = run.options, rollout.mask[rows]
    with torch.autocast(run.world.device.type, torch.bfloat16, enabled=run.world.device.type == "cuda"):
        hidden = internals.answer_states(model, rollout, rows, layer, layer is None or o.bupo_norm)
        weight = internals.unembedding(model)[: len(run.tokenizer)]  # a padded vocabulary's ids have probability 0
        logp, entropy = losses.token_logprobs_and_entropy(hidden, weight, rollout.tokens[rows][mask], o.temperature)
    blank = torch.zeros(mask.shape, device=mask.device)
    return blank.masked_scatter(mask, logp), blank.masked_scatter(mask, entropy.detach())


@torch.no_grad()
def score(model, batch, layer, run):
    """token_scores of the whole batch, without gradient."""
    logp, entropy = torch.zeros(2, *batch.rollout.mask.shape, device=run.world.device)
    for rows, _ in run.world.even(batch.rollout.micro_batches(range(len(batch.rewards)), run.options.micro_batch, run.options.micro_tokens)):
        logp[rows], entropy[rows] = token_scores(model, batch.rollout, rows, layer, run)
    shard.reshard(model)
    return logp, entropy


def policy_loss(logp, batch, rows, o):
    """The surrogate of some rows, one value a token; sums over them for metrics.jsonl; the largest ratio."""
    ratio = torch.exp(logp - batch.old_logp[rows])
    advantages, low, high = batch.advantages[rows], o.clip_low, o.clip_high
    if o.algo == "hapo":
        h = batch.h[rows]
        if o.adaptive_clip:
            low, high = hapo.adaptive_clip(h, o.clip_low, o.clip_high)
        if o.advantage_redistribution:
            zone = (low, high) if o.released else (o.clip_low, o.clip_high)
            advantages = hapo.redistribute_advantages(advantages, h, ratio, *zone, o.released)
    if batch.bounds is not None:
        low = high = batch.bounds[rows]
    loss = losses.clipped_surrogate(ratio, advantages, low, high, o.dual_clip or None)
    with torch.no_grad():
        valid, below, above = batch.mask[rows], ratio < 1 - low, ratio > 1 + high
        seen = {
            "clip_low": (valid & below & (advantages < 0)).sum(), "clip_high": (valid & above & (advantages > 0)).sum(),
            "outside": (valid & (below | above)).sum(), "kl_old": losses.kl_k3(logp, batch.old_logp[rows])[valid].sum(),
        }
    return loss, {key: float(value) for key, value in seen.items()}, float(torch.where(valid, ratio.detach(), 0.0).max())


def update(run, batch, rows, layer):
    """One optimiser step on some rows; returns its numbers, over all processes."""
    o, world, policy = run.options, run.world, run.policy
    mask = batch.mask[rows]
    # the whole update's normalisers, fixed before it is cut into micro-batches
    tokens, responses = int(world.sum(mask.sum())), int(world.sum(len(rows)))
    something_to_learn = world.any(batch.advantages[rows][mask].any()) or batch.ref_logp is not None
    if not something_to_learn:
        return {"dead": 1, "tokens": 0, "loss": 0.0, "grad_norm": 0.0}  # all groups dead: no gradient, and no weight decay in its name
    sums, ratio_max = {"loss": 0.0}, 0.0
    for part, real in world.even(batch.rollout.micro_batches(rows, o.micro_batch, o.micro_tokens)):  # real: 0 for a pass that only keeps other processes company
        logp, _ = token_scores(policy, batch.rollout, part, layer, run)
        per_token, seen, highest = policy_loss(logp, batch, part, o)
        if batch.ref_logp is not None:
            per_token = per_token + o.kl * losses.kl_k3(logp, batch.ref_logp[part])
        loss = mean_loss(per_token, batch.mask[part], tokens, responses, o) * real
        (loss * world.size).backward()  # sharded gradients are averaged over processes; this makes the average a sum
        for key, value in (seen | {"loss": loss.item()}).items():
            sums[key] = sums.get(key, 0.0) + value * real
        ratio_max = max(ratio_max, highest)
    sums = dict(zip(sums, world.sum(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()))
    grad_norm = shard.whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), o.grad_clip)).item()
    accepted = run.guard.accepts(sums["loss"], grad_norm)
    if accepted:
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return sums | {"tokens": tokens, "ratio_max": float(world.max(ratio_max)), "grad_norm": grad_norm, ("applied" if accepted else "skipped"): 1}


def mean_loss(per_token, mask, tokens, responses, o):
    if o.loss_mean == "token":
        return losses.masked_mean(per_token, mask, tokens)
    if o.loss_mean == "sequence":
        return losses.sequence_mean(per_token, mask, responses)
    return losses.fixed_length_mean(per_token, mask, o.max_new_tokens, responses)


def apply_comparison(batch, run):
    """The other uses of entropy that the HAPO paper compares with: each replaces the mask, the bounds or the advantages."""
    o, entropies = run.options, run.world.gather(batch.entropy[batch.mask])
    if o.comparison == "forking":
        batch.mask = losses.forking_token_mask(batch.entropy, batch.mask, pool=entropies)
    elif o.comparison == "archer":
        batch.bounds = losses.archer_bounds(batch.entropy, batch.mask, pool=entropies)
    elif o.comparison == "entropy-advantage":
        batch.advantages = losses.entropy_advantage(batch.advantages, batch.entropy)
    elif o.comparison == "edge":
        mean_entropy = (batch.entropy * batch.mask).sum(1) / batch.mask.sum(1).clamp_min(1)
        advantages = losses.grpo_advantages(batch.rewards, o.answers_per_prompt)
        batch.advantages = losses.edge_advantages(advantages, mean_entropy, o.answers_per_prompt)[:, None] * batch.mask


def choose_layer(batch, run):
    """--bupo-layer: the number given, or the boundary layer, measured on 64 answers spread over the first step's."""
    o, (ids, attention, response) = run.options, batch.rollout.with_response_mask(64)
    if o.bupo_layer != "auto":
        with torch.no_grad():
            internals.residual_stream(run.policy, ids[:2], attention[:2])  # refuses blocks that are not pre-norm residual
        shard.reshard(run.policy)
        return int(o.bupo_layer)
    entropy = internals.internal_entropy(run.policy, ids, attention, response, len(run.tokenizer))
    shard.reshard(run.policy)
    change = run.world.sum(entropy.feed_forward_change) / run.world.size
    layer, found = bupo.boundary_or_fallback(change)
    where = f"{layer} of {len(change)} ({change[layer - 1]:+.3f} nats)"
    if found:
        run.say(f"boundary layer: {where}, the last whose feed-forward block raises entropy; its policy is trained for {o.bupo_steps} steps")
    else:
        run.say(f"warning: --bupo-layer auto: no feed-forward block raises entropy; falling back to layer {where}, where it falls least")
    return layer


def prepare_updates(run, step):
    """Linear warm-up; and what the arm "freeze" may not move in its first phase."""
    o = run.options
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * min(1.0, step / max(1, o.warmup_steps))
    if run.layer is not None and o.bupo_arm == "freeze":
        for p in bupo.lower_layers(run.policy, run.layer):
            p.requires_grad_(step > o.bupo_steps)


# --------------------------------------------------------------------------------------------------------- the run


def train(o):
    """Set a run up (or pick it up where it stopped), take its steps, leave its files."""
    run, step = open_run(o, shard.World(o.device))
    with StopRequest(run.say) as stop:
        if step is None:
            report.first_look(run)
            step = 0
            checkpoint.save(run, step)
        while step < o.steps and not run.world.any(stop.asked):
            step += 1
            try:
                metrics = train_step(step, run)
                bad = f"{metrics['skipped_updates']} of {o.updates_per_rollout} updates were not finite" if metrics["skipped_updates"] else None
                if not bad and (step % o.eval_every == 0 or step == o.steps):
                    metrics |= report.held_out(run, step)
                if not bad and run.layer and o.diagnose_every and step % o.diagnose_every == 0:
                    metrics |= report.diagnose(run)
            except NonFinite as error:
                metrics, bad = {"step": step, "skipped": str(error)}, str(error)
            report.record(step, metrics, bad, run)
            if bad and run.guard.bad_in_a_row >= o.max_bad_steps:
                give_up(run, step)
            if not bad and (step % o.save_every == 0 or step == o.steps or run.world.any(stop.asked)):
                checkpoint.save(run, step)
    if step == o.steps:
        finish(run)
    else:
        run.say(f"stopped after step {step}; go on with: python train.py --resume --out {o.out}")
    run.world.close()


def main(argv=None):
    o = options.parse(argv, __doc__)
    if o.estimate:
        print(memory.overview(load_config(o.model), o))
    else:
        train(o)


if __name__ == "__main__":
    options.run_main(main)
