"""Run HAPO and BuPO inside TRL's GRPOTrainer, for features that train.py does not have.

Examples are LoRA, DeepSpeed, FSDP over several nodes, and trainers and data sets of your own.
Instead of `from trl import GRPOConfig, GRPOTrainer`, write

    from bridges.trl_trainers import HAPOConfig, HAPOTrainer       (BuPOTrainer, HAPOBuPOTrainer)

No code of TRL is copied. Besides `__init__`, three of its methods are overridden, and each calls
the one it overrides. One rollout runs them in this order:

    _generate_and_score_completions      BuPO: select the policy to train (_layer)
        transformers draws responses     A: add a logits processor after all others
        _get_per_token_logps_...         compute TRL's old log-probabilities, layer l's in phase 1,
                                         and the full policy's entropies (_scored)
        afterwards                       compute h, from the statistics of all processes; B
    then for each micro-batch of the updates:
    _compute_loss                        D: epsilon_low and epsilon_high become (B, T) tensors
        _get_per_token_logps_...         compute new log-probabilities; C: change the advantages,
                                         which TRL reads after this call

Mechanism A runs in transformers' `generate` and `generate_batch`, and in vLLM (use_vllm=True) by
bridges/vllm_temperature.py, whose entry point must be installed: pip install -e . in this folder.
If T_base is not 1, all entropies are those of logits / T_base. With top_k or top_p, those that
transformers' `generate` heats by are of the remaining ids.

TRL can weigh every token by pi_old / pi_sampler. With mechanism A that weight divides A's
temperatures out again, and on top of it come the rounding differences of two engines. The ratio
that HAPO clips has the trainer's own old log-probabilities in its denominator, as in the paper's
Eq. 3: the tokens that A has heated are what the policy learns from. So the default of HAPOConfig is
vllm_importance_sampling_correction=False.

Shapes: B responses of this process, S positions of prompts and responses, T positions of responses,
padded as in TRL.
"""

import contextlib
import inspect
from dataclasses import dataclass, field

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

import bupo
import hapo
import internals
import losses
from sampling import AdaptiveTemperature, vocabulary

try:
    from trl import GRPOConfig, GRPOTrainer
except (ImportError, RuntimeError) as error:  # RuntimeError: a package that TRL needs is missing
    reason = str(error).splitlines()[-1]
    raise ImportError(f"this needs TRL ({reason}); pip install 'trl>=1.0'") from error

SCORE = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
IDLE = (
    "note: with one optimiser step a rollout every ratio is 1: nothing is clipped, and HAPO's C "
    "and D do next to nothing; raise steps_per_generation or num_iterations"
)
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo")  # TRL's losses that use the clipped surrogate


def opt(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class HAPOConfig(GRPOConfig):
    """GRPOConfig with DAPO's clip range, and options of run/options.py under the same names."""

    epsilon_high: float | None = opt(0.28, "upper clip distance")
    adaptive_temperature: bool = opt(True, "HAPO A: temperature by token entropy (Eq. 8)")
    token_group_average: bool = opt(True, "HAPO B: token-level group average (Eq. 9)")
    advantage_redistribution: bool = opt(True, "HAPO C: advantage redistribution (Eq. 10-11)")
    adaptive_clip: bool = opt(True, "HAPO D: asymmetric adaptive clipping (Eq. 12-13)")
    rho: float = opt(0.8, "rho, quantile of the entropy pivot")
    tau: float | None = opt(None, "tau of the adaptive temperature; default 0.05, zscore 0.1")
    temperature_form: str = opt("bounded", "form of Eq. 8: bounded or zscore")
    released: bool = opt(False, "follow HAPO's released code where it differs from the paper")
    vllm_importance_sampling_correction: bool = opt(False, "True would divide A out again")
    exact_entropy: bool = opt(True, "False: TRL's own, log Z - E[logit], off by some 1e-6 nats")
    bupo_layer: str | None = opt(None, "align this layer's policy first: 1 ... L, or auto")
    bupo_steps: int = opt(30, "s_inter, rollouts of the first phase")
    bupo_norm: bool = opt(False, "final norm on the internal policy too")

    def __post_init__(self):
        super().__post_init__()
        if self.tau is None:
            self.tau = 0.1 if self.temperature_form == "zscore" else 0.05
        if self.bupo_layer is not None:
            self.bupo_layer = str(self.bupo_layer)
            if self.ddp_find_unused_parameters is None:
                self.ddp_find_unused_parameters = True  # layers above l have no gradient
        layer, liger = self.bupo_layer, getattr(self, "use_liger_kernel", False)
        named = layer in (None, bupo.AUTO) or layer.isdecimal()
        token = self.importance_sampling_level == "token"
        for wrong, why in (
            (liger, "use_liger_kernel True: its loss has one advantage an answer; leave it out"),
            (not token, f"importance_sampling_level {self.importance_sampling_level}: only token"),
            (self.loss_type not in CLIPPED, f"loss_type {self.loss_type}: only {CLIPPED}"),
            (not named, f"bupo_layer {layer}: must be auto or a layer from 1 to the last"),
            (not 0 <= self.rho <= 1, f"rho {self.rho}: must lie in [0, 1]"),
            (
                self.temperature_form not in ("bounded", "zscore"),
                f"temperature_form {self.temperature_form}: must be bounded or zscore",
            ),
            (
                self.tau < 0 or (self.temperature_form == "bounded" and self.tau >= 1),
                f"tau {self.tau}: must be at least 0, and below 1 in the bounded form",
            ),
            (
                self.released and self.temperature_form == "zscore",
                "temperature_form zscore: the released code has only the bounded form",
            ),
        ):
            if wrong:
                raise ValueError(why)


def text_of(batch):
    """Return (ids, attention mask, T) of prompts and responses; ids and mask are (B, S)."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    return ids, seen, batch["completion_ids"].shape[1]


class Kept(TrainerCallback, ExportableState):
    """State that the first batch after a resume needs, saved in TRL's own trainer_state.json."""

    def __init__(self):
        self.stats, self.layer = None, None  # EntropyStats of the last rollout; boundary layer

    def state(self):
        return {"args": {}, "attributes": {"stats": self.stats, "layer": self.layer}}

    def on_train_begin(self, args, state, control, **more):
        saved = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, dict):
            vars(self).update(saved["attributes"])


class Bridge:
    """Code that HAPO and BuPO share, to be combined with GRPOTrainer."""

    _layer = None  # layer whose policy this rollout trains; None: the model's own

    def __init__(self, model, reward_funcs, args=None, *more, **kwargs):
        bottom_up = isinstance(self, BuPO)
        if not isinstance(args, HAPOConfig):
            raise ValueError(f"{type(self).__name__}: args must be a HAPOConfig")
        if bottom_up != (args.bupo_layer is not None):
            wants = "a bupo_layer: 1 ... L, or auto" if bottom_up else "no bupo_layer"
            raise ValueError(f"{type(self).__name__} takes {wants}, not {args.bupo_layer}")
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        self.add_callback(Kept)
        whole = self._causal_lm(self.model)
        if whole.get_input_embeddings().weight.numel():  # DeepSpeed's stage 3 has divided it
            internals.check_logits(whole, type(self).__name__)
        a = self.args
        if a.num_iterations == 1 and a.steps_per_generation <= a.gradient_accumulation_steps:
            self.accelerator.print(IDLE)

    @property
    def _kept(self):
        return next(c for c in self.callback_handler.callbacks if isinstance(c, Kept))

    def _causal_lm(self, model):
        """Return the transformers model inside the wrappers of accelerate and PEFT."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _tokens(self):
        """Return the number of the tokenizer's ids; later ids only pad the model's vocabulary."""
        return vocabulary(getattr(self.processing_class, "tokenizer", self.processing_class))

    # bupo.measure_boundary calls these three methods to measure over all processes
    def all_reduce_sum(self, *numbers):
        sums = torch.tensor(numbers, device=self.accelerator.device)
        return self.accelerator.reduce(sums, "sum").tolist()

    def all_reduce_max(self, number):
        return self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max()

    def reshard(self, model):
        """Free gathered weights: FSDP2 gathers layer l + 1 ahead of time and would keep it."""
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()


class HAPO(Bridge):
    """HAPO's changes to GRPOTrainer."""

    _scored = None  # while a rollout is scored: list of entropies of the model being trained
    _redistribute = None  # while a loss is computed: function of its log-probabilities, for C

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.use_vllm and self.args.adaptive_temperature:
            self._check_vllm()

    def _check_vllm(self):
        """Raise ValueError unless TRL's vLLM applies mechanism A. Say if it samples in 16 bits."""
        from bridges import vllm_temperature

        vllm = self.vllm_generation
        if self.args.vllm_mode == "server":
            if self.accelerator.is_main_process:
                drawn = []
                for probe in vllm_temperature.probe_requests():
                    probe["generation_kwargs"] = {"vllm_xargs": probe.pop("extra_args")}
                    answers = vllm.vllm_client.generate([[1, 2, 3]], **probe)["completion_ids"]
                    drawn.append([ids[0] for ids in answers])
                vllm_temperature.check_draws(*drawn)
            return
        if self.args.vllm_enable_sleep_mode:  # asleep until TRL hands it the weights again
            generate = vllm.llm.generate

            def checked(*args, **kwargs):
                vllm.llm.generate = generate
                vllm_temperature.check_engine(vllm.llm)
                return generate(*args, **kwargs)

            vllm.llm.generate = checked
        else:
            vllm_temperature.check_engine(vllm.llm)
        engine, own = vllm.llm.llm_engine.vllm_config.model_config.dtype, self.model.dtype
        if engine != own:
            self.accelerator.print(
                f"note: vLLM samples in {engine}, the policy is trained in {own}: responses come "
                "from a slightly different policy (TRL passes no dtype to vLLM)"
            )

    def _generate_and_score_completions(self, inputs):
        if not self.model.training:  # held-out responses are drawn at the base temperature
            return super()._generate_and_score_completions(inputs)
        self._scored = []
        with self._heated():
            batch = super()._generate_and_score_completions(inputs)
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        entropy = self._old_entropy(batch)
        masks, rho = self._everywhere(mask), self.args.rho
        stats = hapo.entropy_stats(self._everywhere(entropy), masks, rho)
        self._kept.stats = torch.stack(stats).tolist()
        batch["h"] = h = hapo.modulation(entropy, stats, mask, self.args.released)
        if self.args.token_group_average:  # Eq. 9 of a R + b is that of R: use TRL's advantages
            shares = self._everywhere(batch["advantages"])
            how = (self.num_generations, self.args.released)
            shares = hapo.token_group_advantages(shares, masks, *how)
            first = self.accelerator.process_index * len(mask)
            batch["advantages"] = shares[first : first + len(mask), : mask.shape[1]]
        seen = {**stats._asdict(), "h": h[mask.bool()].mean()}
        for name, value in seen.items():
            mean = self.accelerator.reduce(value.to(self.accelerator.device), "mean")
            self._metrics["train"][f"hapo/{name}"].append(mean.item())
        return batch

    def _everywhere(self, x):
        """Return the rows of all processes, padded to the longest."""
        return self.accelerator.gather(self.accelerator.pad_across_processes(x, dim=1))

    @contextlib.contextmanager
    def _heated(self):
        """While open, responses are drawn at mechanism A's temperatures."""
        a, stats = self.args, self._kept.stats
        if not a.adaptive_temperature or stats is None:
            yield
            return
        stats = hapo.EntropyStats(*torch.tensor(stats, device=self.accelerator.device))
        if a.use_vllm:
            with self._statistics_in_requests(stats):
                yield
            return
        how = dict(stats=stats, tau=a.tau, form=a.temperature_form, released=a.released)
        rule = lambda entropy, positions: hapo.adaptive_temperature(entropy, **how)
        processor = AdaptiveTemperature(rule)
        processor.supports_continuous_batching = True
        model = self._causal_lm(self.model)
        build = model._get_logits_processor

        def heated(*args, **kwargs):
            processors = build(*args, **kwargs)
            processors.append(processor)  # after the division by T_base
            return processors

        model._get_logits_processor = heated
        try:
            yield
        finally:
            del model._get_logits_processor

    @contextlib.contextmanager
    def _statistics_in_requests(self, stats):
        """While open, every request to vLLM carries the statistics of the last rollout."""
        from bridges.vllm_temperature import request_arguments

        vllm, a = self.vllm_generation, self.args
        name = "vllm_xargs" if a.vllm_mode == "server" else "extra_args"
        plain = vllm.generation_kwargs
        form = "released" if a.released else a.temperature_form
        given = request_arguments(stats, a.tau, form, self.temperature)
        given = plain.get(name, {}) | given
        vllm.generation_kwargs = plain | {name: given}
        try:
            yield
        finally:
            vllm.generation_kwargs = plain

    @torch.no_grad()
    def _old_entropy(self, batch):
        """Return the full policy's entropies, (B, T).

        They come from TRL's own forward pass if it has made one, otherwise from an additional one.
        """
        scored, self._scored = self._scored, None
        if scored and "old_per_token_logps" in batch:  # else they are the reference model's (LoRA)
            return scored[0]
        ids, seen, size = text_of(batch)
        how = {name: batch[name] for name in SCORE.keys() & batch.keys()}  # inputs such as images
        how["batch_size"] = self.args.per_device_train_batch_size
        layer, self._layer, self._scored = self._layer, None, []
        try:
            self._get_per_token_logps_and_entropies(self.model, ids, seen, size, **how)
            return self._scored[0]
        finally:
            self._layer, self._scored = layer, None

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        score = super()._get_per_token_logps_and_entropies
        if self._scored is not None and model is self.model and self._layer is None:
            kwargs["compute_entropy"] = True  # TRL does not compute it here
            with self._measuring(args[2]) as exact:
                scores = score(model, *args, **kwargs)
            self._scored.append(torch.cat(exact) if exact else scores[1])
            return scores
        scores = score(model, *args, **kwargs)
        if self._redistribute is not None:
            self._redistribute(scores[0])
        return scores

    @contextlib.contextmanager
    def _measuring(self, size):
        """While open, record losses.py's entropies of the last `size` tokens in a list.

        Their relative error is small for low-entropy tokens, too. Nothing is recorded without
        exact_entropy, or if this process has only a shard of the unembedding.
        """
        model, exact = self._causal_lm(self.model), []

        def measure(module, given, out):
            weight = internals.unembedding(model)  # FSDP2 gathers it while the model runs
            if not self.args.exact_entropy or weight.dim() < 2 or hasattr(weight, "full_tensor"):
                return
            states = out.last_hidden_state[:, -size - 1 : -1]
            nothing = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
            how = (states, weight[: self._tokens()], nothing, self.temperature)
            chunk = max(1, internals.LOGITS_CHUNK // self._tokens())
            exact.append(losses.token_logprobs_and_entropy(*how, chunk_tokens=chunk)[1])

        hook = model.base_model.register_forward_hook(measure)
        try:
            yield exact
        finally:
            hook.remove()

    def _compute_loss(self, model, inputs):
        if "h" not in inputs:
            return super()._compute_loss(model, inputs)
        inputs, base = dict(inputs), (self.epsilon_low, self.epsilon_high)
        advantages, h = inputs["advantages"].view(len(inputs["h"]), -1), inputs["h"]
        bounds = hapo.adaptive_clip(h, *base) if self.args.adaptive_clip else base
        zone = bounds if self.args.released else base  # the released code takes D's bounds

        def redistribute(logp):  # TRL reads the advantages after it has scored
            ratio = losses.likelihood_ratio(logp, inputs.get("old_per_token_logps", logp))
            inputs["advantages"] = hapo.redistribute_advantages(
                advantages, h, ratio, *zone, self.args.released
            )

        if self.args.advantage_redistribution:
            self._redistribute = redistribute
        self.epsilon_low, self.epsilon_high = bounds
        try:
            return super()._compute_loss(model, inputs)
        finally:
            (self.epsilon_low, self.epsilon_high), self._redistribute = base, None


class BuPO(Bridge):
    """BuPO's changes to GRPOTrainer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.bupo_layer not in (None, bupo.AUTO):
            body = self._causal_lm(self.model)
            internals.check_layer(body, int(self.args.bupo_layer), "bupo_layer")

    def _generate_and_score_completions(self, inputs):
        if self.model.training:
            every, passes = self.args.steps_per_generation, self.args.gradient_accumulation_steps
            passed = self.state.global_step * passes + self._step % passes
            rollout = passed // (every * self.num_iterations) + 1
            layer = self.args.bupo_layer
            if layer == bupo.AUTO:
                layer = self._kept.layer or layer
            layer = layer if layer in (None, bupo.AUTO) else int(layer)
            self._layer = bupo.target_layer(rollout, self.args.bupo_steps, layer)
            if self.args.bupo_norm:  # phase 1 leaves the final norm's weights unchanged
                norm = internals.decoder_body(self._causal_lm(self.model)).norm
                norm.requires_grad_(self._layer is None)
        with self._without_reference():
            batch = super()._generate_and_score_completions(inputs)
        if self.model.training:
            if self._layer == bupo.AUTO:  # where TRL has computed no log-probabilities
                body = self._causal_lm(self.model)
                self._layer = self._kept.layer = self._measured(body, *text_of(batch))
            self._metrics["train"]["bupo/layer"].append(self._layer or 0)  # 0: the model's own
        return batch

    @contextlib.contextmanager
    def _without_reference(self):
        """While open, leave out the KL to the initial model in phase 1."""
        beta = self.beta
        if self.model.training and self._layer is not None:
            self.beta = 0.0
        try:
            yield
        finally:
            self.beta = beta

    def _get_per_token_logps_and_entropies(self, model, ids, seen, size, *args, **kwargs):
        body, training = self._causal_lm(model), self.model.training
        if training and self._layer == bupo.AUTO:
            self._layer = self._kept.layer = self._measured(body, ids, seen, size)
        layer = self._layer if training else None
        norm = layer is None or self.args.bupo_norm
        score = super()._get_per_token_logps_and_entropies
        with internals.first_layers(body, layer, norm, head=True):
            scores = score(model, ids, seen, size, *args, **kwargs)
        if layer is not None and not torch.is_grad_enabled():
            self.reshard(body)
        return scores

    @torch.no_grad()
    def _measured(self, body, ids, seen, size):
        """Return the boundary layer, measured on about 64 responses of all processes together.

        The responses are spread evenly over the batch.
        """
        count = min(len(ids), max(1, 64 // self.accelerator.num_processes))
        rows = [i * len(ids) // count for i in range(count)]
        response = torch.cat([torch.zeros_like(seen[:, :-size]), seen[:, -size:]], 1)
        with self.accelerator.autocast():
            found = bupo.measure_boundary(
                body, ids[rows], seen[rows], response[rows], self._tokens(), self
            )
        change = found.change[found.layer - 1].item()
        self.accelerator.print(
            f"bupo_layer auto: {found.layer}, whose block adds {change:+.3f} nats"
        )
        return found.layer

    def _compute_loss(self, model, inputs):
        with self._without_reference():
            return super()._compute_loss(model, inputs)


class HAPOTrainer(HAPO, GRPOTrainer):
    """HAPO in TRL."""


class BuPOTrainer(BuPO, GRPOTrainer):
    """BuPO in TRL, with any of its clipped losses."""


class HAPOBuPOTrainer(HAPO, BuPO, GRPOTrainer):
    """HAPO and BuPO in TRL: in both phases, h and mechanism A use the full policy's entropies."""
