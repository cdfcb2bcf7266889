"""Is every causal language model of transformers trained exactly, or refused in one line?

    python experiments/benchmarks/model_zoo.py              all classes that can be made tiny
    python experiments/benchmarks/model_zoo.py qwen3 phi3   some, by model type

Makes a random model of two small layers of every class, opens a run on it as train.py does, and
prints one line per class. *exact*: the run opened, and the log-probabilities of the sampler and of
the scorer (whole batch, row by row, twice in training mode) differ from those of the model's own
forward pass over each text by at most 2e-4, on other and longer prompts than the self-check's.
*refused*: one line said why not. Anything else is a fault, and the exit code is 1.
"""

import contextlib
import io
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common.threads  # noqa: F401 - before torch

# isort: split
import torch
import transformers
from transformers import AutoTokenizer

from common.errors import UserError
from engine.engine import SingleProcess
from engine.self_check import forward_logprobs
from run.option_checks import parse
from run.setup import open_run

LARGEST, LARGEST_SIZE = 2e-4, 20_000_000
SIZES = {  # by the names that configurations use
    "vocab_size": 320,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "model_dim": 32,
    "intermediate_size": 64, "ffn_dim": 64, "d_ff": 64, "n_inner": 64, "decoder_ffn_dim": 64,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "attention_head_dim": 8,
    "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "sliding_window": 8, "rotary_dim": 8, "vocab_size_per_layer_input": 320,
    "hidden_size_per_layer_input": 8, "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 4,
    "mamba_d_head": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "word_embed_proj_dim": 32,
}  # fmt: skip


HEADS = ("head_dim", "attention_head_dim", "v_head_dim")
VARIANTS = [  # of the sizes, until a forward pass works: classes expect different ones of them
    {},
    dict.fromkeys(HEADS),
    dict.fromkeys(HEADS) | {"num_key_value_heads": 4, "num_kv_heads": 4},
    {"num_key_value_heads": 4, "head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 0},
    {"num_hidden_layers": 4},
    {"num_hidden_layers": 4, "num_key_value_heads": 4} | dict.fromkeys(HEADS),
]


def tiny_model(cls):
    """Return a small random model of a class; ValueError where none can be made."""
    why = ""
    for variant in VARIANTS:
        try:
            usual = cls()
            sizes = {name: size for name, size in SIZES.items() if getattr(usual, name, None)}
            sizes |= {name: size for name, size in variant.items() if hasattr(usual, name)}
            sizes = {name: size for name, size in sizes.items() if size is not None}
            config = cls(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0)
            with torch.device("meta"):
                built = transformers.AutoModelForCausalLM.from_config(config)
            if (size := sum(p.numel() for p in built.parameters())) > LARGEST_SIZE:
                raise ValueError(f"{size} parameters")
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                for p in model.parameters():
                    if p.dim() > 1:
                        p.mul_(4)  # sharper distributions show smaller errors
                model(torch.zeros(1, 3, dtype=torch.long), use_cache=False)
            return model
        except Exception as error:  # noqa: BLE001 - the library may raise anything
            why = why or f"{type(error).__name__}: {str(error)[:80]}"
    raise ValueError(why)


def verdict(folder):
    """Return ("exact", the largest difference) or ("refused", the line)."""
    arguments = f"--model {folder} --data {folder}/q.jsonl --max-new-tokens 8 --prompts-per-step 4"
    more = f"--num-generations 2 --updates-per-rollout 1 --device cpu --out {folder}/run"
    try:
        run, _ = open_run(parse([*arguments.split(), *more.split()], ""), SingleProcess("cpu"))
    except UserError as error:
        line = str(error)
        return "refused" if "\n" not in line else "FAULT: several lines", line
    return "exact", largest_difference(run)


@torch.no_grad()
def largest_difference(run):
    """Return the largest difference of a log-probability from the model's own forward pass."""
    prompts = [list(range(5, 5 + n)) for n in (3, 11, 26)]
    uniform = torch.rand(12, 6, generator=torch.Generator().manual_seed(1))
    rollout = run.engine.generate(prompts, 2, 12, 1.0, uniform)
    own = forward_logprobs(run.policy, rollout, run.vocab_size)
    found = [rollout.logp[rollout.mask]]
    whole = slice(0, 6)
    for rows in ([whole], [whole], [slice(i, i + 1) for i in range(6)], [slice(0, 2), slice(2, 6)]):
        scores = run.engine.batch_logprobs(run.policy, rollout, rows, None)
        found.append(scores.logp[rollout.mask])
    return max((x - own).abs().max().item() for x in found)


def main(only):
    tokenizer, faults, counts = AutoTokenizer.from_pretrained(ROOT / "assets/tiny-qwen3"), 0, {}
    for cls in sorted(transformers.MODEL_FOR_CAUSAL_LM_MAPPING, key=lambda cls: cls.model_type):
        if only and cls.model_type not in only:
            continue
        started, said = time.perf_counter(), io.StringIO()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said):
            questions = "".join(
                f'{{"question": "{i} + 1?", "answer": "{i + 1}"}}\n' for i in range(8)
            )
            pathlib.Path(folder, "q.jsonl").write_text(questions, encoding="utf-8")
            try:
                model = tiny_model(cls)
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
            except Exception as error:  # noqa: BLE001 - the library may raise anything
                kind, detail = "not tiny", f"{type(error).__name__}: {str(error)[:90]}"
            else:
                started = time.perf_counter()
                try:
                    kind, detail = verdict(folder)
                except Exception as error:  # noqa: BLE001 - a traceback is what is looked for
                    kind, detail = "FAULT", f"{type(error).__name__}: {str(error)[:150]}"
        if kind == "exact":
            if not detail <= LARGEST:
                kind = "FAULT: not exact"
            detail = f"{detail:.1e}"
        counts[kind] = counts.get(kind, 0) + 1
        faults += kind.startswith("FAULT")
        detail = " ".join(str(detail).replace(folder, "DIR").split())
        print(
            f"{cls.model_type:24s} {time.perf_counter() - started:5.2f} s  {kind:9s} {detail}",
            flush=True,
        )
    print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    return faults


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
