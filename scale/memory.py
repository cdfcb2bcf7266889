"""How much memory a configuration needs, before a weight is loaded.

    weights     4 bytes a parameter, float32           gradients  4          AdamW's two moments  8
    replica     2 bytes a parameter on CUDA (the bfloat16 copy that answers are drawn from; sharded: on every rank)
    activations of one micro-batch in the update: with gradient checkpointing one hidden state a layer and one layer's insides,
                without it every layer's insides; short answers share lines with their prompts, and those need a mask in every layer
    logits      one chunk of float32 logits and what its backward pass holds beside it
    KV cache    keys and values of every answer at full length, in the compute dtype
The largest sum of what is alive at the same time is the peak: sampling or updating.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM

import losses
from internals import answers_to_a_line, decoder_body

GIB = 2**30


class Estimate(NamedTuple):
    """Bytes on one process's device."""

    parameters: int  # a count, not bytes
    weights: int
    gradients: int
    moments: int
    replica: int
    activations: int
    logits: int
    kv_cache: int
    sampling: int  # logits of one decoding step and the draw's work
    peak: int


def parameter_count(config):
    """Parameters of a model, tied ones once; built on the meta device, so no memory is taken."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in decoder_body(model).layers[0].parameters())


def estimate(config, o, prompt_tokens=256, world_size=1, cuda=True):
    """Peak memory of one process for the Options `o`; prompts of `prompt_tokens` tokens."""
    parameters, layer_parameters = parameter_count(config)
    compute = 2 if cuda else 4
    sharded = world_size > 1 or o.offload
    hidden, layers, vocab = config.hidden_size, config.num_hidden_layers, config.vocab_size
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    embedding = vocab * hidden * (1 if config.tie_word_embeddings else 2)

    held = parameters / (world_size if sharded else 1)
    weights = gradients = 0 if o.offload else int(4 * held)
    moments = 0 if o.offload else int(8 * held)
    replica = 2 * parameters if cuda else (4 * parameters if sharded else 0)
    gathered = int(compute * (embedding + 2 * layer_parameters)) if sharded else 0  # the root and two layers at a time

    sequence = prompt_tokens + o.max_new_tokens
    rows = o.answers_per_update // world_size
    rows = min(o.micro_batch or rows, rows)
    if o.micro_tokens:
        rows = min(rows, max(1, o.micro_tokens // sequence))
    if o.micro_tokens:  # shorter answers fill a pass up to its limit, sorted by length across groups: they seldom share lines
        tokens, mask = max(sequence, min(o.micro_tokens, sequence * o.answers_per_update // world_size)), 0
    else:
        per_line = answers_to_a_line([min(rows, o.answers_per_prompt)], prompt_tokens, o.max_new_tokens, hidden)
        lines, width = math.ceil(rows / per_line), prompt_tokens + per_line * o.max_new_tokens
        tokens, mask = lines * width, compute * lines * width**2 if per_line > 1 else 0
    # what one layer keeps for its backward pass, in numbers a token: two norms' inputs and outputs (float32 under autocast: the
    # residual stream), q k v and attention's output, three of the feed-forward's inner size
    inner = 3 * config.intermediate_size + 2 * heads * head_dim + 2 * kv_heads * head_dim
    layer_bytes = tokens * (compute * inner + (4 + compute) * 4 * hidden) + mask
    autocast_weights = compute * parameters if cuda and not sharded else 0  # autocast's cast copies live until the pass ends
    activations = (tokens * 4 * hidden * layers + 2 * layer_bytes if o.gradient_checkpointing else layers * layer_bytes) + gathered + autocast_weights

    chunk = min(max(1, losses.LOGIT_CHUNK_BYTES // (4 * vocab)), rows * o.max_new_tokens)
    logits = int(chunk * vocab * 4 * 3 + 4 * vocab * hidden)  # logits, their gradient, its copy; the unembedding's own gradient
    answers = o.prompts_per_step * o.answers_per_prompt // world_size
    kv_cache = int(answers * sequence * layers * 2 * kv_heads * head_dim * compute)
    sampling = int(answers * vocab * (4 * 3 + compute))
    peak = weights + moments + replica + max(gradients + activations + logits, kv_cache + sampling)
    return Estimate(parameters, weights, gradients, moments, replica, activations, logits, kv_cache, sampling, int(peak))


def table(e, o, prompt_tokens=256):
    """The estimate as lines for people."""
    lines = [f"memory a run needs on one GPU ({e.parameters / 1e6:.1f} M parameters{', offload' if o.offload else ''}, prompts of {prompt_tokens} tokens, answers of up to {o.max_new_tokens}):"]
    for name in ("weights", "gradients", "moments", "replica", "activations", "logits", "kv_cache", "sampling"):
        lines.append(f"  {name.replace('_', ' '):12s}{getattr(e, name) / GIB:9.2f} GiB")
    lines.append(f"  {'peak':12s}{e.peak / GIB:9.2f} GiB  (sampling and updating do not overlap)")
    return "\n".join(lines)


def overview(config, o):
    """What `--estimate` prints: the parts on one GPU, and the peaks of other ways to run it."""
    peak = lambda size=1, **changes: estimate(config, dataclasses.replace(o, **changes), world_size=size).peak / GIB
    ways = {} if o.gradient_checkpointing else {"--gradient-checkpointing": peak(gradient_checkpointing=True)}
    ways |= {f"torchrun, {size} processes": peak(size) for size in (2, 4, 8) if o.prompts_per_step % (size * o.updates_per_rollout) == 0}
    ways["torchrun, 1, --offload"] = peak(offload=True)
    lines = [table(estimate(config, o), o)] + [f"  {name:26s}{gib:9.2f} GiB a process" for name, gib in ways.items()]
    return "\n".join(lines) + f", and {16 * estimate(config, o).parameters / GIB:.1f} GiB of main memory"


def what_to_change(e, o):
    """The option that lowers the largest part of an estimate that does not fit."""
    update = e.gradients + e.activations + e.logits
    if e.kv_cache + e.sampling > update:
        return f"less than --prompts-per-step {o.prompts_per_step} or --max-new-tokens {o.max_new_tokens} (the KV cache of all answers)"
    if e.activations > (e.weights + e.gradients + e.moments) / 2:
        return "--gradient-checkpointing" if not o.gradient_checkpointing else f"--micro-batch {max(1, (o.micro_batch or o.answers_per_update) // 2)}"
    return "more processes (torchrun --nproc-per-node N) or --offload: weights, gradients and moments alone are " + f"{math.ceil((e.weights + e.gradients + e.moments) / GIB)} GiB"
