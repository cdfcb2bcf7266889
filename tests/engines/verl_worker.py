"""One verl worker in this process, without Ray: its engine on a CPU, TransferQueue a dictionary."""

import os

for name, value in {
    "VERL_PLATFORM": "cpu",
    "VERL_ENGINE_VENDOR": "hapo",
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29612",
}.items():
    os.environ.setdefault(name, value)

import torch
import verl  # noqa: F401 - before its parts
import verl_cpu
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import trainer_base
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils.padding import response_from_nested

from bridges import verl_hapo

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
GIVEN = """
+actor_rollout_ref.model.override_config.attn_implementation=sdpa
actor_rollout_ref.model.enable_gradient_checkpointing=False
actor_rollout_ref.model.use_remove_padding=True
actor_rollout_ref.actor.strategy=fsdp2
actor_rollout_ref.actor.fsdp_config.use_torch_compile=False
+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32
+actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype=fp32
actor_rollout_ref.actor.clip_ratio_low=0.2
actor_rollout_ref.actor.clip_ratio_high=0.28
actor_rollout_ref.actor.clip_ratio_c=1e9
actor_rollout_ref.actor.optim.lr=1e-3
actor_rollout_ref.actor.optim.weight_decay=0.1
actor_rollout_ref.rollout.name=vllm
actor_rollout_ref.rollout.calculate_log_probs=False
trainer.total_training_steps=10
""".split()


def configuration(folder, responses, size, *more):
    """verl's configuration: `responses` in groups of `size`, three micro-batches a process."""
    each = max(1, responses // 3 // WORLD)
    sizes = [
        f"actor_rollout_ref.model.path={folder}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={responses // size}",
        f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={each}",
        f"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu={each}",
        f"actor_rollout_ref.rollout.n={size}",
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=[*GIVEN, *sizes, *more])
    OmegaConf.resolve(config)
    return config


class Store:
    """TransferQueue's kv_batch_get and kv_batch_put: {key of a response: {field: tensor}}."""

    def __init__(self):
        self.rows = {}

    def kv_batch_put(self, keys, partition_id, fields=None, tags=None):
        for name, value in fields.items():
            parts = value.unbind() if isinstance(value, torch.Tensor) else list(value)
            for key, part in zip(keys, parts, strict=True):
                self.rows.setdefault(key, {})[name] = part
        return KVBatchMeta(keys=keys, tags=[{}] * len(keys), partition_id=partition_id)

    def kv_batch_get(self, keys, partition_id, select_fields=None):
        found = {}
        for name in self.rows[keys[0]]:
            if select_fields is None or name in select_fields:
                parts = [self.rows[key][name] for key in keys]
                if isinstance(parts[0], torch.Tensor):
                    parts = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
                found[name] = parts
        return tu.get_tensordict(found)


class Group:
    """What the trainer takes for its group of workers: the worker of this process."""

    world_size = WORLD

    def __init__(self, worker, store):
        self.worker, self.store = worker, store

    def share(self, batch):
        """This process's keys: a contiguous part, as verl's dispatch gives it."""
        size = len(batch.keys) // WORLD
        return batch.keys[RANK * size : (RANK + 1) * size]

    def data_of(self, batch, **more):
        data = self.store.kv_batch_get(self.share(batch), batch.partition_id)
        data.pop(verl_hapo.CHANGE, None)
        for name, value in ((batch.extra_info or {}) | more).items():
            tu.assign_non_tensor_data(data, name, value)
        return data

    def compute_log_prob(self, batch, **more):
        output = self.worker.compute_log_prob(self.data_of(batch, **more))
        tensors = {k: v for k, v in output.items() if isinstance(v, torch.Tensor)}
        mine = {k: [x.clone() for x in v.unbind()] for k, v in tensors.items()}
        everyone = [None] * WORLD
        torch.distributed.all_gather_object(everyone, (self.share(batch), mine))
        for keys, found in everyone:
            self.store.kv_batch_put(keys, batch.partition_id, found)
        return KVBatchMeta(keys=batch.keys, tags=batch.tags, partition_id=batch.partition_id)

    def update_actor(self, batch):
        return self.worker.update_actor(self.data_of(batch))

    def set_loss_fn(self, function):
        self.worker.set_loss_fn(function)


class OneWorker(verl_hapo.HAPOTrainer):
    """HAPOTrainer without Ray: its worker, its store, and its first step."""

    def __init__(self, folder, responses, size, *more):
        verl_cpu.prepare()
        config = configuration(folder, responses, size, *more)
        self.config, self.settings = config, verl_hapo.Settings.of(config)
        verl_hapo.check_configuration(config, self.settings)
        self.stats, self.boundary, self.global_steps = None, None, 1
        worker = ActorRolloutRefWorker(config.actor_rollout_ref, role="actor")
        worker.init_model()
        self.engine, self.store = worker.actor.engine, Store()
        self.actor_rollout_wg = Group(worker, self.store)
        trainer_base.tq = verl_hapo.tq = self.store
        actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        worker.set_loss_fn(self.loss_function(actor))

    def put(self, order, prompts, answers, rewards):
        """Store responses, rows in a given order; return the batch."""
        size, ids = len(answers) // len(prompts), lambda x: torch.tensor(x)
        rows = [(prompts[r // size], answers[r], rewards[r].item()) for r in order]
        nested = lambda lists: torch.nested.as_nested_tensor(list(lists), layout=torch.jagged)
        fields = dict(
            prompts=nested(ids(p) for p, _, _ in rows),
            responses=nested(ids(a) for _, a, _ in rows),
            response_mask=nested(torch.ones(len(a), dtype=torch.long) for _, a, _ in rows),
            loss_mask=nested(torch.ones(len(a), dtype=torch.long) for _, a, _ in rows),
            input_ids=nested(ids(p + a) for p, a, _ in rows),
            position_ids=nested(torch.arange(len(p + a)) for p, a, _ in rows),
            rm_scores=nested(torch.tensor([0.0] * (len(a) - 1) + [r]) for _, a, r in rows),
            uid=[f"u{r // size}" for r in order],
        )
        return self.store.kv_batch_put(
            [f"u{r // size}_{r % size}_0" for r in order], "train", fields
        )

    def step(self, batch, move):
        """(loss, {name: gradient or None}, names of unmoved weights, metrics) of one update."""
        metrics, gradients, still = {}, {}, []
        batch = self._compute_old_log_prob(batch, metrics)
        if self.config.actor_rollout_ref.actor.use_kl_loss:
            self.score_reference(batch)
        batch = self._compute_advantage(batch, metrics)
        move(self.engine.module)
        base = verl_hapo.FSDPEngineWithLMHead
        own = base.optimizer_step

        def optimizer_step(engine):
            """verl's own, which our Engine calls."""
            named = dict(engine.module.named_parameters())
            for name, p in named.items():
                gradients[name] = None if p.grad is None else whole(p.grad)
            before = {name: whole(p) for name, p in named.items()}
            norm = own(engine)
            still.extend(name for name, p in named.items() if torch.equal(before[name], whole(p)))
            return norm

        base.optimizer_step = optimizer_step
        try:
            self._update_actor(batch, metrics)
        finally:
            del base.optimizer_step
        return metrics["actor/loss"], gradients, still, metrics

    def score_reference(self, batch):
        """The policy before its move, as a frozen reference."""
        how = dict(calculate_entropy=False, compute_loss=False, temperature=1.0)
        self.actor_rollout_wg.compute_log_prob(batch, **how)
        data = self.store.kv_batch_get(batch.keys, "train", ["log_probs", "response_mask"])
        scores = response_from_nested(data["log_probs"], data["response_mask"])
        self.store.kv_batch_put(batch.keys, "train", {"ref_log_prob": scores})


def whole(tensor):
    """A copy of a sharded tensor's whole value."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def move_sharded(module, by=0.1):
    """our_step.move for weights of which every process has a part."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            change = by * whole(p).abs().mean() * torch.randn(p.shape, generator=noise)
            if hasattr(p, "to_local"):
                placed = torch.distributed.tensor.distribute_tensor
                change = placed(change, p.device_mesh, p.placements).to_local()
            (p.to_local() if hasattr(p, "to_local") else p).add_(change)
