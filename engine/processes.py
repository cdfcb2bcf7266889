"""The processes of a run and what they exchange. One process exchanges nothing.

engine/fsdp.py has the same methods for several: DistributedProcesses.
"""

import torch

from common.devices import widest_float_dtype


class SingleProcess:
    """One process: every sum over processes is the number itself."""

    size, rank, main, sharded = 1, 0, True, False

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        dtype = widest_float_dtype(self.device)
        self.zero = torch.zeros((), dtype=dtype, device=self.device)

    def all_reduce_sum(self, *numbers):
        """Return each number's sum over processes, as floats. All wait for the device once."""
        return torch.stack([self.zero + number for number in numbers]).tolist()

    def all_reduce_max(self, values):
        """Return the largest value over processes, a tensor of the same shape."""
        return torch.as_tensor(values, device=self.device)

    def any_process(self, flag):
        """Return whether the flag is set in one of the processes."""
        return bool(flag)

    def gather(self, values):
        """Return the values (n,) of all processes as one tensor."""
        return values

    def gather_objects(self, thing):
        """Return a list of every process's object."""
        return [thing]

    def local_shard(self, items):
        """Return this process's share of a list."""
        return items

    def raise_on_all_ranks(self, errors, function, *args, **kwargs):
        """Return function(...). If it raises one of `errors` in one process, all raise."""
        return function(*args, **kwargs)

    def reshard(self, model):
        """Free weights that a forward pass has gathered."""

    def close(self):
        """Leave the group of processes."""


def full_tensor(tensor):
    """Return a sharded tensor as an ordinary one; every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
