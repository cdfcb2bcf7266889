"""Threads beside other programs. Import this before torch: its threads read the setting at birth.

PyTorch's OpenMP threads spin while they wait for each other. Where another program needs the cores
they wait for a thread that cannot run, and a step takes thirty times as long. A short spin costs
next to nothing on an idle machine and leaves the core soon on a busy one.
"""

import os

from common.errors import UserError

if "GOMP_SPINCOUNT" not in os.environ and "OMP_WAIT_POLICY" not in os.environ:
    os.environ["GOMP_SPINCOUNT"] = "4000"  # turns of an empty loop


def use_threads(count, say=print):
    """Compute with `count` threads (None: as many as PyTorch likes); a line where the machine is
    busy with something else."""
    import torch

    cores = os.cpu_count() or 1
    if count is not None:
        if not 1 <= count <= cores:
            raise UserError(f"--threads {count}: this machine has {cores} cores; give 1 to {cores}")
        torch.set_num_threads(count)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    threads = torch.get_num_threads()
    if threads > 1 and load + threads > cores + 0.5 and load > 0.5:
        say(
            f"note: other programs keep {load:.1f} of {cores} cores busy; {threads} threads would "
            "wait for each other: --threads 1 may be faster"
        )
