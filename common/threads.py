"""Limit how long CPU threads spin. Import this before torch, whose threads read the setting once.

PyTorch's OpenMP threads spin while they wait for each other. If another program uses the cores, a
thread spins while the thread it waits for has no core, and a step takes more than fifteen times as
long. A short spin costs little on an idle machine and frees the core quickly on a busy one.
"""

import os

from common.errors import UserError

if "GOMP_SPINCOUNT" not in os.environ and "OMP_WAIT_POLICY" not in os.environ:
    os.environ["GOMP_SPINCOUNT"] = "4000"  # iterations of an empty loop


def use_threads(count, say=print):
    """Compute with `count` CPU threads (None: PyTorch's default).

    Print a note with `say` if other programs keep the cores busy. UserError if the machine has
    fewer cores.
    """
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
