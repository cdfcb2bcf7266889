"""bridges/trl_trainers.py inside TRL's own trainer: against TRL, and against our own step."""

import copy
import gc
import os
import re
import socket
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, TINY, random_model
from our_step import move, our_update

pytest.importorskip("trl")
pytest.importorskip("datasets")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOTrainer, TrlParser

import bridges
import hapo
import internals
from bridges import trl_trainers
from bridges.trl_trainers import BuPOTrainer, HAPOBuPOTrainer, HAPOConfig, HAPOTrainer
from sampling import vocabulary

pytestmark = pytest.mark.optional("trl", "datasets")
PARTS = "adaptive_temperature token_group_average advantage_redistribution adaptive_clip".split()
OFF = dict.fromkeys(PARTS, False)
PHASE_1 = dict(bupo_layer=2, bupo_steps=1)
P, G, T = 3, 4, 8
BY = 0.03  # how far the policy moves before a loss, of its weights

SETTINGS = dict(per_device_train_batch_size=P * G, num_generations=G, max_completion_length=T)
SETTINGS |= dict(steps_per_generation=1, gradient_accumulation_steps=1, num_iterations=2)
SETTINGS |= dict(use_cpu=True, bf16=False, gradient_checkpointing=False, shuffle_dataset=False)
SETTINGS |= dict(max_steps=4, learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=1e9)
SETTINGS |= dict(loss_type="dapo", epsilon_high=0.28, beta=0.0, use_bias_correction_kl=False)
SETTINGS |= dict(logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True)


class Grab(TrainerCallback):
    """The gradient of every optimiser step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **more):
        named = model.named_parameters()
        self.steps.append({n: None if p.grad is None else p.grad.clone() for n, p in named})


def reward(completions, **more):
    return [float(sum(map(ord, text)) % 2) for text in completions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model without ids that only pad: TRL gives those probabilities. Some ids have a far
    larger unembedding than others, so its entropies lie far apart and rounding hardly moves h."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = random_model(vocab=vocabulary(tokenizer))
    model.config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(6)
    with torch.no_grad():
        model.lm_head.weight.mul_(torch.exp(1.2 * torch.randn(vocabulary(tokenizer), 1)))
        model.model.layers[2].mlp.down_proj.weight.mul_(150)  # so the boundary layer is the second
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    gc.freeze()  # each run of a trainer collects garbage: of all imported modules, too
    yield folder
    gc.unfreeze()


@pytest.fixture(scope="module")
def loaded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def two_processes(request, folder, tmp_path_factory):
    """The two processes of test_two_processes, which work beside the tests before it."""
    ranks = []
    if any(item.name == "test_two_processes" for item in request.session.items):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        script = [sys.executable, ROOT / "tests" / "trl_processes.py"]
        out = tmp_path_factory.mktemp("two")
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")
        for rank in "01":
            given = env | {"RANK": rank, "LOCAL_RANK": rank}
            ranks.append(subprocess.Popen([*script, folder, out], env=given, **pipes))
    yield ranks
    for rank in ranks:
        rank.kill()
        rank.communicate()


@pytest.fixture
def made(tmp_path, loaded):
    def make(kind=HAPOTrainer, callbacks=(), peft_config=None, config=HAPOConfig, **changed):
        settings = SETTINGS | dict(output_dir=str(tmp_path / "trl")) | changed
        config = config if kind is not GRPOTrainer else trl_trainers.GRPOConfig
        data = Dataset.from_dict({"prompt": [f"What is {n} + {n}?" for n in range(3 * P)]})
        model, tokenizer = loaded
        trainer = kind(
            copy.deepcopy(model),
            reward,
            args=config(**settings),
            train_dataset=data,
            eval_dataset=data.select(range(P)),
            processing_class=tokenizer,
            callbacks=list(callbacks),
            peft_config=peft_config,
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    return make


def drawn(trainer):
    torch.manual_seed(3)
    rows = [trainer.train_dataset[p] for p in range(P) for _ in range(G)]
    return trainer._generate_and_score_completions(rows)


def inputs_of(batch):
    """(ids, attention mask, 1 at the tokens of responses) of prompts and responses."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    response = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], 1)
    return ids, seen, response


def logged_layers(trainer):
    return [row["bupo/layer"] for row in trainer.state.log_history if "bupo/layer" in row]


def moved(trainer, batch):
    """Loss and gradients of a policy that has moved."""
    move(trainer.model, BY)
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trainer.model.named_parameters()}


def same_gradients(some, others, tolerance):
    """To that share of the largest gradient, or both None."""
    largest = max(g.abs().max() for g in others.values() if g is not None)
    assert some.keys() == others.keys()
    for name, g in others.items():
        assert (some[name] is None) == (g is None), name
        assert g is None or (some[name] - g).abs().max() <= tolerance * largest, name


LAYER_2 = "--bupo-layer 2 --bupo-steps 1 "
COMPARED = {
    "whole": (HAPOTrainer, {}, "--algo hapo"),
    "without B": (HAPOTrainer, dict(token_group_average=False), "--no-token-group-average"),
    "without C": (
        *(HAPOTrainer, dict(advantage_redistribution=False), "--no-advantage-redistribution"),
    ),
    "without D": (HAPOTrainer, dict(adaptive_clip=False), "--no-adaptive-clip"),
    "released": (HAPOTrainer, dict(released=True), "--released"),
    "with KL": (HAPOTrainer, dict(beta=0.3), "--kl 0.3"),
    "BuPO": (BuPOTrainer, PHASE_1, LAYER_2 + "--algo dapo"),
    "both": (HAPOBuPOTrainer, PHASE_1, LAYER_2),
    "both, KL": (HAPOBuPOTrainer, PHASE_1 | dict(beta=0.3), LAYER_2 + "--kl 0.3"),
    "normed": (BuPOTrainer, PHASE_1 | dict(bupo_norm=True), LAYER_2 + "--algo dapo --bupo-norm"),
}


@pytest.mark.parametrize("setting", COMPARED)
def test_loss_and_gradient_are_those_of_our_step(made, folder, tmp_path, setting):
    """To 1e-5, with ratios far from 1. TRL adds 1e-4 to a deviation where we add 1e-6: of GRPO's
    advantages a factor of some 1e-4, which B takes out again."""
    kind, changed, more = COMPARED[setting]
    trainer = made(kind, **changed)
    batch = drawn(trainer)
    cut = lambda part: [
        ids[m.bool()].tolist() for ids, m in zip(batch[part + "_ids"], batch[part + "_mask"])
    ]
    prompts, answers = cut("prompt")[::G], cut("completion")
    texts = trainer.processing_class.batch_decode(answers, skip_special_tokens=True)
    rewards = torch.tensor(reward(texts))
    if not trainer.args.token_group_average or kind is BuPOTrainer:
        deviation = rewards.view(P, G).std(1, keepdim=True)
        shares = batch["advantages"].view(P, G)
        batch["advantages"] = (shares * (deviation + 1e-4) / (deviation + 1e-6)).flatten()
    loss, gradients = moved(trainer, batch)
    given = (prompts, answers, texts, rewards, *more.split())
    own, ours, step, farthest, _ = our_update(folder, tmp_path / "ours", *given, by=BY)
    if "h" in batch:
        assert torch.allclose(batch["h"][:, : step.h.shape[1]], step.h, atol=1e-4)
    assert farthest > 0.3  # clipping and C have something to do
    assert loss == pytest.approx(own, rel=1e-5, abs=1e-6)
    same_gradients(gradients, ours, 1e-5)


def test_the_neutral_zone_is_of_the_base_bounds_and_in_the_release_of_d_s(made, monkeypatch):
    zones, rule = [], hapo.redistribute_advantages
    spy = lambda A, h, ratio, *zone: (zones.append((h, *zone)), rule(A, h, ratio, *zone))[1]
    monkeypatch.setattr(trl_trainers.hapo, "redistribute_advantages", spy)
    for released in (False, True):
        trainer = made(released=released)
        moved(trainer, drawn(trainer))
    (_, *base), (h, low, high, flag) = zones
    assert base == [0.2, 0.28, False] and flag and (high > 0.3).any()
    assert all(map(torch.equal, (low, high), hapo.adaptive_clip(h, 0.2, 0.28)))


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
def test_all_off_is_trl_bit_for_bit(made, loss_type):
    """Responses, loss, gradients and metrics."""
    runs = []
    for kind in (GRPOTrainer, HAPOTrainer):
        trainer = made(kind, loss_type=loss_type, **(OFF if kind is HAPOTrainer else {}))
        batch = drawn(trainer)
        loss, gradients = moved(trainer, batch)
        ours = ("hapo/", "profiling/")
        metrics = {k: v for k, v in trainer._metrics["train"].items() if not k.startswith(ours)}
        tensors = [batch["completion_ids"], batch["advantages"], *gradients.values()]
        runs.append((tensors, (loss, metrics, gradients.keys())))
    (theirs, other), (own, same) = runs
    assert all(map(torch.equal, theirs, own)) and other == same


def test_accumulated_passes_are_one(made):
    steps = []
    for number in (1, 4):
        grab = Grab()
        size = dict(per_device_train_batch_size=P * G // number, steps_per_generation=number)
        made(callbacks=[grab], gradient_accumulation_steps=number, max_steps=2, **size).train()
        steps.append(grab.steps)
    for one, same in zip(*steps):
        same_gradients(same, one, 1e-5)


def test_checkpointed_layers_are_the_same(made):
    ends = []
    for checkpointed in (False, True):
        how = dict(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        how |= dict(gradient_checkpointing=checkpointed)
        trainer = made(HAPOBuPOTrainer, **PHASE_1, **how)
        ends.append(moved(trainer, drawn(trainer))[1])
    same_gradients(*ends, 1e-6)


# -------------------------------------------------------------------------------------------- BuPO


def test_phase_1_reaches_the_lower_layers_alone_and_a_resumed_run_goes_on(made):
    """Weights after a resume in phase 1 are those of a run in one go: statistics and boundary layer
    are back for the first rollout."""
    how = dict(save_strategy="steps", save_steps=2, tau=0.9, max_steps=6)
    how |= dict(bupo_layer="auto", bupo_steps=2, learning_rate=1e-3, callbacks=[grab := Grab()])
    whole = made(HAPOBuPOTrainer, **how)
    whole.train()
    layer, named = whole._kept.layer, dict(whole.model.named_parameters())
    assert layer == 2
    above = {n for n in named if re.search(r"layers\.2|^model.norm", n)}
    without = [{n for n, g in step.items() if g is None} for step in grab.steps]
    assert without == [above] * 4 + [set()] * 2  # two rollouts of two steps, then phase 2
    assert logged_layers(whole)[0] == layer and logged_layers(whole)[-1] == 0
    again = made(HAPOBuPOTrainer, **how)
    again.train(resume_from_checkpoint=whole.args.output_dir + "/checkpoint-2")
    assert again._kept.layer == layer
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))


def test_auto_measures_the_boundary_layer_on_the_first_answers(made, folder, monkeypatch):
    asked, measure = [], trl_trainers.bupo.measure_boundary
    spy = lambda model, *given: (asked.append(given), measure(model, *given))[1]
    monkeypatch.setattr(trl_trainers.bupo, "measure_boundary", spy)
    trainer = made(HAPOBuPOTrainer, bupo_layer="auto", bupo_steps=1)
    before = AutoModelForCausalLM.from_pretrained(folder)
    inputs = inputs_of(drawn(trainer))
    entropy = internals.internal_entropy(before, *inputs, trainer._tokens())
    expected, _ = trl_trainers.bupo.boundary_or_fallback(entropy.feed_forward_change)
    assert trainer._layer == trainer._kept.layer == expected
    assert trainer._metrics["train"]["bupo/layer"] == [expected]
    ((*masks, size, processes),) = asked
    assert all(map(torch.equal, masks, inputs))
    assert size == trainer._tokens() and processes.all_reduce_sum(2.0, 3.0) == [2.0, 3.0]


def test_auto_where_trl_scores_nothing(made, capsys):
    """One step a rollout: TRL makes no pass of its own before the update's, and mechanisms that do
    nothing then are named."""
    for kind in (BuPOTrainer, HAPOBuPOTrainer):
        trainer = made(kind, bupo_layer="auto", bupo_steps=1, num_iterations=1, max_steps=2)
        trainer.train()
        assert logged_layers(trainer) == [trainer._kept.layer, 0] and 1 <= trainer._kept.layer <= 3
        assert capsys.readouterr().out.count("every ratio is 1") == 1


def test_several_rollouts_a_step_are_counted(made):
    """Two passes an optimiser step, a rollout each: phase 1 of one rollout ends within a step."""
    how = dict(gradient_accumulation_steps=2, num_iterations=1, max_steps=2)
    trainer = made(BuPOTrainer, bupo_layer=2, bupo_steps=1, **how)
    seen, score = [], trainer._generate_and_score_completions
    spy = lambda inputs: (score(inputs), seen.append(trainer._layer))[0]
    trainer._generate_and_score_completions = spy
    trainer.train()
    assert seen[:3] == [2, None, None]


def adapters(peft):
    return peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.mark.optional("peft")
def test_h_is_not_the_reference_s(made):
    """LoRA with KL and one step a rollout: TRL scores the same model with its adapters off."""
    peft = pytest.importorskip("peft")
    h = []
    for beta in (0.0, 0.1):
        trainer = made(peft_config=adapters(peft), beta=beta, num_iterations=1)
        noise = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, p in trainer.model.named_parameters():
                if "lora_B" in name:
                    p += 0.1 * torch.randn(p.shape, generator=noise)
                elif "lora_A" in name:
                    p.copy_(torch.randn(p.shape, generator=noise))
        h.append(drawn(trainer)["h"])
    assert torch.equal(*h)


def test_nothing_stays_behind_in_the_model(made, capsys):
    trainer = made(HAPOBuPOTrainer, **PHASE_1, beta=0.1)
    trainer._kept.stats = [-1.0, 1.0, 1.5, -6.0]
    trainer._compute_loss(trainer.model, drawn(trainer))
    assert "_get_logits_processor" not in vars(trainer.model)
    assert len(trainer.model.model.layers) == 3
    assert not trainer.model.model._forward_hooks
    assert (trainer.epsilon_low, trainer.epsilon_high, trainer.beta) == (0.2, 0.28, 0.1)
    assert "every ratio" not in capsys.readouterr().out


@pytest.mark.optional("peft")
def test_adapters_learn_and_the_model_stays(made, folder):
    """In phase 1 only adapters of layers 1 ... l have gradients; what the adapted model scores is
    what the merged one does."""
    peft = pytest.importorskip("peft")
    how = dict(callbacks=[grab := Grab()], peft_config=adapters(peft), max_steps=2)
    trainer = made(HAPOBuPOTrainer, **how, **PHASE_1)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    for name, p in trainer.model.named_parameters():
        changes = "lora_B" in name and re.search(r"layers\.[01]\.", name)
        assert torch.equal(p, before[name]) != bool(changes) or "lora_A" in name, name
    learned = {n for n, g in grab.steps[0].items() if g is not None}
    assert learned and all(re.search(r"layers\.[01]\..*lora", n) for n in learned)
    batch = drawn(trainer)
    (ids, seen, _), answers = inputs_of(batch), batch["completion_ids"]
    trainer._layer, size = 2, answers.shape[1]
    adapted = trainer._get_per_token_logps_and_entropies(trainer.model, ids, seen, size)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    merged.load_state_dict(copy.deepcopy(trainer.model).merge_and_unload().state_dict())
    states = internals.layer_hidden(merged, ids, seen, 2)[:, -size - 1 :]
    logp = internals.layer_logits(merged, states[:, :-1]).log_softmax(-1)
    expected = logp.gather(-1, answers[..., None]).squeeze(-1)
    mask = batch["completion_mask"].bool()
    torch.testing.assert_close(adapted[0][mask], expected[mask], atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------- statistics, evaluation


def test_statistics_are_of_the_tokenizer_s_ids_and_logged(made, monkeypatch):
    """A padded vocabulary: the last 20 ids have no token."""
    monkeypatch.setattr(trl_trainers, "vocabulary", lambda tokenizer: len(tokenizer) - 20)
    trainer = made()
    batch = drawn(trainer)
    ids, seen, _ = inputs_of(batch)
    with torch.no_grad():
        states = internals.policy_hidden(trainer.model, ids, seen)
        logits = states @ internals.unembedding(trainer.model)[: trainer._tokens()].T
    assert trainer._tokens() < len(internals.unembedding(trainer.model))
    logp = logits[:, -batch["completion_ids"].shape[1] - 1 : -1].double().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    stats = hapo.entropy_stats(entropy.float(), batch["completion_mask"])
    assert trainer._kept.stats == pytest.approx([float(x) for x in stats], rel=1e-4)
    logged = trainer._metrics["train"]
    assert logged["hapo/pivot"] == pytest.approx([float(stats.pivot)], rel=1e-4)
    assert {"hapo/sigma", "hapo/h_max", "hapo/h_min", "hapo/h"} <= logged.keys()


def test_a_heats_by_the_rollout_before(made, monkeypatch):
    """The first rollout is drawn at T_base; the second at Eq. 8 with the first one's statistics,
    which changes its responses."""
    seen, rule, rollouts = [], hapo.adaptive_temperature, []
    spy = lambda entropy, stats, **how: (seen.append((stats, how)), rule(entropy, stats, **how))[1]
    monkeypatch.setattr(trl_trainers.hapo, "adaptive_temperature", spy)
    for heated in (False, True):
        trainer = made(tau=0.9, adaptive_temperature=heated)
        first = drawn(trainer)["completion_ids"]
        assert not seen
        stats = trainer._kept.stats
        rollouts.append((first, drawn(trainer)["completion_ids"]))
    assert 1 <= len(seen) <= T  # once a step of the second rollout
    assert all(torch.stack(s).tolist() == stats and how["tau"] == 0.9 for s, how in seen)
    (one, same), (first, heated) = rollouts
    assert torch.equal(one, first) and torch.equal(one, same) and not torch.equal(one, heated)


def test_vllm_s_requests_carry_the_statistics(made, monkeypatch):
    """Of the last rollout, in training alone; what a user has set for vLLM stays."""
    trainer = made(tau=0.3, temperature=0.9)
    trainer.args.use_vllm, own = True, {"seed": 3, "extra_args": {"other": 1}}
    trainer.vllm_generation = types.SimpleNamespace(generation_kwargs=own)
    stand_in = types.SimpleNamespace(
        request_arguments=lambda stats, *more: {"hapo": [*map(float, stats), *more]}
    )
    monkeypatch.setitem(sys.modules, "bridges.vllm_temperature", stand_in)
    monkeypatch.setattr(bridges, "vllm_temperature", stand_in, raising=False)
    with trainer._heated():
        assert trainer.vllm_generation.generation_kwargs is own
    trainer._kept.stats = [-1.0, 2.0, 0.5, -3.0]
    for mode, released, name, kept, form in (
        ("colocate", False, "extra_args", {"other": 1}, "bounded"),
        ("server", True, "vllm_xargs", {}, "released"),
    ):
        trainer.args.vllm_mode, trainer.args.released = mode, released
        with trainer._heated():
            given = trainer.vllm_generation.generation_kwargs
            assert given == own | {name: kept | {"hapo": [-1.0, 2.0, 0.5, -3.0, 0.3, form, 0.9]}}
        assert trainer.vllm_generation.generation_kwargs is own
    assert HAPOConfig("x", use_cpu=True, bf16=False).vllm_importance_sampling_correction is False


def test_a_sleeping_vllm_is_checked_at_its_first_request(made, monkeypatch):
    """TRL's engine has no weights before; a note names the dtype at once."""
    trainer, done = made(), []
    stand_in = types.SimpleNamespace(check_engine=lambda llm: done.append("checked"))
    monkeypatch.setitem(sys.modules, "bridges.vllm_temperature", stand_in)
    monkeypatch.setattr(bridges, "vllm_temperature", stand_in, raising=False)
    config = types.SimpleNamespace(model_config=types.SimpleNamespace(dtype=torch.float32))
    llm = types.SimpleNamespace(
        llm_engine=types.SimpleNamespace(vllm_config=config),
        generate=lambda *args, **kwargs: done.append(args),
    )
    trainer.vllm_generation = types.SimpleNamespace(llm=llm)
    trainer.args.vllm_enable_sleep_mode = True
    trainer._check_vllm()
    assert done == []
    llm.generate(1)
    llm.generate(2)
    assert done == ["checked", (1,), (2,)]


def test_evaluation_is_trl_s(made):
    """Held-out responses are drawn at T_base and scored by the whole policy, in phase 1, too."""
    found = []
    for kind, how in ((GRPOTrainer, {}), (HAPOBuPOTrainer, PHASE_1)):
        trainer = made(kind, **how)
        if kind is HAPOBuPOTrainer:
            trainer._kept.stats, trainer._layer = [-1.0, 1.0, 1.5, -6.0], 2
        trainer.model.eval()
        batch = drawn(trainer)
        with torch.no_grad():
            loss = trainer._compute_loss(trainer.model, batch)
        found.append((batch, loss, trainer._metrics["eval"]))
    (theirs, loss, metrics), (own, same, seen) = found
    assert theirs.keys() == own.keys() and loss == same and metrics == seen
    assert metrics["entropy"]
    assert torch.equal(theirs["completion_ids"], own["completion_ids"])


REFUSED = [
    (dict(importance_sampling_level="sequence"), "importance_sampling_level sequence: only"),
    (dict(loss_type="cispo"), "loss_type cispo: only"),
    (dict(bupo_layer="first"), "bupo_layer first: must be auto or a layer"),
    (dict(bupo_layer=4), "bupo_layer 4: this model has the layers 1 to 3"),
    (dict(rho=1.5), "rho 1.5: must lie in"),
    (dict(tau=1.0), "tau 1.0: must be at least 0, and below 1"),
    (dict(temperature_form="hot"), "temperature_form hot: must be bounded or zscore"),
    (dict(released=True, temperature_form="zscore"), "zscore: the released code has only"),
    (dict(bupo_layer=None), "HAPOBuPOTrainer takes a bupo_layer"),
    (dict(kind=HAPOTrainer, bupo_layer=2), "HAPOTrainer takes no bupo_layer"),
    (dict(config=trl_trainers.GRPOConfig), "args must be a HAPOConfig"),
]


@pytest.mark.parametrize("changed, message", REFUSED)
def test_what_it_cannot_do_is_refused(made, changed, message):
    with pytest.raises(ValueError, match=message):
        made(**(dict(kind=HAPOBuPOTrainer) | changed))


def test_settings_can_be_parsed(tmp_path):
    given = ["--output_dir", str(tmp_path), "--tau", "0.2", "--bupo_layer", "3", "--use_cpu"]
    (config,) = TrlParser(HAPOConfig).parse_args_and_config([*given, "--adaptive_clip", "False"])
    assert (config.tau, config.bupo_layer, config.adaptive_clip) == (0.2, "3", False)
    assert config.rho == 0.8 and config.epsilon_high == 0.28


def test_a_model_that_scales_its_logits_is_refused_as_in_train(made, monkeypatch):
    def scaled(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits / 8
        return out

    forward = Qwen3ForCausalLM.forward
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", scaled)
    with pytest.raises(ValueError, match="HAPOTrainer: its logits are more than hidden states"):
        made()


@pytest.mark.programs
def test_two_processes(two_processes):
    """A group straddles them; statistics, boundary layer and weights are the same on both."""
    said = [rank.communicate(timeout=300)[0] for rank in two_processes]
    assert [rank.returncode for rank in two_processes] == [0, 0], said[0][-4000:] + said[1][-4000:]
    assert re.search(r"checked: layer (\d), phases \[\1(\.0)?, ", said[0]), said[0]
