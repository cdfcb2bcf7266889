"""bridges/trl_trainers.py with a vLLM engine in TRL's own process, on the addition task.

tests/engines/trl_vllm.sh makes the environment and runs this file. Two things of TRL and vLLM are
changed here, for a CPU alone: TRL passes no dtype to vLLM, whose default is 16 bits; and oneDNN's
packed weights would leave TRL's weight transfer nothing to write to.
"""

import argparse
import functools
import os
import types

import pytest
import torch
from conftest import TINY

pytest.importorskip("vllm")
pytest.importorskip("trl")
pytestmark = [pytest.mark.optional("vllm", "trl"), pytest.mark.programs]
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import trl.generation.vllm_generation as generation
from models import with_head_size
from transformers import AutoTokenizer
from vllm import _custom_ops

import hapo
from bridges import trl_trainers, vllm_temperature
from sampling import entropy_of, position_ids, vocabulary
from scripts import trl_addition
from tasks import load_problems

TAU = 0.3
ROLLOUTS = int(os.environ.get("HAPO_ROLLOUTS", "5"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    with_head_size(TINY, folder)
    return folder


@pytest.fixture(scope="module")
def built(folder, tmp_path_factory):
    """built(rollouts, **settings): a HAPOTrainer of the addition task with vLLM beside it."""
    _custom_ops._supports_onednn = False
    generation.LLM = functools.partial(generation.LLM, dtype="float32", enforce_eager=True)
    train_set, held_out = load_problems("addition")

    def build(rollouts, **settings):
        asked = argparse.Namespace(trainer="hapo", lora=False, rollouts=rollouts, lr=None)
        args = trl_addition.config(asked, str(tmp_path_factory.mktemp("out")))
        args.use_vllm, args.vllm_mode, args.vllm_max_model_length = True, "colocate", 128
        vars(args).update(settings)
        return trl_trainers.HAPOTrainer(
            str(folder),
            trl_addition.reward_for(train_set + held_out),
            args=args,
            train_dataset=trl_addition.asked(train_set),
            eval_dataset=trl_addition.asked(held_out[:64]),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )

    return build


@pytest.fixture(scope="module")
def trainer(built):
    return built(ROLLOUTS, tau=TAU)


@torch.no_grad()
def off_by(trainer, batch, stats):
    """(largest difference of vLLM's log-probabilities from transformers' at Eq. 8's T, T)"""
    ids, seen, size = trl_trainers.text_of(batch)
    model = trainer.model.eval()
    logits = model(ids, attention_mask=seen, position_ids=position_ids(seen)).logits
    trainer.model.train()
    logits = logits[:, -size - 1 : -1].float()
    known = vocabulary(trainer.processing_class)
    entropy = entropy_of(logits[..., :known].flatten(0, 1))
    T = torch.ones_like(entropy)
    if stats is not None:
        T = hapo.adaptive_temperature(entropy, hapo.EntropyStats(*torch.tensor(stats)), tau=TAU)
    T = T.view(len(ids), -1)
    logp = (logits / T[..., None]).log_softmax(-1)
    logp = logp.gather(-1, batch["completion_ids"][..., None])[..., 0]
    mask = batch["completion_mask"].bool()
    return (logp - batch["sampling_per_token_logps"]).abs()[mask].max().item(), T[mask]


def test_rollouts_are_drawn_at_eq_8_with_the_last_rollouts_statistics(trainer):
    """And the addition task is learned: HAPO_ROLLOUTS rollouts."""
    rollout, seen = trainer._generate_and_score_completions, []

    def checked(inputs):
        stats = trainer._kept.stats
        batch = rollout(inputs)
        if trainer.model.training:
            worst, T = off_by(trainer, batch, stats)
            reward = trainer._metrics["train"]["reward"][-1]
            seen.append((stats, worst, T.min().item(), T.max().item(), reward))
            print(
                f"rollout {len(seen)}: reward {reward:.3f}, T {T.min():.2f} to {T.max():.2f}, "
                f"log-probabilities off by {worst:.1e}",
                flush=True,
            )
            assert "importance_sampling_ratio" not in batch
        return batch

    trainer._generate_and_score_completions = checked
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    after = trainer.evaluate()["eval_reward"]
    print(f"held out {before:.3f} before, {after:.3f} after {ROLLOUTS} rollouts")
    assert len(seen) == ROLLOUTS and seen[0][0] is None
    assert seen[0][2:4] == (1.0, 1.0)
    assert all(worst < 2e-4 for _, worst, *_ in seen)
    for _, _, low, high, _ in seen[1:]:
        assert 1 - TAU - 1e-6 <= low < 0.8 and 1.15 < high <= 1 + TAU + 1e-6
    assert len({tuple(stats) for stats, *_ in seen[1:]}) == ROLLOUTS - 1  # renewed each time
    if ROLLOUTS >= 30:
        assert after > 0.6 > before


def test_an_engine_that_does_not_apply_a_is_refused(trainer, monkeypatch):
    trainer._check_vllm()
    untouched = lambda self, logits, context=None: logits
    monkeypatch.setattr(vllm_temperature.AdaptiveTemperature, "apply", untouched)
    with pytest.raises(ValueError, match="does not apply HAPO's adaptive temperature"):
        trainer._check_vllm()


def test_sixteen_bits_are_announced(trainer, capsys):
    trainer._check_vllm()
    assert "vLLM samples in" not in capsys.readouterr().out
    config = types.SimpleNamespace(model_config=types.SimpleNamespace(dtype=torch.bfloat16))
    engine = types.SimpleNamespace(vllm_config=config)
    llm, trainer.vllm_generation.llm = trainer.vllm_generation.llm, None
    monkey = types.SimpleNamespace(llm_engine=engine, generate=llm.generate)
    trainer.vllm_generation.llm = monkey
    trainer._check_vllm()
    trainer.vllm_generation.llm = llm
    assert "note: vLLM samples in torch.bfloat16, the policy is trained in torch.float32" in (
        capsys.readouterr().out
    )
