"""Print which published models fit which GPU, with which options, by the code's own estimate.

    python experiments/benchmarks/fit_table.py

The shapes are those of the published configurations; nothing is loaded or downloaded. A run fits if
its estimated peak is at most 0.9 of the GPU's memory, which leaves room for the CUDA context and
for memory that the allocator cannot use. The number of GiB that a GPU reports is about its nominal
number of GB (a T4 of 16 GB reports 15 GiB). The first entry of WAYS that fits is printed. They are
ordered from the fastest to the one that needs least memory.
"""

import pathlib
import sys

from transformers import Qwen2Config, Qwen3Config

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from engine import memory  # noqa: E402
from run import option_checks  # noqa: E402

# name: configuration, hidden, feed-forward, layers, heads, key and value heads, vocabulary, tied
MODELS = {
    "Qwen2.5-0.5B": (Qwen2Config, 896, 4864, 24, 14, 2, 151_936, True),
    "Qwen3-0.6B": (Qwen3Config, 1024, 3072, 28, 16, 8, 151_936, True),
    "Qwen2.5-1.5B": (Qwen2Config, 1536, 8960, 28, 12, 2, 151_936, True),
    "Qwen3-1.7B": (Qwen3Config, 2048, 6144, 28, 16, 8, 151_936, True),
    "Qwen2.5-3B": (Qwen2Config, 2048, 11008, 36, 16, 2, 151_936, True),
    "Qwen3-4B": (Qwen3Config, 2560, 9728, 36, 32, 8, 151_936, True),
    "Qwen2.5-7B": (Qwen2Config, 3584, 18944, 28, 28, 4, 152_064, False),
    "Qwen3-8B": (Qwen3Config, 4096, 12288, 36, 32, 8, 151_936, False),
}
CARDS = (8, 12, 16, 24, 40, 80, 141)  # GB
STEP = "--prompts-per-step 16 --num-generations 8 --updates-per-rollout 2 --max-new-tokens 512"
ROOM = 0.9
WAYS = {
    "a": "--micro-tokens 16384",
    "b": "--micro-tokens 16384 --gradient-checkpointing",
    "c": "--micro-tokens 4096 --gradient-checkpointing --decode-rows 32",
    "d": "--micro-tokens 16384 --gradient-checkpointing --split-master",
    "e": "--micro-tokens 4096 --gradient-checkpointing --decode-rows 32 --split-master",
    "f": "--micro-tokens 16384 --gradient-checkpointing --offload",
    "g": "--micro-tokens 4096 --gradient-checkpointing --decode-rows 32 --offload",
}


def config_of(name):
    """Return the configuration of a published model, built from its shape in MODELS."""
    kind, hidden, inner, layers, heads, kv_heads, vocabulary, tied = MODELS[name]
    more = {"head_dim": 128} if kind is Qwen3Config else {}
    return kind(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        **more,
    )


def peak_of(config, way):
    """Return the estimated peak in GiB of a run with the options WAYS[way]."""
    given = f"--estimate {STEP} {WAYS[way]}".split()
    return memory.estimate(config, option_checks.parse(given, "")).peak / memory.GIB


def cell(config, card):
    """Return the first way that fits a GPU of `card` GB, and its peak in GiB; a dash if none."""
    for way in WAYS:
        peak = peak_of(config, way)
        if peak <= ROOM * card:
            return f"**{way}** {peak:.1f}"
    return "–"


def main():
    print(f"| model | {' | '.join(f'{card} GB' for card in CARDS)} |")
    print(f"|{'---|' * (len(CARDS) + 1)}")
    for name in MODELS:
        config = config_of(name)
        cells = " | ".join(cell(config, card) for card in CARDS)
        print(f"| {name} ({memory.parameter_count(config)[0] / 1e9:.2f} B) | {cells} |")


if __name__ == "__main__":
    main()
