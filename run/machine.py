"""What a step asks of the machine: its processes, and the weights that are trained.

Here are one process and float32 weights. What runs on several processes, in float16, or with its
weights somewhere else has the same methods: scale/.
"""

import math

import torch

from program.devices import widest


class OneProcess:
    """One process: nothing is exchanged."""

    size, rank, main, sharded = 1, 0, True, False

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        self.zero = torch.zeros((), dtype=widest(self.device), device=self.device)

    def total(self, *numbers):
        """Each number's sum over processes, floats. One wait for the device, not one each."""
        return torch.stack([self.zero + number for number in numbers]).tolist()

    def sum(self, x):
        """The same of a tensor."""
        return torch.as_tensor(x, device=self.device)

    max = sum  # of one process: the number itself

    def any(self, flag):
        return bool(flag)

    def gather(self, values):
        return values  # (n,) of every process, one behind the other

    def gather_objects(self, thing):
        return [thing]

    def mine(self, items):
        return items  # this process's share of them

    def together(self, errors, function, *args, **kwargs):
        """function(...); if one process fails, all stop."""
        return function(*args, **kwargs)

    def reshard(self, model):
        """Let go of weights that a forward pass has gathered."""

    def close(self):
        pass


class Weights:
    """Float32 weights on one device, and their AdamW.

    BuPO's first phase needs nothing special: AdamW passes by a weight without a gradient, decay and
    moments included.
    """

    def __init__(self, policy, groups, options):
        self.policy, self.grad_clip = policy, options.grad_clip
        settings = dict(lr=options.lr, weight_decay=options.weight_decay)
        self.optimizer = self.make_optimizer(groups, settings)

    def make_optimizer(self, groups, settings):
        return torch.optim.AdamW(groups, fused=True, **settings)

    def backward(self, loss):
        """Add a pass's gradient to those of the update's passes before it."""
        loss.backward()

    def step(self, loss):
        """Clip, and step unless something is NaN or infinite: (what became of it, its norm)."""
        norm = self.clip()
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return "applied" if finite else "skipped", norm

    def clip(self):
        """Scale the gradient to a norm of at most --grad-clip; returns its norm before."""
        return torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.grad_clip).item()

    def whole(self, parameter):
        """A parameter's float32 weights as one tensor."""
        return parameter.detach()

    def some(self, parameter, every):
        """Every so-manieth of them."""
        return parameter.detach().flatten()[::every]

    def beside(self, parameter):
        """What lies where the parameter's moments belong."""
        return parameter

    def state(self):
        """What a checkpoint keeps beside weights and moments."""
        return {}

    def restore(self, state):
        pass


def split_rows(rollout, rows, size=0):
    """The forward passes over some rows, a slice: at most `size` of them each; 0: all at once."""
    size = size or rows.stop - rows.start
    return [slice(i, min(i + size, rows.stop)) for i in range(rows.start, rows.stop, size)]
