"""Reinforcement learning of a causal language model with GRPO, DAPO or HAPO; bottom-up with BuPO.

    python train.py                                             a tiny Qwen3 learns on a laptop
    python train.py --model Qwen/Qwen3-0.6B --data train.jsonl  a real model, a file of questions

Read `train_step` first: six paragraphs, in the order in which things happen. HAPO differs from its
baseline DAPO at four places, marked HAPO A to D; BuPO at seven, marked BuPO 1 to 7. The settings
stand in run/options.py, what lives from step to step in run/state.py. Everything that serves speed
is in fast/, and `--plain` runs without it.

A run is a function of its options and its seed: every random draw is seeded by (seed, step). On a
CPU nothing else is random; a GPU may add in another order.

Shapes: P prompts a step, G answers each, B = P G answers, T positions of the longest answer.
"""

import contextlib
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

import bupo
import hapo
import internals
import losses
from program.command import run_main
from program.errors import NonFinite
from program.models import load_config
from run import checkpoint, report
from run.ending import finish, give_up
from run.guard import StopRequest
from run.opening import open_run
from run.options import Options, parse
from run.state import Run, Stopwatch
from sampling import Rollout, Temperature, generate, rows_of
from scale import memory, shard
from tasks import Grade, grade

# ---------------------------------------------------------------------------------------- one step


@dataclass(kw_only=True)
class Batch:
    """The answers of one step on their way from sampling to the update.

    One value an answer (B,) or a token (B, T); `problems` one a prompt. A new quantity is one line
    here: `select` and `join` carry it along.
    """

    problems: list  # (P,)
    texts: list  # (B,) decoded answers
    rollout: Rollout
    strict: Tensor  # (B,) bool, the two verdicts of every answer
    lenient: Tensor  # (B,) bool
    right: Tensor  # (B,) bool, the verdict that is paid (--reward)
    rewards: Tensor  # (B,) what it is paid: the verdict, less any length penalty
    # what follows is there once the step has got to it
    drawn: "Batch" = None  # where dynamic sampling has replaced groups: all that were drawn
    # masks: rollout.mask, all tokens; in_loss, answers; loss_mask, tokens of those answers; and
    # in `advantages` those of live groups alone
    loss_mask: Tensor = None  # (B, T) bool, tokens in the loss
    in_loss: Tensor = None  # (B,) bool, false in groups that stayed dead under dynamic sampling
    entropy: Tensor = None  # (B, T) of the full policy before the first update
    old_logp: Tensor = None  # (B, T) of the trained policy before the first update
    trained_entropy: Tensor = None  # (B, T) of the trained policy: the same but in BuPO's phase 1
    ref_logp: Tensor = None  # (B, T) of the initial model
    h: Tensor = None  # (B, T) HAPO's modulation
    advantages: Tensor = None  # (B, T)
    stats: hapo.EntropyStats = None  # what h was made of
    bounds: Tensor = None  # (B, T) clip distances of --comparison archer

    def select(self, groups: list[int]) -> "Batch":
        """The batch of some of its groups, in that order, as it comes from sampling."""
        rows = rows_of(groups, self.rollout.group_size)
        chosen = {"problems": [self.problems[p] for p in groups]}
        for name, value in self._present():
            if isinstance(value, Rollout):
                chosen[name] = value.select(groups)
            elif isinstance(value, list) and name not in chosen:
                chosen[name] = [value[row] for row in rows]
            elif isinstance(value, Tensor):
                chosen[name] = value[rows]
        return Batch(**chosen)

    @staticmethod
    def join(parts: list["Batch"]) -> "Batch":
        """Several batches with the same G as one, as they come from sampling."""
        joined = {}
        for name, value in parts[0]._present():
            values = [getattr(part, name) for part in parts]
            if isinstance(value, Rollout):
                joined[name] = Rollout.join(values)
            elif isinstance(value, list):
                joined[name] = sum(values, [])
            elif isinstance(value, Tensor):
                joined[name] = torch.cat(values)
        return Batch(**joined)

    def to(self, device: str | torch.device) -> "Batch":
        """The batch on another device."""
        values = self._present()
        return Batch(**{k: v.to(device) if hasattr(v, "to") else v for k, v in values})

    def _present(self):
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return [(name, value) for name, value in values if value is not None]


class Update(NamedTuple):
    """What one update did, over all processes. The defaults are those of a dead one."""

    # applied; skipped: NaN or infinity; rescaled: float16 overflowed; dead: nothing to learn from
    outcome: str = "dead"
    tokens: int = 0  # in the loss
    loss: float = 0.0
    grad_norm: float = 0.0  # before clipping
    ratio_max: float = 0.0
    ratio_off: float = 0.0  # largest |ratio - 1|
    # sums over tokens
    clip_low: float = 0.0  # whose gradient the lower bound removed
    clip_high: float = 0.0  # whose gradient the upper bound removed
    outside: float = 0.0  # whose ratio is outside the bounds
    clamped: float = 0.0  # whose log-ratio is beyond +-20
    kl_old: float = 0.0  # k3 estimate of KL(old || new): the answers are the old policy's


class Step(NamedTuple):
    """What a step did: report.step_metrics makes a line of metrics.jsonl of it."""

    number: int
    layer: int | None  # whose policy was trained; None: the model's own
    batch: Batch
    updates: list[Update]
    seconds: dict[str, float]


def train_step(step: int, run: Run) -> Step:
    """One batch of answers, from prompts to updated weights."""
    options, clock = run.options, Stopwatch()

    # 1. Sample G answers to each prompt from the policy as it is, and grade them right or wrong.
    shard.refresh_actor(run.actor, run.policy)  # on a CPU the two are one model
    batch = run.last_batch = collect(step, run)
    run.check_finite(batch.rewards, "a reward")
    clock.lap("generate")

    # 2. Choose whose policy learns: the model's own (None) or, in BuPO's first phase, layer l's.
    layer = trained_layer(step, batch, run) if options.bupo_layer else None

    # 3. Score every token under that policy before its first update: the ratio's denominator.
    # It is not rollout.logp, since every token was drawn at a temperature of its own: a ratio must
    # compare one function before and after, and that is this one, at T_base. What is left is a
    # known mismatch: the answers come from a slightly different distribution, uncorrected.
    # Each update takes an equal part of the batch, whole groups, and is scored in the passes that
    # it will make: the first ratios are exactly 1. Prompts came in random order: no shuffling.
    of_updates = torch.arange(len(batch.texts)).view(options.updates_per_rollout, -1).tolist()
    old = score(run.policy, batch.rollout, of_updates, layer, run)
    batch.old_logp, batch.trained_entropy = old  # at T_base; rollout.entropy is that of raw logits
    # BuPO 1: no layer above l runs in phase 1; the full policy's entropy is what the sampler saw
    batch.entropy = batch.trained_entropy if layer is None else batch.rollout.entropy
    if run.reference is not None and layer is None:  # BuPO 2: no reference in phase 1
        batch.ref_logp, _ = score(run.reference, batch.rollout, of_updates, None, run, False)
    scored = (batch.old_logp + batch.entropy)[batch.rollout.mask]  # NaN if one of them is
    run.check_finite(scored, "a log-probability or entropy of the old policy")

    # 4. Where does HAPO stand? One h in [-1, 1] a token, from the statistics of all entropies.
    if options.algo == "hapo":
        batch.stats = statistics(batch.entropy, batch, run)
        batch.h = hapo.modulation(batch.entropy, batch.stats, batch.loss_mask, options.released)
        if options.adaptive_temperature:  # for the next step's answers, of what its sampler sees
            run.sampler_stats = statistics(batch.rollout.entropy, batch, run)

    # 5. Advantages: how much better is an answer than the others to its prompt?
    batch.advantages = advantages(batch, run)
    if options.comparison == "archer":
        batch.bounds = losses.archer_bounds(batch.entropy, batch.loss_mask)
    clock.lap("score")

    # 6. Update the policy on each part of the batch in turn.
    prepare_updates(step, layer, run)
    updates = []
    for rows in of_updates:
        updates.append(update(batch, rows, layer, run))
    clock.lap("update")
    return Step(step, layer, batch, updates, clock.seconds)


# ------------------------------------------------------------------------------ 1. sample and grade


def collect(step: int, run: Run) -> Batch:
    """The step's answers, and which of them are in the loss: all, unless --dynamic-sampling."""
    drawn = sample_round(step, 0, run)
    if run.options.dynamic_sampling:
        batch = sample_live_groups(drawn, step, run)
        batch.in_loss = live_groups(batch).repeat_interleave(run.options.answers_per_prompt)
        batch.loss_mask = batch.rollout.mask & batch.in_loss[:, None]
        return batch
    drawn.in_loss, drawn.loss_mask = torch.ones_like(drawn.right), drawn.rollout.mask
    return drawn


def sample_live_groups(drawn: Batch, step: int, run: Run) -> Batch:
    """DAPO: groups that are all right or all wrong make room for new ones, for some rounds; those
    that are still dead then keep their place and stay out of the loss.

    The first P live groups are taken, of all processes together, and dealt out to the updates in
    turn: every update gets its share of them.
    """
    options = run.options
    for attempt in range(1, options.max_rounds):
        if run.world.sum(live_groups(drawn).sum()) >= options.prompts_per_step:
            break
        drawn = Batch.join([drawn, sample_round(step, attempt, run)])
    everywhere = Batch.join(run.world.exchange(drawn))
    # as one process would have drawn them: prompts were dealt out to the processes in turn
    order = torch.arange(len(everywhere.problems)).view(run.world.size, -1).T.flatten()
    live_first = (~live_groups(everywhere).cpu()[order]).int().argsort(stable=True)
    chosen = order[live_first][: options.prompts_per_step]
    dealt = chosen.view(-1, options.updates_per_rollout).T.flatten().tolist()
    batch = everywhere.select(run.world.mine(dealt))
    batch.drawn = drawn
    return batch


def live_groups(batch: Batch) -> Tensor:
    """Groups with right and wrong answers, (P,); the others teach nothing, whatever length
    penalties make of their rewards."""
    right = batch.right.view(-1, batch.rollout.group_size)
    return right.any(1) & ~right.all(1)


def sample_round(step: int, attempt: int, run: Run) -> Batch:
    """Draw P prompts, sample G answers to each, grade them."""
    options, G, cap = run.options, run.options.answers_per_prompt, run.options.max_new_tokens
    problems, prompts = (list(x) for x in zip(*run.draw_items()))
    how = dict(temperature=temperature_rule(run), uniform=run.uniform(step, attempt))
    # BuPO 3: scoring cannot see the full policy's entropy in phase 1, so the sampler measures it
    # (by the options alone: in the first step the layer is not chosen yet)
    aligning = options.bupo_layer and options.bupo_arm == "align" and step <= options.bupo_steps
    how |= dict(measure_entropy=bool(aligning), vocab_size=run.vocab_size, plain=options.plain)
    how |= dict(decode_rows=options.decode_rows, prefill_tokens=options.prefill_tokens)
    how |= dict(capture=options.capture)
    rollout = run.together(generate, run.actor, prompts, G, cap, run.eos_ids, **how)
    texts = run.tokenizer.batch_decode(rollout.answers(), skip_special_tokens=True)
    grades = [grade(problems[row // G], text) for row, text in enumerate(texts)]
    verdicts = (torch.tensor(column, device=run.world.device) for column in zip(*grades))
    verdicts = dict(zip(Grade._fields, verdicts))
    chance = options.reward == "random"  # a control: nothing can be learned from it
    verdicts["right"] = run.coins(step, attempt) if chance else verdicts[options.reward]
    rewards = verdicts["right"].float()
    if options.overlong_buffer:
        rewards += losses.overlong_penalty(rollout.lengths, cap, options.overlong_buffer)
    return Batch(problems=problems, texts=texts, rollout=rollout, rewards=rewards, **verdicts)


def temperature_rule(run: Run) -> Temperature:
    """What the sampler divides logits by: T_base, or a function of each step's entropy."""
    o = run.options
    if o.algo == "hapo" and o.adaptive_temperature:  # HAPO A
        return lambda entropy: hapo.adaptive_temperature(
            entropy, run.sampler_stats, o.temperature, o.tau, o.temperature_form, o.released
        )
    return o.temperature


# --------------------------------------------------------------------------------- 2. whose policy


def trained_layer(step: int, batch: Batch, run: Run) -> int | None:
    """BuPO 4: layer l while its policy is aligned, else None, the model's own policy."""
    options = run.options
    if run.layer is None:
        run.layer = choose_layer(batch, run)
        run.optimizer = run.make_optimizer()  # nothing was updated yet; layer-lr groups by layer
    aligns = options.bupo_arm == "align"
    return bupo.target_layer(step, options.bupo_steps, run.layer) if aligns else None


def choose_layer(batch: Batch, run: Run) -> int:
    """--bupo-layer: the number given, or the boundary layer measured on 64 of the answers."""
    options = run.options
    ids, attention, response = batch.rollout.with_response_mask(64 // run.world.size)
    if options.bupo_layer != "auto":
        with torch.no_grad():  # refuses blocks that are not pre-norm residual
            internals.residual_stream(run.policy, ids[:2], attention[:2])
        shard.reshard(run.policy)
        return int(options.bupo_layer)
    entropy = internals.internal_entropy(run.policy, ids, attention, response, run.vocab_size)
    shard.reshard(run.policy)
    tokens = response.sum()  # entropies are means over tokens, also over processes
    change = run.world.sum(entropy.feed_forward_change * tokens.cpu()).cpu()
    change = change / run.world.sum(tokens).cpu()
    layer, found = bupo.boundary_or_fallback(change)
    where = f"{layer} of {len(change)} ({change[layer - 1]:+.3f} nats)"
    if found:
        margin = change[layer - 1 :].abs().min()  # of the layers whose signs decide
        run.say(
            f"boundary layer: {where}, the last whose feed-forward block raises entropy, on "
            f"{len(ids)} answers; no deciding change is nearer to 0 than {margin:.3f} nats. Its "
            f"policy is trained for {options.bupo_steps} steps"
        )
    else:
        run.say(
            "warning: --bupo-layer auto: no feed-forward block raises entropy; "
            f"falling back to layer {where}, where it falls least"
        )
    return layer


# ---------------------------------------------------------------------------------------- 3. score


@torch.no_grad()
def score(
    model: nn.Module,
    rollout: Rollout,
    of_updates: list[list[int]],
    layer: int | None,
    run: Run,
    measure_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every token, (B, T), in the passes that each update, on its
    rows, will make. Without measure_entropy the second is 0."""
    logp, entropy = torch.zeros(2, *rollout.mask.shape, device=run.world.device)
    for rows in of_updates:
        for part, _ in run.passes(rollout, rows):
            scored = token_scores(model, rollout, part, layer, run, measure_entropy)
            logp[part], entropy[part] = scored[0], scored[1] if measure_entropy else 0.0
    shard.reshard(model)
    return logp, entropy


def token_scores(
    model: nn.Module,
    rollout: Rollout,
    rows: list[int],
    layer: int | None,
    run: Run,
    measure_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability and entropy of some answers at T_base, (rows, T), of layer l's policy or the
    model's own (None), 0 at padding: one function for old, new and reference."""
    options, mask = run.options, rollout.mask[rows]
    norm = layer is None or options.bupo_norm  # BuPO 5: an internal policy has no final norm
    with run.autocast():
        states = internals.answer_states(model, rollout, rows, layer, norm, options.plain)
        weight = internals.unembedding(model)[: run.vocab_size]  # padding ids: probability 0
        how = dict(plain=options.plain, measure_entropy=measure_entropy)
        logp, entropy = losses.token_logprobs_and_entropy(
            states, weight, rollout.tokens[rows][mask], options.temperature, **how
        )
    blank = torch.zeros(mask.shape, device=mask.device)
    logp = blank.masked_scatter(mask, logp)
    return logp, blank.masked_scatter(mask, entropy.detach()) if measure_entropy else None


# ----------------------------------------------------------------------------------- 4. statistics


def statistics(entropy: Tensor, batch: Batch, run: Run) -> hapo.EntropyStats:
    """Of every sampled token, over all processes; also in dead groups: all right or all wrong."""
    pool = run.world.gather(entropy[batch.rollout.mask])
    return hapo.entropy_stats(pool, torch.ones_like(pool), run.options.rho)


# ----------------------------------------------------------------------------------- 5. advantages


def advantages(batch: Batch, run: Run) -> Tensor:
    """(B, T): HAPO's B, or a group rule and what a comparison arm makes of it; 0 in dead groups."""
    options, G = run.options, run.options.answers_per_prompt
    live = live_groups(batch).repeat_interleave(G)
    mask = batch.loss_mask & live[:, None]
    if options.algo == "hapo" and options.token_group_average:  # HAPO B
        return hapo.token_group_advantages(batch.rewards, mask, G, options.released)
    per_answer = losses.GROUP_RULES[options.advantage](batch.rewards, G)
    if options.comparison == "edge":
        mean_entropy = (batch.entropy * mask).sum(1) / mask.sum(1).clamp_min(1)
        per_answer = losses.edge_advantages(per_answer, mean_entropy, G)
    result = per_answer[:, None] * mask
    if options.comparison == "entropy-advantage":
        result = losses.entropy_advantage(result, batch.entropy)
    if options.comparison == "forking":  # the others' tokens stay in the mean, as zeros
        entropies = run.world.gather(batch.entropy[batch.loss_mask])
        result = result * losses.forking_token_mask(batch.entropy, batch.loss_mask, pool=entropies)
    return result


# --------------------------------------------------------------------------------------- 6. update


def prepare_updates(step: int, layer: int | None, run: Run) -> None:
    """Linear warm-up; and what may not move in the first phase of BuPO."""
    options = run.options
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * min(1.0, step / max(1, options.warmup_steps))
    if options.bupo_norm:  # BuPO 5: phase 1 applies the final norm and leaves it as it is
        internals.decoder_body(run.policy).norm.requires_grad_(layer is None)
    if run.layer is not None and options.bupo_arm == "freeze":  # BuPO 6: a comparison arm
        for p in bupo.lower_layers(run.policy, run.layer):
            p.requires_grad_(step > options.bupo_steps)
    if run.layer is not None and options.bupo_arm == "one-layer":  # BuPO 6: another
        for p in bupo.all_but_layer(run.policy, run.layer):
            p.requires_grad_(step > options.bupo_steps)


def update(batch: Batch, rows: list[int], layer: int | None, run: Run) -> Update:
    """One optimiser step; skipped, weight decay included, where every group of `rows` is dead."""
    options, policy, mask = run.options, run.policy, batch.loss_mask[rows]
    learns = batch.advantages[rows][mask].any()
    if options.kl and batch.ref_logp is not None:
        learns |= mask.any()  # an update without a token moves nothing: no momentum, no decay
    # The loss is divided by the whole update's numbers, fixed before it is cut into passes.
    tokens = int(run.world.sum(mask.sum()))
    responses = int(run.world.sum(batch.in_loss[rows].sum()))
    if not run.world.any(learns):
        return Update()
    sums, ratio_max, ratio_off = {}, 0.0, 0.0
    for part, weight in run.passes(batch.rollout, rows):
        logp, _ = token_scores(policy, batch.rollout, part, layer, run)
        per_token, seen, ratio = policy_loss(logp, batch, part, options)
        loss = mean_loss(per_token, batch.loss_mask[part], tokens, responses, options) * weight
        run.backward(loss)
        for name, value in (seen | {"loss": loss.detach()}).items():
            sums[name] = sums.get(name, 0.0) + float(value) * weight
        ratio_max = max(ratio_max, float(ratio.max()))
        ratio_off = max(ratio_off, float((ratio - 1).abs().max()))
    sums, (ratio_max, ratio_off) = run.total(sums), run.largest(ratio_max, ratio_off)
    grad_norm = run.clip_gradients()
    outcome = run.guard.judge(sums["loss"], grad_norm, run.rescale())
    if outcome == "applied":
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return Update(outcome, tokens, sums.pop("loss"), grad_norm, ratio_max, ratio_off, **sums)


def policy_loss(
    logp: Tensor, batch: Batch, rows: list[int], options: Options
) -> tuple[Tensor, dict, Tensor]:
    """The loss of some rows, one value a token; sums over their tokens; the ratios in the loss."""
    old_logp = batch.old_logp[rows]
    ratio = losses.likelihood_ratio(logp, old_logp)
    weighed, low, high = weigh(ratio, batch, rows, options)
    loss = losses.clipped_surrogate(ratio, weighed, low, high, options.dual_clip or None)
    if options.sampler_correction:
        loss = loss * losses.truncated_weight(old_logp, batch.rollout.logp[rows])
    if options.kl and batch.ref_logp is not None:
        loss = loss + options.kl * losses.kl_k3(logp, batch.ref_logp[rows])
    with torch.no_grad():
        valid, below, above = batch.loss_mask[rows], ratio < 1 - low, ratio > 1 + high
        seen = {
            "clip_low": (valid & below & (weighed < 0)).sum(),
            "clip_high": (valid & above & (weighed > 0)).sum(),
            "outside": (valid & (below | above)).sum(),
            "clamped": (valid & ((logp - old_logp).abs() > losses.LOG_RATIO_LIMIT)).sum(),
            "kl_old": losses.kl_k3(old_logp, logp)[valid].sum(),  # of KL(old || new)
        }
        return loss, seen, torch.where(valid, ratio, 1.0)


def weigh(
    ratio: Tensor, batch: Batch, rows: list[int], options: Options
) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """What a token's ratio meets: its advantage, and its clip distances below and above 1."""
    weighed, low, high = batch.advantages[rows], options.clip_low, options.clip_high
    if options.algo == "hapo":
        h = batch.h[rows]
        if options.adaptive_clip:  # HAPO D
            low, high = hapo.adaptive_clip(h, low, high)
        if options.advantage_redistribution:  # HAPO C
            zone = (low, high) if options.released else (options.clip_low, options.clip_high)
            weighed = hapo.redistribute_advantages(weighed, h, ratio, *zone, options.released)
    if batch.bounds is not None:
        low = high = batch.bounds[rows]
    return weighed, low, high


def mean_loss(
    per_token: Tensor, mask: Tensor, tokens: int, responses: int, options: Options
) -> Tensor:
    """--loss-mean: which tokens weigh how much."""
    if options.loss_mean == "token":
        return losses.masked_mean(per_token, mask, tokens)
    if options.loss_mean == "sequence":
        return losses.sequence_mean(per_token, mask, responses)
    return losses.fixed_length_mean(per_token, mask, options.max_new_tokens, responses)


# ----------------------------------------------------------------------------------------- the run


def train(options: Options) -> None:
    """Set a run up (or pick it up where it stopped), take its steps, leave its files."""
    run, step = open_run(options, shard.open_world(options.device))
    with run.lock or contextlib.nullcontext(), StopRequest(run.say) as stop:
        if step is None:
            report.first_look(run)
            step = 0
            checkpoint.save(run, step)
        while step < options.steps and not run.world.any(stop.asked):
            step += 1
            metrics, bad = guarded_step(step, run)
            report.record(step, metrics, bad, run)
            if bad and run.guard.bad_in_a_row >= options.max_bad_steps:
                give_up(run, step)
            due = step % options.save_every == 0 or step == options.steps
            if not bad and (due or run.world.any(stop.asked)):
                checkpoint.save(run, step)
    if step == options.steps:
        finish(run)
    else:
        again = f"python train.py --resume --out {options.out}"
        run.say(f"stopped after step {step}; go on with: {again}")
    run.world.close()


def close_up(step: Step, run: Run) -> dict:
    """One whole group for samples.jsonl, the most mixed: its rows, and what the step has made of
    every token, (G, T) each; ratios are those after the last update."""
    batch, G = step.batch, run.options.answers_per_prompt
    right = batch.right.view(-1, G).float().mean(1)
    first = G * int((right - 0.5).abs().argmin())
    rows = list(range(first, first + G))
    logp, _ = score(run.policy, batch.rollout, [rows], step.layer, run)
    ratio = losses.likelihood_ratio(logp[rows], batch.old_logp[rows])
    weighed, low, high = weigh(ratio, batch, rows, run.options)
    clipped = ((ratio > 1 + high) & (weighed > 0)).int() - ((ratio < 1 - low) & (weighed < 0)).int()
    h = {} if batch.h is None else {"h": batch.h[rows]}
    return {"rows": rows, "ratio": ratio, **h, "advantage": weighed, "clipped": clipped}


def guarded_step(step: int, run: Run) -> tuple[dict, str | None]:
    """One step with its evaluation: (metrics, None), or (what there is, why the step is bad)."""
    options = run.options
    try:
        before = report.weight_sample(run.policy, run.masters)
        done = train_step(step, run)
        metrics = report.step_metrics(done, before, run)
        run.shown = close_up(done, run)
        skipped = metrics["skipped_updates"]
        if skipped and not metrics["updates"]:
            return metrics, f"no update applied, {skipped} were not finite"
        if step % options.eval_every == 0 or step == options.steps:
            metrics |= report.held_out(run, step)
        if run.layer and options.diagnose_every and step % options.diagnose_every == 0:
            metrics |= report.diagnose(run)
        return metrics, None
    except NonFinite as error:
        return {"step": step, "skipped": str(error)}, str(error)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv, __doc__)
    if options.estimate:
        print(memory.overview(load_config(options.model), options))
    else:
        train(options)


if __name__ == "__main__":
    run_main(main)
