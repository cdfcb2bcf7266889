"""Measure mechanism A's share of a vLLM engine's decoding time, on a CPU or a GPU.

    python experiments/benchmarks/vllm_share.py --model DIR --requests 32 --tokens 40

Prints, for rounds with and without A in turn, the processor time per decoding step and the part of
it spent in bridges/vllm_temperature.py. vLLM takes attention heads of 32 numbers and more on a CPU;
--pad writes a model with such heads first (tests/engines/models.py). One process, one engine.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "engines")]
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch

import hapo
from bridges.vllm_temperature import AdaptiveTemperature, request_arguments


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "assets" / "tiny-qwen3"))
    parser.add_argument("--pad", action="store_true", help="give the model heads of 32 numbers")
    parser.add_argument("--requests", type=int, default=256, help="rows of a decoding step")
    parser.add_argument("--tokens", type=int, default=40, help="decoding steps of a round")
    parser.add_argument("--rounds", type=int, default=5, help="with A; as many without")
    return parser.parse_args()


def main():
    a = arguments()
    from vllm import LLM, SamplingParams

    if a.pad:
        from models import with_head_size

        folder = tempfile.mkdtemp()
        with_head_size(pathlib.Path(a.model), folder)
        a.model = folder
    spent, apply = [0.0, 0], AdaptiveTemperature.apply

    def timed(self, logits, context=None):
        started = time.thread_time()
        out = apply(self, logits, context)
        spent[0] += time.thread_time() - started
        spent[1] += self.acts
        return out

    AdaptiveTemperature.apply = timed
    how = dict(dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=a.requests)
    llm = LLM(a.model, seed=1, logits_processors=[AdaptiveTemperature], **how)
    stats = hapo.EntropyStats(*torch.tensor([-1.4, 3.4, 2.0, -5.8]))
    prompts = [{"prompt_token_ids": [5, 6, 7, 8, 9 + i % 50]} for i in range(a.requests)]
    shares = []
    for turn in range(2 * a.rounds + 1):  # the first one warms up
        extra = request_arguments(stats) if turn % 2 else None
        params = SamplingParams(max_tokens=a.tokens, ignore_eos=True, extra_args=extra)
        spent[:] = [0.0, 0]
        started = time.process_time()
        llm.generate(prompts, params, use_tqdm=False)
        whole = time.process_time() - started
        if extra:
            shares.append(100 * spent[0] / whole)
        print(
            f"{'with A' if extra else 'without'}: {1e3 * whole / a.tokens:.1f} ms a step, "
            f"{1e3 * spent[0] / max(1, spent[1]):.2f} ms of it in the processor"
        )
    shares.sort()
    size = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    print(
        f"vocabulary {size}, {a.requests} rows: A takes {shares[len(shares) // 2]:.1f} % of the "
        f"time ({shares[0]:.1f} to {shares[-1]:.1f})"
    )


if __name__ == "__main__":
    main()
