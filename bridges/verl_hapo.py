"""Run HAPO and BuPO inside verl 0.9: its trainer, its FSDP engine, its rollouts, its clipped loss.

    export VERL_USE_EXTERNAL_MODULES=bridges.verl_hapo       (pip install -e . in this folder first)
    python -m verl.trainer.main_ppo
        trainer.v1.trainer_mode=hapo                        HAPOTrainer, below
        algorithm.adv_estimator=hapo                        B; another one: without B
        actor_rollout_ref.actor.policy_loss.loss_mode=hapo  C and D; vanilla: without both
        actor_rollout_ref.rollout.agent.default_agent_loop=hapo_agent   A, with vLLM rollouts
        actor_rollout_ref.actor.clip_ratio_low=0.2 actor_rollout_ref.actor.clip_ratio_high=0.28
        +hapo.rho=0.8 +hapo.adaptive_clip=False             any field of Settings, by its name
        +bupo.layer=auto +bupo.steps=30

No code of verl is copied. One training step runs these methods of verl, in this order:

    _next_train_batch        A: every prompt carries the last rollout's statistics
        HAPOAgentLoop.run    A: and hands them to vLLM (bridges/vllm_temperature.py)
    _compute_old_log_prob    BuPO: select the policy to train; in phase 1 HAPO needs one more pass,
                             of the full policy, for its entropies
    _compute_advantage       verl calls B; then h is computed from the entropies of the whole batch
    _update_actor            BuPO: the layer travels with the batch
        Engine.forward_step  BuPO: the model is cut at the layer
        policy_loss          C and D, then verl's own clipped surrogate and its mean

Shapes: B responses, T positions of responses, L layers.
"""

import contextlib
import dataclasses
import functools
import json
import os

import numpy
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.experimental.agent_loop.agent_loop import register as register_agent_loop
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.core_algos import (
    compute_policy_loss_vanilla,
    register_adv_est,
    register_policy_loss,
)
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.device import get_device_id
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import response_to_nested

import bupo
import hapo
import internals
import losses
from sampling import vocabulary

LAYER = "bupo_layer"  # travels with a batch: 0 for the model's own policy
MEASURE = "bupo_measure"  # travels with a batch whose pass measures the boundary layer
CHANGE = "ffn_entropy_change"  # (rows, L + 1): sums of dH_ffn over tokens, and their number
STATISTICS = "hapo_statistics"  # travels with a prompt: JSON of vLLM's extra_args
OTHER_ROLLOUTS = ("sglang", "trtllm", "hf")  # those of verl without Eq. 8
MEASURED = 64  # responses on which the boundary layer is measured


@dataclasses.dataclass
class Settings:
    """The options of run/options.py under the same names: +hapo.NAME=VALUE, +bupo.NAME=VALUE."""

    rho: float = 0.8
    advantage_redistribution: bool = True
    adaptive_clip: bool = True
    tau: float | None = None
    temperature_form: str = "bounded"
    layer: str | None = None  # 1 ... L, or auto
    steps: int = 30
    norm: bool = False

    def __post_init__(self):
        if self.tau is None:
            self.tau = 0.1 if self.temperature_form == "zscore" else 0.05
        self.layer = None if self.layer is None else str(self.layer)
        named = self.layer in (None, bupo.AUTO) or (self.layer.isdecimal() and int(self.layer) > 0)
        bounded = self.temperature_form == "bounded"
        for wrong, why in (
            (not named, f"bupo.layer={self.layer}: must be auto or a layer from 1 to L"),
            (self.steps < 1, f"bupo.steps={self.steps}: must be at least 1"),
            (not 0 <= self.rho <= 1, f"hapo.rho={self.rho}: must lie in [0, 1]"),
            (
                self.temperature_form not in ("bounded", "zscore"),
                f"hapo.temperature_form={self.temperature_form}: must be bounded or zscore",
            ),
            (
                self.tau < 0 or (bounded and self.tau >= 1),
                f"hapo.tau={self.tau}: must be at least 0, and below 1 in the bounded form",
            ),
        ):
            if wrong:
                raise ValueError(why)

    @classmethod
    def of(cls, config):
        """Read them from verl's configuration. ValueError names what is not known."""
        given = {}
        for group, known in (("hapo", HAPO_NAMES), ("bupo", BUPO_NAMES)):
            for name, value in (OmegaConf.select(config, group, default=None) or {}).items():
                if name not in known:
                    raise ValueError(f"{group}.{name}: no such setting; known: {', '.join(known)}")
                given[name] = value
        return cls(**given)


BUPO_NAMES = ("layer", "steps", "norm")
HAPO_NAMES = tuple(f.name for f in dataclasses.fields(Settings) if f.name not in BUPO_NAMES)


class Changed:
    """An object some of whose attributes are replaced."""

    def __init__(self, original, **attributes):
        vars(self).update(attributes, _original=original)

    def __getattr__(self, name):
        return getattr(self._original, name)


# ------------------------------------------------------------------------------------ B, C and D


@register_adv_est("hapo")
def token_group_advantages(token_level_rewards, response_mask, index, **more):
    """Return mechanism B's advantages, Eq. 9, twice, as verl asks for.

    index holds each row's prompt. A prompt's rows need not be adjacent, and groups may differ in
    size.
    """
    rewards = token_level_rewards.sum(-1)
    advantages = torch.zeros_like(token_level_rewards, dtype=torch.float32)
    for prompt in set(index):
        rows = torch.from_numpy(numpy.flatnonzero(index == prompt))
        group = hapo.token_group_advantages(rewards[rows], response_mask[rows], len(rows))
        advantages[rows] = group.float()
    return advantages, advantages


def loss_of_batch(config, model_output, data, dp_group=None, settings=None):
    """verl's ppo_loss of a micro-batch. Its configuration carries h; phase 1 has no KL term."""
    h = data["h"].to_padded_tensor(0.0) if "h" in data else None
    changed = {"h": h, "hapo_settings": settings}
    if tu.get_non_tensor_data(data, LAYER, 0):
        changed["use_kl_loss"] = False
    return ppo_loss(Changed(config, **changed), model_output, data, dp_group)


@register_policy_loss("hapo")
def policy_loss(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode,
    config,
    rollout_is_weights=None,
):
    """C changes the advantages, D the clip range of verl's own clipped surrogate."""
    h, low, high = getattr(config, "h", None), config.clip_ratio_low, config.clip_ratio_high
    if h is None:
        raise ValueError("policy_loss.loss_mode=hapo needs trainer.v1.trainer_mode=hapo")
    if config.hapo_settings.advantage_redistribution:
        ratio = losses.likelihood_ratio(log_prob, old_log_prob)
        advantages = hapo.redistribute_advantages(advantages, h, ratio, low, high)
    if config.hapo_settings.adaptive_clip:
        low, high = hapo.adaptive_clip(h, low, high)
    bounded = Changed(config, clip_ratio_low=low, clip_ratio_high=high)
    given = (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode)
    return compute_policy_loss_vanilla(
        *given, config=bounded, rollout_is_weights=rollout_is_weights
    )


# ------------------------------------------------------------------------------------------- A


@register_agent_loop("hapo_agent")
class HAPOAgentLoop(SingleTurnAgentLoop):
    """verl's single-turn responses, drawn at mechanism A's temperatures by a vLLM server."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.config.trainer.v1.trainer_mode != "hapo":
            raise ValueError(
                "agent.default_agent_loop=hapo_agent needs trainer.v1.trainer_mode=hapo"
            )

    async def run(self, sampling_params, **prompt):
        statistics = prompt.pop(STATISTICS, None)
        if statistics:  # validation carries none
            sampling_params = sampling_params | {"extra_args": json.loads(statistics)}
        return await super().run(sampling_params, **prompt)


# ------------------------------------------------------------------------------------ the trainer


@register_trainer("hapo")
class HAPOTrainer(PPOTrainerSync):
    """verl's synchronous trainer with HAPO and BuPO."""

    def __init__(self, config):
        self.settings = Settings.of(config)
        check_configuration(config, self.settings)
        self.stats, self.boundary = None, None  # of the last rollout; the layer that auto found
        super().__init__(config)

    def _build_replay_buffer(self):
        self.trainer_mode = "sync"  # verl takes a trainer of another name for an asynchronous one
        return super()._build_replay_buffer()

    def _setup(self):
        super()._setup()
        actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
        self.actor_rollout_wg.set_loss_fn(self.loss_function(actor))

    def loss_function(self, actor):
        return functools.partial(loss_of_batch, config=actor, settings=self.settings)

    @property
    def uses_h(self) -> bool:
        return self.config.actor_rollout_ref.actor.policy_loss.loss_mode == "hapo"

    @property
    def heats(self) -> bool:
        return self.config.actor_rollout_ref.rollout.agent.default_agent_loop == "hapo_agent"

    @property
    def layer(self) -> int | str | None:
        """The policy that this step trains: layer l, AUTO until measured, None for the model's."""
        layer = self.settings.layer
        if layer == bupo.AUTO:
            layer = self.boundary or layer
        layer = layer if layer in (None, bupo.AUTO) else int(layer)
        return bupo.target_layer(self.global_steps, self.settings.steps, layer)

    def read(self, batch, *fields):
        return tq.kv_batch_get(batch.keys, batch.partition_id, select_fields=list(fields))

    def write(self, batch, **fields):
        fields = TensorDict(fields, batch_size=len(batch))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    def _next_train_batch(self, *args, **more):
        batch = super()._next_train_batch(*args, **more)
        if self.heats and "agent_name" in batch:
            raise ValueError(
                "the data have a column agent_name, which comes before agent.default_agent_loop: "
                "mechanism A would heat nothing; drop the column"
            )
        if self.heats and self.stats is not None:
            from bridges.vllm_temperature import request_arguments

            base = self.config.actor_rollout_ref.rollout.temperature  # verl scores logits / base
            how = (self.settings.tau, self.settings.temperature_form, base)
            tu.assign_non_tensor_data(
                batch, STATISTICS, json.dumps(request_arguments(self.stats, *how))
            )
        return batch

    def _compute_old_log_prob(self, batch, metrics):
        if self.layer == bupo.AUTO:
            self.boundary = self.measured(batch)
        entropy = None
        if self.layer and (self.uses_h or self.heats):  # h is the full policy's in both phases
            batch = super()._compute_old_log_prob(batch, metrics)
            entropy = self.read(batch, "entropy")["entropy"]
        batch.extra_info.update(self.cut())
        batch = super()._compute_old_log_prob(batch, metrics)
        for name in self.cut():  # a reference model is never cut
            batch.extra_info.pop(name, None)
        return batch if entropy is None else self.write(batch, entropy=entropy)

    def cut(self) -> dict:
        return {LAYER: self.layer or 0, "bupo_norm": self.settings.norm}

    def measured(self, batch) -> int:
        """Return the boundary layer, measured on some 64 responses spread over the batch.

        Every process gets as many of them, one a forward pass. Rows that only pad are left out.
        """
        processes = self.actor_rollout_wg.world_size
        real = [i for i, tag in enumerate(batch.tags) if not tag.get("is_padding", False)]
        real = real if len(real) >= processes else list(range(len(batch)))
        count = max(processes, min(MEASURED, len(real)) // processes * processes)
        rows = [real[i * len(real) // count] for i in range(count)]
        some = dataclasses.replace(
            batch, keys=[batch.keys[i] for i in rows], tags=[batch.tags[i] for i in rows]
        )
        some.extra_info = {MEASURE: True, "calculate_entropy": False, "compute_loss": False}
        some.extra_info |= {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 1}
        self.actor_rollout_wg.compute_log_prob(some)
        sums = torch.stack(list(self.read(some, CHANGE)[CHANGE].unbind())).double().sum(0)
        change = sums[:-1] / sums[-1]
        layer, _ = bupo.boundary_or_fallback(change)
        print(f"bupo.layer=auto: {layer}, whose block adds {change[layer - 1]:+.3f} nats")
        return layer

    def _compute_advantage(self, batch, metrics):
        batch = super()._compute_advantage(batch, metrics)
        if not (self.uses_h or self.heats):
            return batch
        data = self.read(batch, "entropy", "response_mask")
        padded = data.select("entropy", "response_mask").to_padded_tensor()
        entropy, mask = padded["entropy"].float(), padded["response_mask"].bool()
        self.stats = hapo.entropy_stats(entropy, mask, self.settings.rho)
        h = hapo.modulation(entropy, self.stats, mask)
        seen = self.stats._asdict() | {"h": h[mask].mean()}
        metrics.update({f"hapo/{name}": value.item() for name, value in seen.items()})
        if not self.uses_h:
            return batch
        return self.write(batch, h=response_to_nested(h, data["response_mask"]))

    def _update_actor(self, batch, metrics):
        batch.extra_info.update(self.cut())
        metrics["bupo/layer"] = self.layer or 0
        return super()._update_actor(batch, metrics)

    def _state_path(self, resumed=False):
        """Return the file of the statistics and the boundary layer, in verl's own checkpoint."""
        trainer = self.config.trainer
        folder = os.path.join(trainer.default_local_dir, f"global_step_{self.global_steps}")
        if resumed and trainer.resume_mode == "resume_path":
            folder = trainer.resume_from_path
        return os.path.join(folder, "hapo.json")

    def _save_checkpoint(self):
        stats = None if self.stats is None else [float(x) for x in self.stats]
        os.makedirs(os.path.dirname(self._state_path()), exist_ok=True)
        with open(self._state_path(), "w", encoding="utf-8") as file:
            json.dump({"stats": stats, "boundary": self.boundary}, file)
        super()._save_checkpoint()  # which marks the checkpoint as complete

    def _load_checkpoint(self):
        super()._load_checkpoint()
        path = self._state_path(resumed=True)
        if self.global_steps and os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                state = json.load(file)
            self.boundary = state["boundary"]
            if state["stats"] is not None:
                self.stats = hapo.EntropyStats(*torch.tensor(state["stats"]))
        elif self.global_steps:
            print(
                f"note: {path} does not exist: the statistics and auto's layer are measured again"
            )


def check_configuration(config, settings) -> None:
    """Raise ValueError with one line for what would train something else than the papers."""
    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    heats = rollout.agent.default_agent_loop == "hapo_agent"
    uses_h = config.actor_rollout_ref.actor.policy_loss.loss_mode == "hapo"
    correction = OmegaConf.select(config, "algorithm.rollout_correction", default=None) or {}
    bypass = correction.get("bypass_mode", False)
    weights = bool(correction.get("rollout_is") or correction.get("rollout_rs"))
    if settings.layer:
        check_bupo(config, settings, weights)
    for wrong, why in (
        (
            bypass and (uses_h or heats or settings.layer),
            "algorithm.rollout_correction.bypass_mode=True: it scores no old policy, so HAPO has "
            "no entropies and BuPO no layer's log-probabilities; set it to False",
        ),
        (
            heats and OmegaConf.select(config, "actor_rollout_ref.model.mtp.enable_rollout"),
            "model.mtp.enable_rollout=True: vLLM drafts tokens then, and may ignore mechanism A",
        ),
        (
            heats and weights,
            "algorithm.rollout_correction: its weights would divide mechanism A's temperatures "
            "out again; leave rollout_is and rollout_rs out",
        ),
        (
            heats and rollout.name in OTHER_ROLLOUTS,
            f"rollout.name={rollout.name}: mechanism A runs in vLLM; leave "
            "agent.default_agent_loop=hapo_agent out",
        ),
    ):
        if wrong:
            raise ValueError(why)
    exact = model.use_remove_padding and not model.get("use_fused_kernels", False)
    if (uses_h or heats) and not exact:
        print(
            "note: with padding or fused kernels h comes from verl's own entropies, log Z - "
            "E[logit]: off by some 1e-3 in float32 and 0.2 in bfloat16; set "
            "model.use_remove_padding=True and model.use_fused_kernels=False for exact ones"
        )


def check_bupo(config, settings, weights) -> None:
    """Raise ValueError for what BuPO cannot run with. weights: of verl's rollout correction."""
    actor = config.actor_rollout_ref.actor
    ulysses = "actor_rollout_ref.actor.ulysses_sequence_parallel_size"
    ulysses = [ulysses, ulysses.replace("actor.ulysses", "actor.fsdp_config.ulysses")]
    ulysses = max(OmegaConf.select(config, name, default=1) for name in ulysses)
    for wrong, why in (
        (
            actor.strategy == "fsdp",
            "actor.strategy=fsdp: its flat parameters would decay the layers above BuPO's layer; "
            "set actor_rollout_ref.actor.strategy=fsdp2",
        ),
        (
            actor.strategy not in ("fsdp", "fsdp2"),
            f"actor.strategy={actor.strategy}: BuPO cuts models of verl's FSDP2 engine alone",
        ),
        (
            weights,
            "algorithm.rollout_correction: in BuPO's phase 1 the old log-probabilities are a "
            "layer's, not the sampler's; leave rollout_is and rollout_rs out",
        ),
        (
            config.algorithm.use_kl_in_reward,
            "algorithm.use_kl_in_reward=True: in BuPO's phase 1 it would compare a layer with the "
            "reference; use actor.use_kl_loss, which is off in that phase",
        ),
        (
            settings.layer == bupo.AUTO and ulysses > 1,
            "bupo.layer=auto: is not measured under Ulysses sequence parallelism; give the layer "
            "as a number",
        ),
    ):
        if wrong:
            raise ValueError(why)


# ------------------------------------------------------------------------------------- the engine


@EngineRegistry.register(
    model_type="language_model",
    backend=["fsdp", "fsdp2"],
    device=["cuda", "npu", "cpu"],
    vendor="hapo",
)
class Engine(FSDPEngineWithLMHead):
    """verl's FSDP engine, whose model can be cut at a layer."""

    def initialize(self):
        super().initialize()
        self._verls_entropy = self.compute_entropy_from_logits
        if hasattr(self.module, "_get_fsdp_state"):
            # FSDP2 numbers its parts at the first forward pass, which must see them all
            self.module._get_fsdp_state()._lazy_init()

    def forward_step(self, micro_batch, loss_function, forward_only):
        if tu.get_non_tensor_data(micro_batch, MEASURE, False):
            return torch.tensor(0.0), self.measure(micro_batch)
        layer = tu.get_non_tensor_data(micro_batch, LAYER, 0)
        norm = tu.get_non_tensor_data(micro_batch, "bupo_norm", False)
        self._frozen_norm = bool(layer and norm)
        # old entropies steer HAPO, and verl's own lose the digits of a small one
        exact = functools.partial(exact_entropy, vocab_size=self.vocab_size())
        self.compute_entropy_from_logits = exact if forward_only else self._verls_entropy
        cut = contextlib.nullcontext()
        if layer:
            cut = internals.first_layers(causal_lm(self.module), layer, norm, head=True)
        with cut:
            return super().forward_step(micro_batch, loss_function, forward_only)

    def optimizer_step(self):
        if self._frozen_norm:  # phase 1 applies the final norm and does not train it
            internals.decoder_body(causal_lm(self.module)).norm.weight.grad = None
        return super().optimizer_step()

    def vocab_size(self) -> int:
        return vocabulary(self.model_config.tokenizer)

    def measure(self, micro_batch) -> dict:
        """Return the sums of dH_ffn over a micro-batch's tokens, as an output of verl's engine.

        They stand in the first response's row; the other rows hold zeros.
        """
        masks = (x.to(get_device_id()) for x in padded(micro_batch))
        ids, seen, response = masks
        with whole_embeddings(self.module, self.engine_config), torch.no_grad():
            entropy = internals.internal_entropy(
                causal_lm(self.module), ids, seen, response, self.vocab_size(), batch=len(ids)
            )
        tokens = response.sum().cpu()
        rows = torch.zeros(len(ids), len(entropy.feed_forward_change) + 1, dtype=torch.float64)
        rows[0] = torch.cat([entropy.feed_forward_change * tokens, tokens[None]])
        changes = torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)
        return {"model_output": {CHANGE: changes}, "loss": 0.0, "metrics": {}}


os.environ.setdefault("VERL_ENGINE_VENDOR", "hapo")  # verl's registry then hands out Engine


def causal_lm(module):
    """Return the transformers model inside verl's wrappers."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module


@contextlib.contextmanager
def whole_embeddings(module, engine_config):
    """While open, FSDP2 keeps the weights outside the blocks gathered, E_u among them.

    verl shards an untied output embedding separately.
    """
    units = [module, causal_lm(module).get_output_embeddings()]
    units = [unit for unit in units if hasattr(unit, "set_reshard_after_forward")]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(engine_config.reshard_after_forward, recurse=False)
            unit.reshard()


def padded(micro_batch):
    """Return (ids, attention mask, response mask) of a micro-batch, padded on the right."""
    ids = micro_batch["input_ids"].to_padded_tensor(0)
    response, seen = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, mask in enumerate(micro_batch["response_mask"].unbind()):
        length = len(micro_batch["input_ids"][row])
        seen[row, :length] = 1
        response[row, length - len(mask) : length] = mask.long()  # tools' tokens are 0 in it
    return ids, seen, response


def exact_entropy(logits, chunk_size=2048, vocab_size=None):
    """Return each row's entropy over the tokenizer's ids, (N, V) -> (N,), in nats.

    It has no cancellation where it is small (losses.row_logprobs_and_entropy).
    """
    with torch.no_grad():
        chunks = [chunk.float() for chunk in logits[:, :vocab_size].split(chunk_size)]
        return torch.cat([losses.row_logprobs_and_entropy(c, c.argmax(-1))[1] for c in chunks])
