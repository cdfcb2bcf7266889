"""Answer device-specific questions for CPU, NVIDIA or AMD (cuda), Apple (mps) and Intel (xpu).

All other code is the same on every device. Random numbers are drawn on the CPU. float64 is used on
a device only where `widest_float_dtype` allows it, since mps has no float64.
"""

import os

import torch

from common.errors import UserError

KNOWN = ("cpu", "cuda", "mps", "xpu")


def default_device():
    """Return the name of the accelerator if this project supports it, else "cpu"."""
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return there.type if there is not None and there.type in KNOWN else "cpu"


def check_device(name):
    """Raise UserError unless a device is supported and present; make it the current device."""
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
    if device.type != "mps":  # there is only one mps device
        getattr(torch, device.type).set_device(device.index or 0)


def devices(kind):
    """Return the number of devices of a kind (cuda, mps or xpu)."""
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return getattr(torch, kind).device_count()


def default_dtype(device):
    """Return the name of the default compute dtype of a device.

    It is bfloat16 if the device supports it in hardware, float16 on an older NVIDIA GPU, and
    float32 on a CPU and on mps.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float16"
    return "bfloat16" if kind == "xpu" else "float32"


def has_flash_attention(device, dtype, head_size):
    """Return whether PyTorch's attention has a memory-saving kernel with grouped heads.

    Such a kernel never holds all attention scores. On devices other than cuda the answer is True.
    """
    if device.type != "cuda":
        return True
    fits = dtype in (torch.float16, torch.bfloat16) and head_size <= 256
    return fits and torch.cuda.get_device_capability(device)[0] >= 8


def pins_memory(device):
    """Return whether copies to the device are faster from pinned memory."""
    return device.type in ("cuda", "xpu")


def to_device_async(x, device):
    """Return a CPU tensor copied to the device; do not wait for the copy if memory is pinned."""
    if not pins_memory(device):
        return x.to(device)
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)
    return pinned.to(device, non_blocking=True)


def total_memory(device):
    """Return a device's memory in bytes (for a CPU, the machine's), or None if it is unknown."""
    if device.type == "mps":
        try:
            return torch.mps.recommended_max_memory()
        except RuntimeError:  # torch cannot tell on this system
            return None
    if device.type != "cpu":
        return getattr(torch, device.type).get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):  # Windows
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def widest_float_dtype(device):
    """Return the widest floating-point dtype that a device supports."""
    return torch.float32 if device.type == "mps" else torch.float64


def synchronize(device):
    """Wait until all work launched on a device has finished."""
    getattr(torch, device.type).synchronize()
