"""Estimate the memory a run needs, before any weight is loaded.

    weights      4 bytes per parameter, float32      gradients  4       AdamW's two moments  8
    replica      2 bytes per parameter on CUDA: the bfloat16 copy that responses are drawn
                 from; with FSDP, one in every process
    activations  those of one micro-batch in the update: with gradient checkpointing, one hidden
                 state per layer and one layer's activations; without it, every layer's. Short
                 responses are packed with their prompts, which needs a mask in every layer
    logits       one chunk of float32 logits, and what the backward pass holds in addition
    KV cache     keys and values of every response at full length, in the compute dtype

The peak is the largest sum of what exists at the same time: in sampling, updating or diagnostics.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM

from common.devices import total_memory
from common.errors import UserError
from engine.cuda_graphs import KEYS_STEP
from engine.logprobs import chunk_of
from engine.packing import LONGEST_ROW, choose_packing
from internals import LOGITS_CHUNK, decoder_body, diagnostic_batch_size

GIB = 2**30


class Estimate(NamedTuple):
    """Estimated bytes on one process's device, by part, and the peak."""

    parameters: int  # a count, not bytes
    weights: int
    gradients: int
    moments: int
    reference: int  # the initial model, for --kl
    replica: int
    activations: int
    logits: int
    kv_cache: int
    sampling: int  # logits and work buffers of one decoding step, or a prefill pass
    diagnostics: int  # every layer's states, and logits, for --diagnose-every and --bupo-layer auto
    peak: int


PARTS = Estimate._fields[1:-1]


def inner_size(config):
    """Return the inner size of a feed-forward block; some configurations have no such name."""
    return getattr(config, "intermediate_size", None) or 4 * config.hidden_size


def parameter_count(config):
    """Return the number of parameters of a model (tied ones once) and of one of its layers.

    The model is built on the meta device, without memory.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()  # transformers 5.0 does not tie on the meta device
    layer = decoder_body(model).layers[0]
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in layer.parameters())


def estimate(config, options, prompt_tokens=256, world_size=1, cuda=True, sharded=None):
    """Return the Estimate of one process's memory for the Options.

    prompt_tokens: tokens of a prompt. sharded: whether torchrun started the process; default: if
    there are several. Without a --dtype, products are taken to run in 16 bits.
    """
    parameters, layer_parameters = parameter_count(config)
    compute = 4 if options.dtype == "float32" else 2
    sharded = world_size > 1 if sharded is None else sharded
    apart = options.split_master or (options.offload and not sharded)
    vocab, hidden = config.vocab_size, config.hidden_size
    embedding = vocab * hidden * (1 if getattr(config, "tie_word_embeddings", False) else 2)
    held = parameters / world_size
    weights, gradients, moments = int(4 * held), int(4 * held), int(8 * held)
    if options.offload:  # masters and moments are in main memory
        weights, moments = (2 * parameters, 0) if apart else (0, 0)
        gradients = 4 * parameters
    reference = (2 if apart else 4) * int(held) if options.kl else 0
    copies = compute == 2 and not apart
    replica = compute * parameters if copies or sharded else 0

    activations, once_more = _activations(
        config, options, prompt_tokens, world_size, compute, apart
    )
    if sharded or (options.offload and not apart):  # the root and two layers are gathered at once
        activations += int(compute * (embedding + 2 * layer_parameters))
    elif copies:  # autocast keeps its 16-bit copies of the weights until the pass ends
        activations += compute * parameters
    elif apart:  # 16-bit gradients of a layer, until they are added to the float32 sums
        activations += compute * (embedding + layer_parameters)
    response_tokens = rows_in_a_pass(options, prompt_tokens, world_size) * options.max_new_tokens
    chunk = min(chunk_of(vocab, "cuda" if cuda else "cpu"), response_tokens)
    # logits, and their softmax or gradient; the unembedding's gradient, of used ids and of all ids
    logits = int(chunk * vocab * 8 + (1 if apart else 2) * 4 * vocab * hidden)
    # a checkpointed layer is recomputed after the chunks of logits have been freed
    activations += max(0, once_more - chunk * vocab * 8)
    kv_cache, sampling = _sampling(config, options, prompt_tokens, world_size, compute, cuda)
    peak = weights + moments + reference + replica
    diagnostics = 0
    if options.diagnose_every or options.bupo_layer == "auto":
        diagnostics = _diagnostics(config, options, prompt_tokens, compute, cuda)
        diagnostics += compute * parameters if copies else 0
    peak += max(gradients + activations + logits, kv_cache + sampling, diagnostics)
    parts = (weights, gradients, moments, reference, replica, activations, logits)
    return Estimate(parameters, *parts, kv_cache, sampling, diagnostics, int(peak))


def _diagnostics(config, options, prompt_tokens, compute, cuda):
    """Return the bytes of diagnostics.

    They hold the residual stream at the response tokens. For one chunk of these tokens they also
    hold logits and softmax, or logits and softmax of two layers and their divergence.
    """
    layers, vocab, S = (
        config.num_hidden_layers,
        config.vocab_size,
        prompt_tokens + options.max_new_tokens,
    )
    responses = min(64 if options.bupo_layer == "auto" else 32, options.responses_per_step)
    tokens = min(responses, diagnostic_batch_size(S)) * options.max_new_tokens
    # H, the outputs of both norms and H + A are float32; A and F are in the compute dtype
    stream = 4 * (layers + 1) + 3 * 4 * layers + 2 * compute * layers
    entropy = 8 * min(chunk_of(vocab, "cuda" if cuda else "cpu"), tokens)
    divergence = 20 * min(LOGITS_CHUNK // vocab, tokens) if options.diagnose_every else 0
    return tokens * config.hidden_size * stream + max(entropy, divergence) * vocab


def _sampling(config, options, prompt_tokens, world_size, compute, cuda):
    """Return (bytes of the KV cache, bytes of a decoding step's logits or of a prefill pass)."""
    G, sequence = options.num_generations, prompt_tokens + options.max_new_tokens
    responses = options.responses_per_step // world_size
    if options.decode_rows:
        responses = min(responses, options.decode_rows // G * G)
    if cuda and options.capture:
        sequence = math.ceil(sequence / KEYS_STEP) * KEYS_STEP
    keys = 2 * config.num_hidden_layers * _heads(config)[1] * _heads(config)[2] * compute
    drawing = responses * config.vocab_size * 4 * 4  # two sets of logits and the draw's two buffers
    read = min(options.prefill_tokens, responses // G * prompt_tokens)
    reading = read * compute * (3 * inner_size(config) + 4 * config.hidden_size)
    return int(responses * sequence * keys), int(max(drawing, reading))


def _heads(config):
    """Return the numbers of query heads and of key and value heads, and the size of a head."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def rows_in_a_pass(options, prompt_tokens, world_size):
    """Return how many responses of full length one forward and backward pass holds."""
    rows = options.responses_per_update // world_size
    rows = min(options.micro_batch or rows, rows)
    if options.micro_tokens:
        shared = 1 if options.plain else options.num_generations  # that share a prompt
        a_row = prompt_tokens / shared + options.max_new_tokens
        if prompt_tokens + options.max_new_tokens > LONGEST_ROW:
            a_row = prompt_tokens + options.max_new_tokens
        rows = min(rows, max(1, int(options.micro_tokens / a_row)))
    return rows


def _activations(config, options, prompt_tokens, world_size, compute, apart):
    """Return (bytes stored for the backward pass, bytes of the layer being recomputed).

    The second number is 0 without gradient checkpointing. Gathered or cast weights are not counted.
    """
    hidden, layers, longest = config.hidden_size, config.num_hidden_layers, options.max_new_tokens
    rows, G = rows_in_a_pass(options, prompt_tokens, world_size), options.num_generations
    lines, width = rows, prompt_tokens + longest
    packed = None
    if not options.plain:
        prompts = [prompt_tokens] * math.ceil(rows / G)
        packed = choose_packing(config, range(rows), [longest + 1] * rows, prompts, G)
    if packed:
        lines, width = len(packed[0]), packed[1]
    tokens, mask = lines * width, compute * lines * width**2 if packed else 0
    if options.micro_tokens and not packed:  # shorter responses fill a pass up to its limit
        everything = width * options.responses_per_update // world_size
        tokens = max(width, min(options.micro_tokens, everything))
    # What one layer stores per token: q, k and v, attention's output and its copy; in the
    # feed-forward block the gate, its activation, the other half and their product; inputs and
    # outputs of two norms, and the inputs of the seven matrices, of which autocast makes a copy
    # each (the residual stream stays float32)
    heads, kv_heads, head_dim = _heads(config)
    inner = 4 * inner_size(config) + 2 * heads * head_dim + 2 * kv_heads * head_dim
    outer = 28 if compute == 4 else (16 if apart else 26)  # bytes
    layer_bytes = tokens * (compute * inner + outer * hidden) + mask
    if options.gradient_checkpointing:
        return tokens * 4 * hidden * layers, layer_bytes
    return layers * layer_bytes, 0


def check_fit(need, config, options, prompt_tokens, device):
    """Raise UserError, naming the option to change, if the run cannot fit its device."""
    capacity = total_memory(device)
    if device.type != "cpu" and capacity and need.peak > capacity:
        raise UserError(
            f"this run needs {need.peak / GIB:.1f} GiB and the device has "
            f"{capacity / GIB:.1f}; try {what_to_change(need, options)}"
        )
    if options.plain and capacity:
        # logits, log-probabilities, probabilities and the gradient of one pass, float32
        rows = rows_in_a_pass(options, prompt_tokens, 1)
        whole = 16 * rows * options.max_new_tokens * config.vocab_size
        if whole > capacity:
            raise UserError(
                f"--plain: whole logits of a pass of {rows} responses need {whole / GIB:.1f} GiB "
                f"and there are {capacity / GIB:.1f}; leave --plain out, or try --micro-batch 1"
            )


def table(e, options, prompt_tokens=256):
    """Return an Estimate as text, one line per part."""
    lines = [
        f"memory a run needs on one GPU ({e.parameters / 1e6:.1f} M parameters"
        f"{', offload' if options.offload else ''}, prompts of {prompt_tokens} tokens, "
        f"responses of up to {options.max_new_tokens}):"
    ]
    for name in PARTS:
        lines.append(f"  {name.replace('_', ' '):12s}{getattr(e, name) / GIB:9.2f} GiB")
    peak = f"  {'peak':12s}{e.peak / GIB:9.2f} GiB  (sampling and updating do not overlap)"
    return "\n".join([*lines, peak])


def overview(config, options):
    """Return the text that --estimate prints.

    It lists the parts on one GPU, and the peaks of other ways to run that the options allow.
    """

    def peak(size=0, **changes):  # size: number of torchrun's processes; 0: without torchrun
        changed = dataclasses.replace(options, **changes)
        need = estimate(config, changed, world_size=max(1, size), sharded=size > 0)
        return f"{need.peak / GIB:9.2f} GiB a process"

    ways, here = {}, estimate(config, options, sharded=False)
    beside = f", and {16 * here.parameters / GIB:.1f} GiB of main memory"
    if not options.gradient_checkpointing:
        ways["--gradient-checkpointing"] = peak(gradient_checkpointing=True)
    if not (options.offload or options.split_master or options.dtype in ("float16", "float32")):
        ways["--split-master"] = peak(split_master=True)
        ways["--offload"] = peak(offload=True) + beside
    if not options.split_master and options.dtype != "float16":
        for size in (2, 4, 8):
            if options.prompts_per_step % (size * options.updates_per_rollout) == 0:
                ways[f"torchrun, {size} processes"] = peak(size)
        ways["torchrun, 1, --offload"] = peak(1, offload=True) + beside
    lines = [f"  {name:26s}{need}" for name, need in ways.items()]
    return "\n".join([table(here, options), *lines])


def what_to_change(e, options):
    """Return as text the option that lowers the largest part of an Estimate that does not fit."""
    states = e.weights + e.gradients + e.moments
    if e.kv_cache + e.sampling > e.gradients + e.activations + e.logits:
        rows = options.decode_rows or options.responses_per_step
        fewer = max(options.num_generations, rows // 2)
        return (
            f"--decode-rows {fewer} (fewer responses decoded at a time), or less than "
            f"--max-new-tokens {options.max_new_tokens}"
        )
    if e.activations > states / 2:
        rows = options.micro_batch or options.responses_per_update
        smaller = f"--micro-batch {max(1, rows // 2)}"
        return smaller if options.gradient_checkpointing else "--gradient-checkpointing"
    apart = options.split_master or options.offload
    other = "" if apart else "--split-master (a fifth less), --offload, or "
    return (
        f"{other}more processes (torchrun --nproc-per-node N): weights, gradients and moments "
        f"alone are {math.ceil(states / GIB)} GiB"
    )
