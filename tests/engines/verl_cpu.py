"""A CPU as a platform of verl 0.9, for the tests: its FSDP engines over gloo, without a GPU.

    VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES=verl_cpu,bridges.verl_hapo python ...

verl knows GPUs and NPUs. What it asks torch.cuda, this module answers.
"""

import contextlib
import functools
import types

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

nothing = lambda *args, **kwargs: None
zero = lambda *args, **kwargs: 0

DEVICE = types.ModuleType("verl_cpu_device")
for name in (
    "set_device synchronize empty_cache manual_seed manual_seed_all ipc_collect "
    "reset_peak_memory_stats"
).split():
    setattr(DEVICE, name, nothing)
for name in (
    "current_device memory_allocated memory_reserved max_memory_allocated max_memory_reserved"
).split():
    setattr(DEVICE, name, zero)
DEVICE.is_available = lambda: True
DEVICE.get_device_name = lambda *args: "CPU"
DEVICE.device_count = lambda: 1
DEVICE.mem_get_info = lambda *args: (1 << 34, 1 << 34)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    device_name = "cpu"
    vendor_name = "cpu"
    device_module = DEVICE

    def is_available(self):
        return True

    def is_platform_available(self, use_smi_check=False):
        return False  # only where VERL_PLATFORM asks for it

    def current_device(self):
        return torch.device("cpu")

    def device_count(self):
        return 1

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self):
        return "GPU"  # ray.init(num_gpus=n): a number in its books, no device

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    @contextlib.contextmanager
    def nvtx_range(self, msg):
        yield

    set_device = synchronize = manual_seed = manual_seed_all = nothing
    set_allocator_settings = empty_cache = profiler_start = profiler_stop = cudart = nothing


def prepare():
    """What else of verl must know the platform: process groups and offloaded references."""
    from verl.workers import engine_workers
    from verl.workers.engine.fsdp import transformer_impl

    start = engine_workers.initialize_global_process_group_ray
    if not isinstance(start, functools.partial):  # verl's own string would be cpu:gloo,cpu:gloo
        start = functools.partial(start, backend="gloo")
        engine_workers.initialize_global_process_group_ray = start
    policy = transformer_impl.CPUOffloadPolicy  # of a reference model; nothing to pin here
    transformer_impl.CPUOffloadPolicy = lambda pin_memory=False: policy(pin_memory=False)
