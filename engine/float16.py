"""Train with float16 products: the loss is scaled up so that small gradients do not underflow."""

import math

import torch

from engine.fast import FastEngine


class Fp16Engine(FastEngine):
    """Engine with float32 weights whose gradients come from float16 matrix products."""

    def __init__(self, policy, options, dist, *more):
        super().__init__(policy, options, dist, *more)
        self.scaler = torch.amp.GradScaler(dist.device.type)

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def optimizer_step(self, loss):
        """Clip the gradient and step, unless a value is NaN or infinite; adjust the loss scale.

        Return (outcome, gradient norm before clipping). The outcome is "rescaled", not "skipped",
        if gradients overflowed and the loss scale can still be lowered: this is expected.
        """
        outcome, norm = super().optimizer_step(loss)
        self.scaler.update()  # lowers the scale after an overflow, raises it after many good steps
        scale = self.scaler.get_scale()
        if outcome == "skipped" and math.isfinite(loss) and scale > 1:
            print(f"note: float16 gradients overflowed, no weight moved; loss scale now {scale:g}")
            return "rescaled", norm
        return outcome, norm

    def _clip_gradients(self):
        self.scaler.unscale_(self.optimizer)
        return super()._clip_gradients()
