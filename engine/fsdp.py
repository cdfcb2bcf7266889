"""Shard one model over several processes with PyTorch's FSDP2: `torchrun --nproc-per-node N ...`.

The built model is sharded; its code is unchanged. Every process holds 1 / N of every weight,
gradient and moment. A decoder layer is gathered when it runs and freed afterwards. Prompts are
split over the processes. The denominator of the loss and the entropy statistics are computed over
all processes. Responses are drawn from a replica in the compute dtype that is refreshed once per
rollout, so no weight is gathered at a decoding step, and processes may stop at different lengths.
FSDP and DTensor take most of a second to import, so only the functions of a sharded run import
them.
"""

import contextlib
import os
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, GenerationConfig

from common.attention import install_mask_hook
from common.errors import UserError
from common.models import assert_tied, load_config, load_model
from engine.engine import SingleProcess, full_tensor
from engine.fast import FastEngine
from engine.micro_batches import equal_counts
from internals import decoder_body
from sampling import NonFinite


class DistributedProcesses(SingleProcess):
    """The processes that torchrun has started.

    All of them must call a method that communicates.
    """

    sharded = True

    def __init__(self, device="cpu"):
        from torch.distributed.device_mesh import init_device_mesh

        if torch.device(device).type == "cuda":  # before any tensor: each process uses one GPU
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        super().__init__(device)
        self.size, self.rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        self.main = self.rank == 0
        dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        self.mesh = init_device_mesh(self.device.type, (self.size,))

    def _reduce(self, x, op):
        x = torch.as_tensor(x, device=self.device).clone()
        dist.all_reduce(x, op)
        return x

    def all_reduce_sum(self, *numbers):
        sums = torch.tensor(super().all_reduce_sum(*numbers), dtype=torch.float64)
        dist.all_reduce(sums)  # in main memory, since not every device has float64
        return sums.tolist()

    def all_reduce_max(self, values):
        values = torch.as_tensor(values, device=self.device).clone()
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def any_process(self, flag):
        return bool(self.all_reduce_max(torch.tensor(int(flag))))

    def gather(self, values):
        return torch.cat([part.to(self.device) for part in self.gather_objects(values.cpu())])

    def gather_objects(self, thing):
        things = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def raise_on_all_ranks(self, errors, function, *args, **kwargs):
        """Return function(...). If one process raises one of `errors`, all processes raise.

        If only one process raised, the others would wait for it forever.
        """
        result = failure = None
        try:
            result = function(*args, **kwargs)
        except errors as caught:
            failure = caught
        if self.any_process(failure is not None):
            raise failure or errors[0]("in another process")
        return result

    def reshard(self, model):
        """Free weights that a forward pass without a backward pass has left gathered.

        An optimizer step would make these copies stale.
        """
        for module in model.modules():
            if hasattr(module, "reshard"):  # only modules that FSDP has sharded
                module.reshard()

    def local_shard(self, items):
        """Return every size-th item, from item `rank` on.

        So the first k items of all shares are the first k x size items of the whole list.
        """
        return items[self.rank :: self.size]

    def close(self):
        dist.barrier()  # wait until all have finished
        dist.destroy_process_group()
        sys.stdout.flush()
        # skip Python's shutdown, which gloo's threads can abort; all files are written by now
        os._exit(0)


def open_processes(device):
    """Return the processes of this run: torchrun's, or a SingleProcess without torchrun."""
    return DistributedProcesses(device) if "WORLD_SIZE" in os.environ else SingleProcess(device)


class FsdpEngine(FastEngine):
    """Engine for weights that PyTorch's FSDP2 has sharded over the processes."""

    def _samples_from_a_replica(self):
        return True  # so that no weight is gathered at a decoding step

    def generate(self, *arguments, **more):
        errors = (NonFinite, UserError)
        return self.dist.raise_on_all_ranks(errors, super().generate, *arguments, **more)

    def batch_logprobs(self, model, *arguments, **more):
        scores = super().batch_logprobs(model, *arguments, **more)
        self.dist.reshard(model)
        return scores

    def micro_batches(self, rollout, rows):
        parts = [rollout.row_list(part) for part in super().micro_batches(rollout, rows)]
        parts = equal_counts(parts, self.dist)
        if not self.options.offload:
            return parts
        return self._exchanging_gradients_once(parts)

    def _exchanging_gradients_once(self, parts):
        """Yield micro-batches; the last one's backward pass reduces and offloads the gradients."""
        for i, part in enumerate(parts, 1):
            exchange_gradients(self.policy, i == len(parts))
            yield part

    def backward(self, loss):
        # FSDP averages gradients over processes; multiply by their number to get the sum
        (loss * self.dist.size).backward()

    def _clip_gradients(self):
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.options.grad_clip)
        return full_tensor(norm).item()

    def full_tensor(self, parameter):
        """Return a parameter's float32 weights as one ordinary tensor; all processes must call."""
        return full_tensor(parameter.detach())

    def strided_sample(self, parameter, every):
        return parameter.to_local().flatten()[::every]


def shard_model(name, processes, offload=False, dtype="float32"):
    """Load a model and return it sharded.

    Only rank 0 ever holds the whole model, in main memory. The model is built on the meta device,
    sharded, and then filled from rank 0 one weight at a time.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    config = load_config(name)
    source = dict(load_model(name)[0].named_parameters()) if processes.main else {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()  # transformers 5.0 does not tie on the meta device
    body, settings = decoder_body(model), _sharding(processes, offload, dtype)
    rotary = type(body.rotary_emb)  # its buffers are computed, not loaded: build them again
    body.rotary_emb = rotary(config=config)
    for layer in body.layers:
        fully_shard(layer, **settings)
    # The root keeps its weights (embedding, norm, unembedding) gathered until its backward pass:
    # the loss multiplies by the unembedding matrix after the root's own forward has ended.
    fully_shard(model, reshard_after_forward=False, **settings)

    model.to_empty(device="cpu" if offload else processes.device)
    body.rotary_emb = rotary(config=config).to(
        processes.device
    )  # to_empty has emptied its buffers too
    if config.tie_word_embeddings:  # to_empty has given each module its own tensor: tie them again
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    with contextlib.suppress(OSError):  # without generation_config.json, keep the model's defaults
        model.generation_config = GenerationConfig.from_pretrained(name)
    for key, parameter in model.named_parameters():
        whole = source[key].detach() if processes.main else torch.empty(parameter.shape)
        mesh, placements = parameter.device_mesh, parameter.placements
        part = distribute_tensor(whole.to(processes.device), mesh, placements)
        parameter.to_local().data.copy_(part.to_local())
    assert_tied(model)
    return install_mask_hook(model, processes.device, getattr(torch, dtype))


def _sharding(processes, offload, dtype):
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

    cuda = processes.device.type == "cuda"
    settings = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if offload and cuda and settings:
        # else pinned memory is rounded up to a power of two; older versions reject this setting
        with contextlib.suppress(ValueError):
            settings("pinned_max_round_threshold_mb:1")
    low = None if dtype == "float32" else getattr(torch, dtype)
    return dict(
        mesh=processes.mesh,
        mp_policy=MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32),
        offload_policy=CPUOffloadPolicy(pin_memory=cuda) if offload else OffloadPolicy(),
    )


def exchange_gradients(model, now):
    """Set whether the next backward pass reduces the gradients over the ranks.

    If not, each rank keeps its whole gradients, summed in float32, for a later pass. They are then
    exchanged once per update instead of once per micro-batch.
    """
    if hasattr(model, "set_requires_gradient_sync"):  # only a model that FSDP has sharded
        model.set_requires_gradient_sync(now)


def check_processes(options, processes):
    """Raise UserError if the options do not fit the number of processes or their device."""
    if processes.sharded and processes.device.type not in ("cpu", "cuda"):
        raise UserError(
            f"--device {options.device}: torchrun shards over NVIDIA or AMD GPUs or CPU processes; "
            "start python train.py instead"
        )
    if options.prompts_per_step % (processes.size * options.updates_per_rollout):
        few = " (more ranks than prompts)" if options.prompts_per_step < processes.size else ""
        raise UserError(
            f"--prompts-per-step {options.prompts_per_step}: must be a multiple of processes x "
            f"updates per rollout = {processes.size} x {options.updates_per_rollout}{few}"
        )
