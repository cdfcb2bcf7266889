"""Answer device-specific questions for CPU, NVIDIA or AMD (cuda), Apple (mps) and Intel (xpu).

All other code is the same on every device. Random numbers are drawn on the CPU. float64 is used on
a device only where `widest_float_dtype` allows it, since mps has no float64.
"""

import os

import torch

from common.errors import UserError

KNOWN = ("cpu", "cuda", "mps", "xpu")


def default_device():
    """The accelerator where there is one that this project knows."""
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return there.type if there is not None and there.type in KNOWN else "cpu"


def check_device(name):
    """UserError unless torch knows the device and it is there; makes it the current one."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in KNOWN:
        raise UserError(
            f"--device {name}: must be cpu, cuda, mps or xpu, or one of several: cuda:1"
        )
    if device.type == "cpu":
        return
    count = devices(device.type)
    if (device.index or 0) >= count:
        raise UserError(
            f"--device {name}: no such {device.type.upper()} device is visible ({count} are); "
            "use --device cpu"
        )
    if device.type != "mps":  # there is one of it
        getattr(torch, device.type).set_device(device.index or 0)


def devices(kind):
    """How many of a kind there are."""
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return getattr(torch, kind).device_count()


def default_dtype(device):
    """What products run in where nobody says: bfloat16 where the device has it in hardware."""
    kind = torch.device(device).type
    if kind == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float16"
    return "bfloat16" if kind == "xpu" else "float32"


def has_flash_attention(device, dtype, head_size):
    """Whether PyTorch's attention has a kernel there that never holds all scores and knows grouped
    heads."""
    if device.type != "cuda":
        return True
    fits = dtype in (torch.float16, torch.bfloat16) and head_size <= 256
    return fits and torch.cuda.get_device_capability(device)[0] >= 8


def pins_memory(device):
    """Whether copies to the device are faster from memory that cannot be swapped out."""
    return device.type in ("cuda", "xpu")


def to_device_async(x, device):
    """A tensor of the CPU on its way to the device, without a wait where memory can be pinned."""
    if not pins_memory(device):
        return x.to(device)
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)
    return pinned.to(device, non_blocking=True)


def total_memory(device):
    """Bytes on the device, on a CPU the machine's; None where nobody tells."""
    if device.type == "mps":
        try:
            return torch.mps.recommended_max_memory()
        except RuntimeError:  # as torch says it where this cannot be asked
            return None
    if device.type != "cpu":
        return getattr(torch, device.type).get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):  # Windows
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def widest_float_dtype(device):
    """The widest float that a device computes with."""
    return torch.float32 if device.type == "mps" else torch.float64


def synchronize(device):
    """Wait until what was launched on a device has run."""
    getattr(torch, device.type).synchronize()
