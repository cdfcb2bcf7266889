"""What 0.5B, 1.5B and 7B need by the code's own estimate, on 1 to 8 GPUs.

    python benchmarks/memory_table.py

64 prompts x 8 answers of up to 512 tokens, prompts of 256, micro-batches of 16,384 tokens, gradient
checkpointing. Nothing is loaded.
"""

import dataclasses

from common import Qwen2Config
from gpu import SHAPES

from run import options
from scale import memory

STEP = (
    "--estimate --prompts-per-step 64 --answers-per-prompt 8 --updates-per-rollout 2 "
    "--max-new-tokens 512 --micro-tokens 16384 --gradient-checkpointing"
).split()
PARTS = "weights gradients moments replica activations logits kv_cache peak".split()


def main():
    o = options.parse(STEP, "")
    print(f"| shape | processes | {' | '.join(p.replace('_', ' ') for p in PARTS)} |")
    print(f"|{'---|' * (len(PARTS) + 2)}")
    for name, shape in SHAPES.items():
        config = Qwen2Config(vocab_size=151_936, max_position_embeddings=4096, **shape)
        for size, offload in ((1, False), (8, False), (1, True)):
            e = memory.estimate(config, dataclasses.replace(o, offload=offload), world_size=size)
            processes = f"{size}{', offload' if offload else ''}"
            numbers = " | ".join(f"{getattr(e, p) / memory.GIB:.1f}" for p in PARTS)
            print(f"| {name} ({e.parameters / 1e9:.2f} B) | {processes} | {numbers} |")


if __name__ == "__main__":
    main()
