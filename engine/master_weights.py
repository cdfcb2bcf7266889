"""Train bfloat16 weights with separate float32 master weights, so that 7B fits on one GPU.

At a learning rate of 1e-6, AdamW's steps are too small to change a bfloat16 weight, so training
needs float32 master weights. The forward pass and the sampler need only bfloat16. Two options
select where the float32 part is kept:

    --split-master   The GPU keeps the low 16 bits of each float32 weight as an int16, next to the
                     bfloat16 weight that holds the high bits. Gradients and moments are float32.
                     This takes 16 bytes per parameter in all. Float32 weights and a bfloat16
                     replica would take 18, and autocast's copies 2 more. 7B fits in 141 GB.
    --offload        Main memory keeps complete float32 weights and both moments. 6 bytes per
                     parameter stay on the GPU: the bfloat16 weights and the float32 sum of the
                     gradient. There is one transfer in each direction per optimizer step, not per
                     forward pass. 7B fits in 80 GB.

Gradients arrive in bfloat16 after each backward pass and are summed in float32. The steps equal
those of AdamW in float32 to the last bit (tests/test_master_weights.py). Responses are drawn from
the model itself, so there is no replica.
"""

import torch
from torch.optim.adamw import adamw as functional_adamw

from common.devices import pins_memory
from engine.fast import FastEngine

LOW = torch.bfloat16
CHUNK = 2**26  # weights that are updated at a time


def split(master):
    """Return float32 weights as (nearest bfloat16, int16 difference to add to its bits)."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16  # non-finite updates are skipped before
    low = (bits - (high << 16)).to(torch.int16)
    return high.to(torch.int16).view(LOW), low


def join(high, low):
    """Return the float32 weights that `split` has split, bit for bit."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(
        torch.float32
    )


class MasterWeightEngine(FastEngine):
    """Engine with bfloat16 weights and separate float32 master weights."""

    def __init__(self, policy, options, dist, *more):
        self.masters = Masters(policy, options.offload)
        super().__init__(policy, options, dist, *more)

    def _samples_from_a_replica(self):
        return False  # the policy is bfloat16 itself

    def _make_optimizer(self, groups):
        settings = dict(lr=self.options.lr, weight_decay=self.options.weight_decay)
        return MasterAdamW(groups, self.masters, **settings)

    def _clip_gradients(self):
        return self.masters.clip(self.options.grad_clip).item()

    def full_tensor(self, parameter):
        return self.masters.full_tensor(parameter)

    def strided_sample(self, parameter, every):
        return self.masters.strided_sample(parameter, every)

    def moment_template(self, parameter):
        return self.masters.rest[parameter]


class Masters:
    """Float32 master weights and summed gradients of a model, by parameter.

    `rest` holds the whole float32 weights if they are in main memory, otherwise their low 16 bits.
    """

    def __init__(self, model, in_main_memory):
        self.in_main_memory, self.rest, self.gradients = in_main_memory, {}, {}
        for p in model.parameters():  # tied parameters appear once
            whole = p.detach()
            if in_main_memory:
                self.rest[p] = whole.to("cpu", copy=True)
                p.data = whole.to(LOW)
            else:
                p.data, self.rest[p] = split(whole)
            p.register_post_accumulate_grad_hook(self._collect)
        if in_main_memory:  # gradients and new weights pass through these (pinned) buffers
            size = min(CHUNK, max(p.numel() for p in self.rest))
            pinned = dict(pin_memory=pins_memory(next(model.parameters()).device))
            self.down, self.up = torch.empty(size, **pinned), torch.empty(size, dtype=LOW, **pinned)

    def _collect(self, p):
        """Add a parameter's gradient to the sum of this update, and free the gradient.

        This hook runs as soon as a backward pass has accumulated the gradient.
        """
        if p in self.gradients:
            self.gradients[p].add_(p.grad)
        else:
            self.gradients[p] = p.grad.to(torch.float32)
        p.grad = None

    def full_tensor(self, p):
        """Return a parameter's float32 weights."""
        return self.rest[p] if self.in_main_memory else join(p.detach(), self.rest[p])

    def strided_sample(self, p, every):
        """Return every `every`-th of a parameter's float32 weights, flattened."""
        rest, own = (x.view(-1)[::every] for x in (self.rest[p], p.detach()))
        return rest if self.in_main_memory else join(own, rest)

    def clip(self, largest):
        """Scale the gradient to a norm of at most `largest`. Return the norm before scaling."""
        gradients = list(self.gradients.values())
        norm = torch.nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp_max(1.0))
        return norm


class MasterAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW (fused) on master weights.

    A parameter without a gradient is skipped, with its weight decay and moments.
    """

    def __init__(self, groups, masters, lr, weight_decay):
        self.masters = masters
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.masters.gradients:
                    self._step(p, group)

    def _step(self, p, group):
        rest, state = self.masters.rest[p], self.state[p]
        if not state:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(rest, dtype=torch.float32)
            state["step"] = torch.zeros((), device=rest.device)
        parts = (self.masters.gradients[p], p.data, rest, state["exp_avg"], state["exp_avg_sq"])
        flat = [x.view(-1) for x in parts]
        for i in range(0, p.numel(), CHUNK):
            gradient, high, low, *moments = (x[i : i + CHUNK] for x in flat)
            if self.masters.in_main_memory:
                n = len(high)
                self.masters.down[:n].copy_(gradient)
                adamw(low, self.masters.down[:n], *moments, state["step"], group)
                high.copy_(self.masters.up[:n].copy_(low))
            else:
                weights = join(high, low)
                adamw(weights, gradient, *moments, state["step"], group)
                new_high, new_low = split(weights)
                high.copy_(new_high), low.copy_(new_low)
        state["step"] += 1

    def zero_grad(self, set_to_none=True):
        self.masters.gradients.clear()


def adamw(weights, gradient, first, second, step, group):
    """Take one step of PyTorch's fused AdamW on flat float32 tensors, in place."""
    functional_adamw(
        [weights],
        [gradient],
        [first],
        [second],
        [],
        [step.clone()],  # adamw increments its copy
        fused=True,
        amsgrad=False,
        beta1=0.9,
        beta2=0.999,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=1e-8,
        maximize=False,
    )
