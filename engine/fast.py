"""Define FastEngine, which runs by default and computes the plain engine's numbers faster.

It decodes with a fast decoder (engine/decoding.py), packs several responses into one row
(engine/packing.py), never holds all logits (engine/logprobs.py), and runs matrix products in
--dtype. With --plain it calls the plain engine's methods; this serves the precisions and the
several processes that the plain engine does not support.
"""

import internals
import sampling
from engine import packing
from engine.decoding import generate
from engine.engine import Engine, autocast
from engine.logprobs import chunked_logprobs_and_entropy
from engine.micro_batches import split_by_tokens
from engine.replica import Replica


class FastEngine(Engine):
    """Engine with fast versions of sampling and scoring."""

    replica = None  # copy of the policy in the compute dtype that draws the responses, if any

    def __init__(self, policy, options, dist, *more):
        super().__init__(policy, options, dist, *more)
        self.packer = packing.Packer(policy.config)
        if self._samples_from_a_replica():
            self.replica = Replica(policy, options.dtype, dist.device)

    def _samples_from_a_replica(self):
        return self.options.dtype != "float32"

    def generate(
        self, prompts, group_size, max_new_tokens, temperature, uniform, measure_entropy=False
    ):
        arguments = (prompts, group_size, max_new_tokens)
        model = self.policy if self.replica is None else self.replica.refreshed()
        decode, more = generate, {}
        if self.options.plain:
            decode = sampling.generate
        else:
            more["capture"] = self.options.capture
            more["decode_rows"] = self.options.decode_rows
            more["prefill_tokens"] = self.options.prefill_tokens
        return decode(
            model,
            *arguments,
            self.eos_ids,
            temperature,
            self.vocab_size,
            uniform,
            measure_entropy,
            **more,
        )

    def micro_batches(self, rollout, rows):
        if not self.options.micro_tokens:
            return super().micro_batches(rollout, rows)
        packed = not self.options.plain and self.packer.packs(rollout, rows)
        return split_by_tokens(rollout, rows, self.options.micro_tokens, packed)

    def pack(self, rollout, rows):
        if self.options.plain:
            return super().pack(rollout, rows)
        return self.packer.pack(rollout, rows)

    def token_logprobs(self, model, rollout, rows, layer, measure_entropy=True):
        with autocast(self.dist.device, self.options.dtype):
            if self.options.plain:
                return super().token_logprobs(model, rollout, rows, layer, measure_entropy)
            norm = layer is None or self.options.bupo_norm
            packed = self.pack(rollout, rows)
            states = internals.response_states(model, packed, layer, norm)
            weight = internals.unembedding(model)[: self.vocab_size]
            logp, entropy = chunked_logprobs_and_entropy(
                states,
                weight,
                packed.tokens,
                self.options.temperature,
                measure_entropy=measure_entropy,
            )
        return self._token_scores(model, rollout.mask[rows], layer, logp, entropy)
