"""Define Engine, the plain implementation of what a training step computes.

It runs in one process with float32 weights, one response per row and the readable decoder. --plain
selects it. The engines that are faster, or that run in less precision, in less memory or on more
processes, have the same ten methods:

    engine/fast.py             FastEngine: fast decoder, packed rows, chunked logits, autocast
    engine/float16.py          Fp16Engine: float16 products and a scaled loss
    engine/master_weights.py   MasterWeightEngine: bfloat16 weights and separate float32 masters
    engine/fsdp.py             FsdpEngine: one model over several processes

Shapes are as in sampling.py: B responses, T response positions. `rows` selects some of the B.
"""

import contextlib
import math

import torch

import internals
import losses
import sampling
from common.devices import widest_float_dtype
from sampling import TokenScores


def autocast(device, dtype):
    """Return a context in which matrix products run in `dtype` (a name), the rest in float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, getattr(torch, dtype))


class SingleProcess:
    """The processes of a run with a single process: a sum over processes is the number itself.

    DistributedProcesses in engine/fsdp.py has the same methods for several processes.
    """

    size, rank, main, sharded = 1, 0, True, False

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        dtype = widest_float_dtype(self.device)
        self.zero = torch.zeros((), dtype=dtype, device=self.device)

    def all_reduce_sum(self, *numbers):
        """Return each number's sum over processes, as floats; synchronizes with the device once."""
        return torch.stack([self.zero + number for number in numbers]).tolist()

    def all_reduce_max(self, values):
        """Return the largest value over processes, a tensor of the same shape."""
        return torch.as_tensor(values, device=self.device)

    def any_process(self, flag):
        """Return whether the flag is set in one of the processes."""
        return bool(flag)

    def gather(self, values):
        """Return the values, (n,) in each process, of all processes as one tensor."""
        return values

    def gather_objects(self, thing):
        """Return a list of every process's object."""
        return [thing]

    def local_shard(self, items):
        """Return this process's share of a list."""
        return items

    def raise_on_all_ranks(self, errors, function, *args, **kwargs):
        """Return function(...). If one process raises one of `errors`, all processes raise."""
        return function(*args, **kwargs)

    def reshard(self, model):
        """Free the weights of a sharded model that a forward pass has gathered."""

    def close(self):
        """Leave the group of processes."""


def full_tensor(tensor):
    """Return a sharded tensor as an ordinary one; every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Engine:
    """A policy, its optimizer, and the methods by which a step samples, scores and updates.

    BuPO's first phase needs no code here: AdamW skips a weight without a gradient, with its weight
    decay and moments.
    """

    def __init__(self, policy, options, dist, vocab_size, eos_ids, groups=None):
        self.policy, self.options, self.dist = policy, options, dist
        self.vocab_size, self.eos_ids = vocab_size, eos_ids  # ids from vocab_size on are padding
        groups = groups or [{"params": list(policy.parameters()), "peak_lr": options.lr}]
        self.optimizer = self._make_optimizer(groups)

    # ------------------------------------------------------------------------------ sampling

    def generate(
        self, prompts, group_size, max_new_tokens, temperature, uniform, measure_entropy=False
    ):
        """Draw `group_size` responses to each prompt and return them as a sampling.Rollout."""
        return sampling.generate(
            self.policy,
            prompts,
            group_size,
            max_new_tokens,
            self.eos_ids,
            temperature,
            self.vocab_size,
            uniform,
            measure_entropy,
        )

    # ------------------------------------------------------------------------------- scoring

    def micro_batches(self, rollout, rows):
        """Split rows (a slice) into forward passes, at most --micro-batch responses in each."""
        size = self.options.micro_batch or rows.stop - rows.start
        return [slice(i, min(i + size, rows.stop)) for i in range(rows.start, rows.stop, size)]

    def token_logprobs(self, model, rollout, rows, layer, measure_entropy=True):
        """Return the TokenScores of some rows, (rows, T), whose logp is differentiable.

        They are computed at T_base under the policy of layer `layer`, or the model's own (None).
        Old, new and reference log-probabilities all come from this method.
        """
        norm = layer is None or self.options.bupo_norm  # BuPO 4: a layer's policy has no final norm
        packed = internals.unpacked(rollout, rows)
        states = internals.response_states(model, packed, layer, norm)
        weight = internals.unembedding(model)[: self.vocab_size]
        logp, entropy = losses.token_logprobs_and_entropy(
            states, weight, packed.tokens, self.options.temperature
        )
        return self._token_scores(model, rollout.mask[rows], layer, logp, entropy)

    def pack(self, rollout, rows):
        """Return the internals.PackedBatch of some rows, here with one response per row."""
        return internals.unpacked(rollout, rows)

    def batch_logprobs(self, model, rollout, mini_batches, layer, measure_entropy=True):
        """Return the TokenScores of a whole rollout, (B, T), without gradients.

        Each mini-batch is scored in the micro-batches that its update will use. Equal forward
        passes round equally, so the ratios of the first update are exactly 1.
        """
        logp, entropy = torch.zeros_like(rollout.logp), torch.zeros_like(rollout.logp)
        with torch.no_grad():
            for mini_batch in mini_batches:
                for rows in self.micro_batches(rollout, mini_batch):
                    scores = self.token_logprobs(model, rollout, rows, layer, measure_entropy)
                    logp[rows] = scores.logp
                    if scores.entropy is not None:
                        entropy[rows] = scores.entropy
        return scores._replace(logp=logp, entropy=entropy)

    def _token_scores(self, model, mask, layer, logp, entropy):
        """Return the TokenScores of values (N,), placed where `mask` (rows, T) is true."""
        policy = "full policy" if layer is None else f"layer {layer}"
        if model is not self.policy:
            policy = "reference"
        blank = torch.zeros(mask.shape, device=mask.device)
        logp = blank.masked_scatter(mask, logp)
        if entropy is not None:
            entropy = blank.masked_scatter(mask, entropy).detach()
        temperature = self.options.temperature
        return TokenScores(logp, entropy, policy, temperature, temperature)

    # ------------------------------------------------------------------------------ updating

    def backward(self, loss):
        """Add a micro-batch's gradient to the gradient of this update."""
        loss.backward()

    def optimizer_step(self, loss):
        """Clip the gradient and step, unless the loss or the gradient is NaN or infinite.

        Return (outcome, gradient norm before clipping); the outcome is "applied" or "skipped".
        """
        norm = self._clip_gradients()
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return "applied" if finite else "skipped", norm

    def _make_optimizer(self, groups):
        settings = dict(lr=self.options.lr, weight_decay=self.options.weight_decay)
        return torch.optim.AdamW(groups, fused=True, **settings)

    def _clip_gradients(self):
        """Scale the gradient to a norm of at most --grad-clip. Return the norm before scaling."""
        parameters = self.policy.parameters()
        return torch.nn.utils.clip_grad_norm_(parameters, self.options.grad_clip).item()

    # ------------------------------------------------------------- weights, for checkpoints

    def full_tensor(self, parameter):
        """Return a parameter's float32 weights as one ordinary tensor."""
        return parameter.detach()

    def strided_sample(self, parameter, every):
        """Return every `every`-th of a parameter's float32 weights, flattened."""
        return parameter.detach().flatten()[::every]

    def moment_template(self, parameter):
        """Return the tensor whose device and sharding the optimizer's moments must match."""
        return parameter
