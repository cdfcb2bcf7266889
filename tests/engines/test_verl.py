"""bridges/verl_hapo.py in verl's own worker, against this project's own step.

tests/engines/verl.sh makes the environment and runs this file in one process and, by torchrun, in
two. The shipped model, twelve responses in shuffled rows, three micro-batches, weights that have
moved since the responses were scored.
"""

import asyncio
import functools
import json

import pytest
import torch
from conftest import TINY

pytest.importorskip("verl")
pytestmark = [pytest.mark.optional("verl"), pytest.mark.programs]

import verl_worker  # isort: skip - sets the environment
from omegaconf import OmegaConf
from our_step import our_update
from verl_worker import OneWorker, move_sharded

import bupo
import hapo
import sampling
from bridges import verl_hapo
from common.models import load_model
from run.batch import rollout_of

P, G, T = 3, 4, 8
QUESTIONS = ("What is 3 + 4?", "What is 247 + 138?", "What is 99 + 12?")
ORDER = torch.randperm(P * G, generator=torch.Generator().manual_seed(0)).tolist()
TOLERANCE = 1e-5  # of the loss, and of a gradient's largest entry


@pytest.fixture(scope="session")
def given(tmp_path_factory):
    """(folder, prompts, responses, texts, rewards): the shipped model without padding ids."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = load_model(TINY)
    model.resize_token_embeddings(sampling.vocabulary(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    how = dict(add_generation_prompt=True, return_dict=False)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [list(tokenizer.apply_chat_template(chat, **how)) for chat in chats]
    draws = torch.rand((T, P * G), generator=torch.Generator().manual_seed(3))
    eos = [tokenizer.eos_token_id]
    responses = sampling.generate(model, prompts, G, T, eos, 1.3, uniform=draws).responses()
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    rewards = torch.tensor([float(sum(map(ord, text)) % 2) for text in texts])
    return folder, prompts, responses, texts, rewards


MODE = "actor_rollout_ref.actor.policy_loss.loss_mode="
ACTOR = "actor_rollout_ref.actor."
HAPO, PLAIN = [MODE + "hapo", "algorithm.adv_estimator=hapo"], ["algorithm.adv_estimator=grpo"]
KL = [ACTOR + "use_kl_loss=True", ACTOR + "kl_loss_coef=0.3"]
LAYER, OURS = ["+bupo.layer=2", "+bupo.steps=1"], "--bupo-layer 2 --bupo-steps 1"
LAYERS = ["actor_rollout_ref.model.enable_gradient_checkpointing=True"]
DYNAMIC = [ACTOR + "use_dynamic_bsz=True", ACTOR + "ppo_max_token_len_per_gpu=90"]
SETTINGS = {
    "whole": (HAPO, ""),
    "without B": ([MODE + "hapo", *PLAIN], "--no-token-group-average"),
    "without C": (
        [*HAPO, "+hapo.advantage_redistribution=False"],
        "--no-advantage-redistribution",
    ),
    "without D": ([*HAPO, "+hapo.adaptive_clip=False"], "--no-adaptive-clip"),
    "DAPO": (PLAIN, "--algo dapo"),
    "rho 0.5": ([*HAPO, "+hapo.rho=0.5"], "--rho 0.5"),
    "dual clip": ([*HAPO, ACTOR + "clip_ratio_c=3.0"], "--dual-clip 3"),
    "with KL": ([*HAPO, *KL], "--kl 0.3"),
    "BuPO": ([*PLAIN, *LAYER], f"--algo dapo {OURS}"),
    "BuPO, normed": ([*PLAIN, *LAYER, "+bupo.norm=True"], f"--algo dapo {OURS} --bupo-norm"),
    "both": ([*HAPO, *LAYER], OURS),
    "both, KL": ([*HAPO, *LAYER, *KL], f"{OURS} --kl 0.3"),
    "both, checkpointed": ([*HAPO, *LAYER, *LAYERS], OURS),
    "both, by tokens": ([*HAPO, *LAYER, *DYNAMIC], OURS),
    "both, auto": ([*HAPO, "+bupo.layer=auto", "+bupo.steps=1"], OURS.replace("2 ", "auto ", 1)),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_loss_and_gradient_are_those_of_our_step(given, tmp_path, setting):
    folder, prompts, responses, texts, rewards = given
    theirs, ours = SETTINGS[setting]
    trainer = OneWorker(folder, P * G, G, *theirs)
    batch = trainer.put(ORDER, prompts, responses, rewards)
    by = 0.01 if setting == "with KL" else 0.1  # verl's k3 is clamped at 10, ours is not
    move = functools.partial(move_sharded, by=by)
    loss, gradients, still, metrics = trainer.step(batch, move)
    expected, own, kept, farthest, layer = our_update(
        folder, tmp_path / "ours", prompts, responses, texts, rewards, *ours.split(), by=by
    )
    assert farthest > by and metrics["bupo/layer"] == (layer or 0)
    assert loss == pytest.approx(expected, abs=TOLERANCE)
    assert gradients.keys() == own.keys()
    largest = max(g.abs().max() for g in own.values() if g is not None)
    off = 0.0
    for name, g in own.items():
        assert (g is None) == (gradients[name] is None), name
        if g is not None:
            off = max(off, (g - gradients[name]).abs().max().item())
    print(f"{setting}: loss off by {abs(loss - expected):.1e}, gradient by {off / largest:.1e}")
    assert off <= TOLERANCE * largest
    assert set(still) >= {name for name, g in own.items() if g is None}


@pytest.mark.parametrize("tied", [True, False])
def test_the_boundary_is_measured_on_all_tokens_of_the_responses_alone(given, tmp_path, tied):
    """Sums over the micro-batches, against bupo.measure_boundary on the same responses. verl shards
    an untied output embedding as a unit of its own."""
    folder, prompts, responses, texts, rewards = given
    if not tied:
        model, tokenizer = load_model(folder)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight.detach().clone())
        folder = tmp_path / "untied"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    trainer = OneWorker(folder, P * G, G, *HAPO, "+bupo.layer=auto", "+bupo.steps=1")
    layer = trainer.measured(trainer.put(ORDER, prompts, responses, rewards))
    rows = [row[verl_hapo.CHANGE] for row in trainer.store.rows.values()]
    sums = torch.stack(rows).double().sum(0)
    model, tokenizer = load_model(folder)
    answers = rollout_of(prompts, responses).with_response_mask(P * G)
    expected = bupo.measure_boundary(model, *answers, sampling.vocabulary(tokenizer))
    assert sums[-1] == sum(map(len, responses)) and layer == expected.layer
    assert torch.allclose(sums[:-1] / sums[-1], expected.change, atol=1e-5)


def test_groups_of_any_size_and_order():
    rewards = torch.zeros(7, 4)
    rewards[:, 3] = torch.tensor([1.0, 0, 1, 0, 0, 1, 0])
    mask = torch.ones(7, 4)
    mask[0, 1:] = mask[5, 2:] = 0
    index = verl_hapo.numpy.array(["a", "b", "a", "b", "b", "a", "padding"])
    advantages, _ = verl_hapo.token_group_advantages(rewards, mask, index)
    # b: rewards 0, 0, 0; a: 1, 1, 1; a lone row: nothing to compare with
    assert (advantages == 0).all()
    rewards[2, 3] = 0
    advantages, _ = verl_hapo.token_group_advantages(rewards, mask, index)
    # a: 1 + 2 tokens right, 4 wrong: mean 3/7, deviation sqrt(12)/7
    right, wrong = 4 / 12**0.5, -3 / 12**0.5
    assert advantages[0].tolist() == pytest.approx([right, 0, 0, 0], abs=1e-5)
    assert advantages[5].tolist() == pytest.approx([right, right, 0, 0], abs=1e-5)
    assert advantages[2].tolist() == pytest.approx([wrong] * 4, abs=1e-5)
    assert (advantages[[1, 3, 4, 6]] == 0).all()


@pytest.mark.parametrize(
    "more, message",
    [
        ("algorithm.rollout_correction.bypass_mode=True", "bypass_mode=True: it scores no old"),
        ("+bupo.layer=2 actor_rollout_ref.actor.strategy=fsdp", "strategy=fsdp: its flat"),
        ("+bupo.layer=2 algorithm.rollout_correction.rollout_is=token", "BuPO's phase 1 the old"),
        (
            "+bupo.layer=2 algorithm.use_kl_in_reward=True",
            "use_kl_in_reward=True: in BuPO's phase 1",
        ),
        ("+bupo.layer=0", "bupo.layer=0: must be auto or a layer"),
        ("+hapo.rho=2", "hapo.rho=2: must lie in"),
        ("+hapo.tau=1", "hapo.tau=1: must be at least 0, and below 1"),
        (
            "+bupo.layer=auto actor_rollout_ref.actor.ulysses_sequence_parallel_size=2",
            "auto: is not measured under Ulysses",
        ),
        ("+bupo.layer=first", "bupo.layer=first: must be auto or a layer"),
        ("+hapo.rhoo=0.5", "hapo.rhoo: no such setting; known: rho, advantage_redistribution"),
        (
            "actor_rollout_ref.rollout.agent.default_agent_loop=hapo_agent "
            "algorithm.rollout_correction.rollout_is=token",
            "divide mechanism A's temperatures out",
        ),
        (
            "actor_rollout_ref.rollout.agent.default_agent_loop=hapo_agent "
            "actor_rollout_ref.rollout.name=sglang",
            "rollout.name=sglang: mechanism A runs in vLLM",
        ),
    ],
)
def test_what_would_train_something_else_is_refused(given, more, message):
    config = verl_worker.configuration(given[0], P * G, G, *HAPO, *more.split())
    with pytest.raises(ValueError, match=message) as error:
        verl_hapo.check_configuration(config, verl_hapo.Settings.of(config))
    assert "\n" not in str(error.value)


def test_verls_own_entropies_are_announced(given, capsys):
    config = verl_worker.configuration(
        given[0], P * G, G, *HAPO, "actor_rollout_ref.model.use_remove_padding=False"
    )
    verl_hapo.check_configuration(config, verl_hapo.Settings.of(config))
    assert "h comes from verl's own entropies, log Z - E[logit]" in capsys.readouterr().out


def test_the_agent_loop_hands_the_statistics_to_vllm(given, monkeypatch):
    """The trainer's prompts carry them from the second rollout on; validation carries none."""
    seen = []

    async def run(self, sampling_params, **prompt):
        seen.append((sampling_params, prompt))

    monkeypatch.setattr(verl_hapo.SingleTurnAgentLoop, "run", run)
    ready = lambda self, *args: setattr(self, "config", OmegaConf.create(mode))
    monkeypatch.setattr(verl_hapo.SingleTurnAgentLoop, "__init__", ready)
    mode = {"trainer": {"v1": {"trainer_mode": "sync"}}}
    with pytest.raises(ValueError, match="hapo_agent needs trainer.v1.trainer_mode=hapo"):
        verl_hapo.HAPOAgentLoop()
    mode["trainer"]["v1"]["trainer_mode"] = "hapo"
    loop = verl_hapo.HAPOAgentLoop()
    statistics = '{"hapo": [-1.0, 1.0, 2.0, -3.0, 0.05, "bounded"]}'
    given_prompt = {"raw_prompt": [], verl_hapo.STATISTICS: statistics}
    asyncio.run(loop.run({"temperature": 0.9}, **given_prompt))
    asyncio.run(loop.run({"temperature": 0.0}, raw_prompt=[]))
    extra = {"hapo": [-1.0, 1.0, 2.0, -3.0, 0.05, "bounded"]}
    assert seen == [
        ({"temperature": 0.9, "extra_args": extra}, {"raw_prompt": []}),
        ({"temperature": 0.0}, {"raw_prompt": []}),
    ]


def test_prompts_carry_the_statistics_from_the_second_rollout_on(given, monkeypatch):
    """And a checkpoint holds them, with the boundary layer, for a resumed run."""
    agent = "actor_rollout_ref.rollout.agent.default_agent_loop=hapo_agent"
    trainer = OneWorker(given[0], P * G, G, *HAPO, agent, "+hapo.tau=0.2", "+bupo.layer=auto")
    base = verl_hapo.PPOTrainerSync
    monkeypatch.setattr(base, "_next_train_batch", lambda self: verl_worker.tu.get_tensordict({}))
    for name in ("_save_checkpoint", "_load_checkpoint"):
        monkeypatch.setattr(base, name, lambda self: None)
    assert verl_hapo.STATISTICS not in trainer._next_train_batch()
    trainer.stats = hapo.EntropyStats(*torch.tensor([-1.0, 1.0, 2.0, -3.0]))
    carried = json.loads(trainer._next_train_batch()[verl_hapo.STATISTICS])
    assert carried == {"hapo": [-1.0, 1.0, 2.0, -3.0, 0.2, 1.0, "bounded"]}
    trainer.config.trainer.default_local_dir, trainer.boundary = str(given[0] / "checkpoints"), 3
    trainer._save_checkpoint()
    trainer.stats, trainer.boundary = None, None
    trainer._load_checkpoint()
    assert torch.stack(trainer.stats).tolist() == [-1.0, 1.0, 2.0, -3.0]
    assert trainer.boundary == trainer.layer == 3
    trainer.settings.layer = "5"  # what a user has asked for comes before what was measured
    assert trainer.layer == 5
