"""What is chosen when a run opens, so that no step asks again: which function or object stands
behind each name that train.py calls."""

import contextlib
import functools

import torch

import bupo
import hapo
import internals
import losses
import sampling
from fast import decoding, lines
from fast.logprobs import chunked_logprobs_and_entropy
from program.errors import BadInput, NonFinite
from run import arms, rounds
from run.machine import Weights, split_rows
from run.own_reward import OwnReward
from run.state import Stopwatch
from scale.half import ScaledWeights
from scale.master import MasterWeights
from scale.passes import even_passes, one_exchange, passes_of_tokens
from scale.replica import Replica
from scale.shard import ShardedWeights


def choose(run):
    """Everything, once: weights with their optimiser, and how steps are taken."""
    run.layer = layer_of(run.options)
    run.weights = weights_of(run)
    run.actor = actor_of(run)
    choose_steps(run)


def choose_steps(run):
    """How steps are taken; leaves weights, moments and statistics as they are."""
    o = run.options
    run.mechanisms = o.hapo_mechanisms
    run.generate = decoder_of(run)
    run.layout = internals.one_line_each if o.plain else lines.layout_for(run.policy.config)
    run.scorer = losses.plain_logprobs_and_entropy if o.plain else chunked_logprobs_and_entropy
    run.passes = passes_of(run)
    run.autocast = autocast_of(run)
    run.schedule = schedule_of(run)
    run.temperature = temperature_of(o)
    run.verdict = arms.coin(run) if o.reward == "random" else paid(o.reward)
    run.clock = functools.partial(Stopwatch, run.ranks.device)
    run.pay = lambda right, problems, texts: right.float()
    if o.reward_function:
        run.own_reward = OwnReward(o.reward_function, functools.partial(print, flush=True))
        run.pay = functools.partial(own_rewards, run.own_reward)
    run.rounds = rounds.dynamic_sampling if o.dynamic_sampling else lambda collect, *a: collect(*a)
    run.mean_loss = mean_of(o)
    run.arms = [arms.ARMS[o.comparison]] if o.comparison in arms.ARMS else []
    run.rival = arms.LOSSES.get(o.comparison)
    if o.sampler_correction:
        run.arms.append(arms.corrected_sampler)
    run.movers = [arms.MOVERS[o.bupo_arm]] if o.bupo_arm in arms.MOVERS else []
    if o.bupo_norm:
        run.movers.append(arms.final_norm)


def layer_of(options):
    """BuPO's layer: a number, AUTO, or None where there is no BuPO."""
    if options.bupo_layer in ("", bupo.AUTO):
        return options.bupo_layer or None
    return int(options.bupo_layer)


def weights_of(run):
    """The weights with their optimiser: where and in which precision they are kept."""
    o = run.options
    groups = [{"params": list(run.policy.parameters())}]
    if o.bupo_layer and o.bupo_arm == "layer-lr":
        groups = arms.groups_by_layer(run.policy)
    for group in groups:
        group["peak_lr"] = o.lr
    if run.ranks.sharded:
        return ShardedWeights(run.policy, groups, o, run.ranks.size)
    if o.masters_apart:
        return MasterWeights(run.policy, groups, o)
    if o.dtype == "float16":
        return ScaledWeights(run.policy, groups, o, run.ranks.device.type, run.say)
    return Weights(run.policy, groups, o)


def actor_of(run):
    """() -> the model that answers are drawn from: the policy itself, or a replica of it in the
    compute dtype."""
    o = run.options
    if o.masters_apart or (o.dtype == "float32" and not run.ranks.sharded):
        return lambda: run.policy
    return Replica(run.policy, getattr(torch, o.dtype), run.ranks.device)


def decoder_of(run):
    """As sampling.generate."""
    o, decode = run.options, sampling.generate
    if not o.plain:
        sizes = dict(decode_rows=o.decode_rows, prefill_tokens=o.prefill_tokens)
        decode = functools.partial(decoding.generate, capture=o.capture, **sizes)
    if run.ranks.sharded:
        return functools.partial(run.ranks.together, (NonFinite, BadInput), decode)
    return decode


def passes_of(run):
    """(rollout, rows) -> the forward passes over these rows."""
    o = run.options
    passes = functools.partial(split_rows, size=o.micro_batch)
    if o.micro_tokens:
        packs = None if o.plain else functools.partial(lines.packs, run.policy.config)
        passes = functools.partial(passes_of_tokens, tokens=o.micro_tokens, packs=packs)
    if run.ranks.sharded:
        passes = functools.partial(even_passes, passes, run.ranks)
    if run.ranks.sharded and o.offload:
        passes = functools.partial(one_exchange, passes, run.policy)
    return passes


def autocast_of(run):
    """() -> a context in which products run in --dtype, everything else in float32."""
    dtype = getattr(torch, run.options.dtype)
    if dtype == torch.float32:
        return contextlib.nullcontext
    return functools.partial(torch.autocast, run.ranks.device.type, dtype)


def schedule_of(run):
    """step -> the layer whose policy learns, or None: the model's own."""
    o = run.options
    if not o.bupo_layer or o.bupo_arm != "align":
        return lambda step: None
    return lambda step: bupo.target_layer(step, o.bupo_steps, run.layer)


def temperature_of(options):
    """(entropies, statistics) -> temperatures: HAPO's A in one of its forms, or a rival."""
    o = options
    if o.temperature_form in arms.TEMPERATURES:
        rule = arms.TEMPERATURES[o.temperature_form]
        return functools.partial(rule, base=o.temperature, tau=o.tau)
    return functools.partial(
        hapo.adaptive_temperature,
        base=o.temperature,
        tau=o.tau,
        form=o.temperature_form,
        released=o.released,
    )


def paid(reward):
    """The verdict used as reward, of both: strict or lenient."""
    return lambda grades, step, attempt: getattr(grades, reward)


def own_rewards(function, right, problems, texts):
    """A reward for every answer, (B,), NaN where the function failed: then the step is bad."""
    G = len(texts) // len(problems)
    rewards = [function(problems[row // G], text) for row, text in enumerate(texts)]
    return torch.tensor(rewards, device=right.device)


def mean_of(options):
    """(per token, mask, tokens, answers) -> loss: --loss-mean, over the whole update's numbers."""
    if options.loss_mean == "token":
        return lambda loss, mask, tokens, answers: losses.masked_mean(loss, mask, tokens)
    if options.loss_mean == "sequence":
        return lambda loss, mask, tokens, answers: losses.sequence_mean(loss, mask, answers)
    length = options.max_new_tokens
    return lambda loss, mask, tokens, answers: losses.fixed_length_mean(loss, mask, length, answers)
