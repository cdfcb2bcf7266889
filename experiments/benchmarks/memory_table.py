"""Print the memory that 0.5B, 1.5B and 7B need by the code's own estimate, and a step's duration.

    python experiments/benchmarks/memory_table.py

A step has 64 prompts of 256 tokens, 8 responses to each of up to 512 tokens, and passes of 16,384
tokens with gradient checkpointing. No weights are loaded. The seconds are computed, not measured:
scoring, update and recomputation take 2, 6 and 2 x parameters x tokens operations at a third of an
H100's bfloat16 peak, and decoding has the rate in RATES.
"""

from gpu import PEAK, SHAPES, config_of

from engine import memory
from run import option_checks

STEP = (
    "--estimate --prompts-per-step 64 --num-generations 8 --updates-per-rollout 2 "
    "--max-new-tokens 512 --micro-tokens 16384 --gradient-checkpointing"
).split()
PARTS = "weights gradients moments replica activations logits kv_cache sampling peak".split()
RATES = {"0.5b": 60_000, "1.5b": 30_000, "7b": 7_000}  # predicted tokens/s of decoding with graphs
WAYS = [  # (name, processes, more options)
    ("1", 1, []),
    ("1, --split-master", 1, ["--split-master"]),
    ("1, --offload", 1, ["--offload"]),
    ("8", 8, []),
]


def seconds(parameters, size, name):
    """Return the computed seconds of a step: (decoding, scoring and update)."""
    rows, answer, prompt = 512, 512, 256
    operations = (2 + 6 + 2) * parameters * rows * (answer + prompt)
    return rows * answer / RATES[name] / size, operations / (PEAK["H100"] / 3) / size


def main():
    names = " | ".join(part.replace("_", " ") for part in PARTS)
    print(f"| shape | processes | {names} | decode + rest |")
    print(f"|{'---|' * (len(PARTS) + 3)}")
    for name in [s for s in SHAPES if s in RATES]:
        for way, size, more in WAYS:
            e = memory.estimate(
                config_of(name), option_checks.parse(STEP + more, ""), world_size=size
            )
            numbers = " | ".join(f"{getattr(e, p) / memory.GIB:.1f}" for p in PARTS)
            decode, rest = seconds(e.parameters, size, name)
            print(
                f"| {name} ({e.parameters / 1e9:.2f} B) | {way} | {numbers} "
                f"| {decode:.0f} + {rest:.0f} s |"
            )


if __name__ == "__main__":
    main()
