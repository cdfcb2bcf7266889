"""Keep a complete copy of the policy in every process, in the compute dtype, for sampling."""

import copy

import torch
from transformers import AutoModelForCausalLM

from common.attention import install_mask_hook
from common.models import assert_tied
from engine.engine import full_tensor
from internals import decoder_body


class Replica:
    """A copy of the policy in the compute dtype, which `refreshed` updates."""

    def __init__(self, policy, dtype, device):
        self.policy = policy
        with torch.device("meta"):
            config, compute = copy.deepcopy(policy.config), getattr(torch, dtype)
            model = AutoModelForCausalLM.from_config(config, dtype=compute)
        model.to_empty(device=device)
        body = decoder_body(model)
        body.rotary_emb = type(body.rotary_emb)(config=model.config).to(device)
        model.tie_weights()
        assert_tied(model)
        for target, source in zip(model.buffers(), policy.buffers()):
            target.copy_(source)
        model.generation_config = policy.generation_config
        self.model = install_mask_hook(model).requires_grad_(False)

    @torch.no_grad()
    def refreshed(self):
        """Return the copy, after updating it with the policy's current weights.

        A sharded policy's weights are gathered one at a time. They are first cast to the copy's
        dtype, which halves the communication.
        """
        for target, source in zip(self.model.parameters(), self.policy.parameters()):
            target.copy_(full_tensor(source.to(target.dtype)))
        return self.model
