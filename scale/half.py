"""Float16 products: small gradients vanish there, so the loss is scaled up, the gradient down."""

import math

import torch

from run.machine import Weights


class ScaledWeights(Weights):
    """Float32 weights whose gradients come from float16 products."""

    def __init__(self, policy, groups, options, device_type, say):
        super().__init__(policy, groups, options)
        self.scaler, self.say = torch.amp.GradScaler(device_type), say

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def step(self, loss):
        """As Weights.step; where gradients overflowed under a scale that can still fall the update
        is "rescaled": that is no fault."""
        outcome, norm = super().step(loss)
        self.scaler.update()  # lower after an overflow, higher after many steps without
        scale = self.scaler.get_scale()
        if outcome == "skipped" and math.isfinite(loss) and scale > 1:
            self.say(
                f"note: float16 gradients overflowed, no weight moved; loss scale now {scale:g}"
            )
            return "rescaled", norm
        return outcome, norm

    def clip(self):
        self.scaler.unscale_(self.optimizer)
        return super().clip()

    def state(self):
        return self.scaler.state_dict()

    def restore(self, state):
        self.scaler.load_state_dict(state)
