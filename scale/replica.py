"""A replica of the policy to draw answers from: in the compute dtype, whole on every rank."""

import copy

import torch
from transformers import AutoModelForCausalLM

from internals import decoder_body
from program.attention import mend_masks
from program.models import assert_tied
from scale.shard import whole


class Replica:
    """Called for the model to draw from: brings it up to date first."""

    def __init__(self, policy, dtype, device):
        self.policy = policy
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(policy.config), dtype=dtype)
        model.to_empty(device=device)
        body = decoder_body(model)
        body.rotary_emb = type(body.rotary_emb)(config=model.config).to(device)
        model.tie_weights()
        assert_tied(model)
        for target, source in zip(model.buffers(), policy.buffers()):
            target.copy_(source)
        model.generation_config = policy.generation_config
        self.model = mend_masks(model).requires_grad_(False)

    @torch.no_grad()
    def __call__(self):
        """The replica with the policy's weights: gathered one at a time, in its own dtype, which is
        half the traffic."""
        for target, source in zip(self.model.parameters(), self.policy.parameters()):
            target.copy_(whole(source.to(target.dtype)))
        return self.model
