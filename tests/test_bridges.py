"""bridges/trl_trainers.py inside TRL's own trainer: against TRL, and against our own step."""

import copy
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, given_batch

pytest.importorskip("trl")
pytest.importorskip("datasets")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOTrainer, TrlParser

import hapo
import internals
import train
from bridges import trl_trainers
from bridges.trl_trainers import BuPOTrainer, HAPOBuPOTrainer, HAPOConfig, HAPOTrainer
from common.errors import UserError
from common.models import load_model, vocabulary
from engine.engine import SingleProcess
from run import option_checks
from run.batch import Batch, rollout_of
from run.setup import open_run

PARTS = "adaptive_temperature token_group_average advantage_redistribution adaptive_clip".split()
OFF = dict.fromkeys(PARTS, False)
PHASE_1 = dict(bupo_layer=2, bupo_steps=1)
P, G, T = 3, 4, 8
TINY = ROOT / "assets" / "tiny-qwen3"


class Grab(TrainerCallback):
    """The gradient of every optimiser step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **more):
        named = model.named_parameters()
        self.steps.append({n: None if p.grad is None else p.grad.clone() for n, p in named})


def reward(completions, **more):
    return [float(sum(map(ord, text)) % 2) for text in completions]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The shipped model, whose entropies lie far apart, without the ids that only pad: TRL gives
    those probabilities."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = load_model(TINY)
    model.resize_token_embeddings(vocabulary(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def made(tmp_path, folder):
    def make(kind=HAPOTrainer, callbacks=(), peft_config=None, config=HAPOConfig, **changed):
        settings = dict(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=P * G,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            num_generations=G,
            num_iterations=2,
            max_completion_length=T,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            beta=0.0,
            use_bias_correction_kl=False,
            gradient_checkpointing=False,
            max_steps=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            loss_type="dapo",
            max_grad_norm=1e9,
            shuffle_dataset=False,
            logging_steps=1,
            epsilon_high=0.28,
        )
        config = config if kind is not GRPOTrainer else trl_trainers.GRPOConfig
        data = Dataset.from_dict({"prompt": [f"What is {n} + {n}?" for n in range(3 * P)]})
        trainer = kind(
            str(folder),
            reward,
            args=config(**settings | changed),
            train_dataset=data,
            eval_dataset=data.select(range(P)),
            processing_class=AutoTokenizer.from_pretrained(folder),
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


def move(model):
    """The policy is no longer the one that was scored; the same noise each time."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * p.abs().mean() * torch.randn(p.shape, generator=noise)


def moved(trainer, batch):
    """Loss and gradients of a policy that has moved."""
    move(trainer.model)
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trainer.model.named_parameters()}


def our_step(trainer, batch, folder, tmp_path, *more):
    """The same of this project's own step, on TRL's answers and rewards, and the largest distance
    of a ratio from 1."""
    files = f"--model {folder} --out {tmp_path / 'ours'} --overwrite --device cpu"
    sizes = f"--prompts-per-step {P} --num-generations {G} --max-new-tokens {T}"
    given = f"{files} {sizes} --updates-per-rollout 1".split()
    o = option_checks.parse([*given, *more], "")
    run, _ = open_run(o, SingleProcess("cpu"))
    prompts = [ids[m.bool()].tolist() for ids, m in zip(batch["prompt_ids"], batch["prompt_mask"])]
    masks = batch["completion_mask"].bool()
    answers = [ids[m].tolist() for ids, m in zip(batch["completion_ids"], masks)]
    rollout = rollout_of(prompts[::G], answers)
    texts = trainer.processing_class.batch_decode(answers, skip_special_tokens=True)
    rewards, mask = torch.tensor(reward(texts)), rollout.mask
    varied = train.losses.has_reward_variance(rewards, G)
    own = Batch(
        problems=[None] * P,
        texts=texts,
        rollout=rollout,
        strict=varied,
        lenient=varied,
        correct=varied,
        rewards=rewards,
        has_reward_variance=varied,
        in_loss=torch.ones_like(varied),
        loss_mask=mask,
    )
    rows = [slice(0, P * G)]
    with torch.no_grad():  # phase 1 of ours takes the entropies that its sampler has recorded
        rollout.entropy = run.engine.batch_logprobs(run.policy, rollout, rows, None).entropy
    scored, kept = run.engine.token_logprobs, {}

    def score_after_a_move(*args, **how):
        if torch.is_grad_enabled():
            move(run.policy)
        return scored(*args, **how)

    def keep_gradients(loss):
        kept.update({n: p.grad for n, p in run.policy.named_parameters()})
        return "applied", 0.0

    run.engine.token_logprobs, run.engine.optimizer_step = score_after_a_move, keep_gradients
    with pytest.MonkeyPatch.context() as patch:
        given_batch(patch, own)
        step = train.train_step(1, run)
    if o.algo == "hapo":
        assert torch.allclose(batch["h"][:, : mask.shape[1]], own.h, atol=1e-4)
    (update,) = step.updates
    (result,) = update.micro_batches
    return update.loss, kept, ((result.loss.ratio - 1).abs() * mask).max().item()


SETTINGS = {
    "whole": (HAPOTrainer, {}, ["--algo", "hapo"]),
    "without B": (HAPOTrainer, dict(token_group_average=False), ["--no-token-group-average"]),
    "without C": (
        HAPOTrainer, dict(advantage_redistribution=False), ["--no-advantage-redistribution"]
    ),
    "without D": (HAPOTrainer, dict(adaptive_clip=False), ["--no-adaptive-clip"]),
    "with KL": (HAPOTrainer, dict(beta=0.3), ["--kl", "0.3"]),
    "BuPO": (BuPOTrainer, PHASE_1, ["--algo", "dapo", "--bupo-layer", "2", "--bupo-steps", "1"]),
    "both": (HAPOBuPOTrainer, PHASE_1, ["--bupo-layer", "2", "--bupo-steps", "1"]),
    "both, KL": (
        HAPOBuPOTrainer, PHASE_1 | dict(beta=0.3),
        ["--bupo-layer", "2", "--bupo-steps", "1", "--kl", "0.3"],
    ),
    "normed": (
        BuPOTrainer, PHASE_1 | dict(bupo_norm=True),
        ["--algo", "dapo", "--bupo-layer", "2", "--bupo-steps", "1", "--bupo-norm"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_loss_and_gradient_are_those_of_our_step(made, folder, tmp_path, setting):
    """To 1e-5, with ratios far from 1. TRL adds 1e-4 to a deviation where we add 1e-6: of GRPO's
    advantages a factor of some 1e-4, which B takes out again."""
    kind, changed, more = SETTINGS[setting]
    trainer = made(kind, **changed, num_iterations=2)
    batch = drawn(trainer)
    if not trainer.args.token_group_average or kind is BuPOTrainer:
        shares = batch["advantages"].view(P, G)
        deviation = torch.tensor(
            reward(trainer.processing_class.batch_decode(
                [i[m.bool()] for i, m in zip(batch["completion_ids"], batch["completion_mask"])],
                skip_special_tokens=True,
            ))
        ).view(P, G).std(1, keepdim=True)  # fmt: skip
        batch["advantages"] = (shares * (deviation + 1e-4) / (deviation + 1e-6)).flatten()
    loss, gradients = moved(trainer, batch)
    own, ours, farthest = our_step(trainer, batch, folder, tmp_path, *more)
    assert farthest > 0.3  # clipping and C have something to do
    assert loss == pytest.approx(own, rel=1e-5, abs=1e-6)
    largest = max(g.abs().max() for g in ours.values() if g is not None)
    assert gradients.keys() == ours.keys()
    for name, g in ours.items():
        assert (gradients[name] is None) == (g is None), name
        assert g is None or (gradients[name] - g).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
def test_all_off_is_trl_bit_for_bit(made, loss_type):
    """Answers, loss, gradients and metrics."""
    runs = []
    for kind in (GRPOTrainer, HAPOTrainer):
        trainer = made(kind, loss_type=loss_type, **(OFF if kind is HAPOTrainer else {}))
        batch = drawn(trainer)
        loss, gradients = moved(trainer, batch)
        ours = ("hapo/", "profiling/")
        metrics = {k: v for k, v in trainer._metrics["train"].items() if not k.startswith(ours)}
        runs.append((batch["completion_ids"], batch["advantages"], loss, gradients, metrics))
    for theirs, own in zip(*[r[:2] for r in runs]):
        assert torch.equal(theirs, own)
    assert runs[0][2] == runs[1][2] and runs[0][4] == runs[1][4]
    assert all(torch.equal(runs[0][3][n], runs[1][3][n]) for n in runs[0][3])


@pytest.mark.parametrize("part", PARTS[:3])  # D clips where a ratio has gone far: above
def test_every_part_changes_the_run(made, part):
    ends = []
    for changed in ({}, {part: False}):
        trainer = made(tau=0.9, num_iterations=4, max_steps=8, **changed)
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert not torch.equal(*ends)


@pytest.mark.parametrize("passes", [2, 4])
def test_accumulated_passes_are_one(made, passes):
    steps = []
    for number in (1, passes):
        grab = Grab()
        size = dict(per_device_train_batch_size=P * G // number, steps_per_generation=number)
        made(callbacks=[grab], gradient_accumulation_steps=number, max_steps=2, **size).train()
        steps.append(grab.steps)
    for one, several in zip(*steps):
        largest = max(g.abs().max() for g in one.values())
        assert all((one[n] - several[n]).abs().max() <= 1e-4 * largest for n in one)


def test_checkpointed_layers_are_the_same(made):
    ends = []
    for checkpointed in (False, True):
        how = dict(use_reentrant=False)
        trainer = made(
            HAPOBuPOTrainer,
            **PHASE_1,
            gradient_checkpointing=checkpointed,
            gradient_checkpointing_kwargs=how,
        )
        loss, gradients = moved(trainer, drawn(trainer))
        ends.append(gradients)
    for name, g in ends[0].items():
        assert (g is None) == (ends[1][name] is None)
        assert g is None or torch.allclose(g, ends[1][name], atol=1e-6 * max(1, g.abs().max()))


# -------------------------------------------------------------------------------------------- BuPO


def test_phase_1_reaches_the_lower_layers_alone(made):
    grab = Grab()
    trainer = made(BuPOTrainer, callbacks=[grab], bupo_layer=2, bupo_steps=2, max_steps=6)
    trainer.train()
    without = [{n for n, g in step.items() if g is None} for step in grab.steps]
    named = dict(trainer.model.named_parameters())
    above = {n for n in named if re.search(r"layers\.[2-5]|^model.norm", n)}
    assert without == [above] * 4 + [set()] * 2  # two rollouts of two steps
    layers = [row["bupo/layer"] for row in trainer.state.log_history if "bupo/layer" in row]
    assert layers[0] == 2 and layers[-1] == 0


def test_auto_measures_the_boundary_layer_on_the_first_answers(made, folder, monkeypatch):
    asked, measure = [], trl_trainers.bupo.measure_boundary
    spy = lambda model, *given: (asked.append(given), measure(model, *given))[1]
    monkeypatch.setattr(trl_trainers.bupo, "measure_boundary", spy)
    trainer = made(HAPOBuPOTrainer, bupo_layer="auto", bupo_steps=1)
    before = AutoModelForCausalLM.from_pretrained(folder)
    batch = drawn(trainer)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    response = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], 1)
    entropy = internals.internal_entropy(before, ids, seen, response, trainer._tokens())
    expected, _ = trl_trainers.bupo.boundary_or_fallback(entropy.feed_forward_change)
    assert trainer._layer == trainer._kept.layer == expected
    assert trainer._metrics["train"]["bupo/layer"] == [expected]
    ((*masks, size, processes),) = asked
    assert all(map(torch.equal, masks, (ids, seen, response)))
    assert size == trainer._tokens() and processes.all_reduce_sum(2.0, 3.0) == [2.0, 3.0]


def test_auto_where_trl_scores_nothing(made):
    """One step a rollout: TRL makes no pass of its own before the update's."""
    for kind in (BuPOTrainer, HAPOBuPOTrainer):
        trainer = made(kind, bupo_layer="auto", bupo_steps=1, num_iterations=1, max_steps=2)
        trainer.train()
        layers = [row["bupo/layer"] for row in trainer.state.log_history if "bupo/layer" in row]
        assert layers == [trainer._kept.layer, 0] and 1 <= layers[0] <= 6


def test_several_rollouts_a_step_are_counted(made):
    """Two passes an optimiser step, a rollout each: phase 1 of one rollout ends within a step."""
    size = dict(per_device_train_batch_size=P * G, steps_per_generation=1)
    how = dict(gradient_accumulation_steps=2, num_iterations=1, max_steps=2, **size)
    trainer = made(BuPOTrainer, bupo_layer=2, bupo_steps=1, **how)
    seen, score = [], trainer._generate_and_score_completions
    spy = lambda inputs: (score(inputs), seen.append(trainer._layer))[0]
    trainer._generate_and_score_completions = spy
    trainer.train()
    assert seen[:3] == [2, None, None]


def test_h_is_not_the_reference_s(made):
    """LoRA with KL and one step a rollout: TRL scores the same model with its adapters off."""
    peft = pytest.importorskip("peft")
    h = []
    for beta in (0.0, 0.1):
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = made(peft_config=config, beta=beta, num_iterations=1)
        noise = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, p in trainer.model.named_parameters():
                if "lora_B" in name:
                    p += 0.1 * torch.randn(p.shape, generator=noise)
                elif "lora_A" in name:
                    p.copy_(torch.randn(p.shape, generator=noise))
        h.append(drawn(trainer)["h"])
    assert torch.equal(*h)


def test_nothing_stays_behind_in_the_model(made):
    trainer = made(HAPOBuPOTrainer, **PHASE_1, beta=0.1)
    trainer._kept.stats = [-1.0, 1.0, 1.5, -6.0]
    trainer._compute_loss(trainer.model, drawn(trainer))
    assert "_get_logits_processor" not in vars(trainer.model)
    assert len(trainer.model.model.layers) == 6
    assert not trainer.model.model._forward_hooks
    assert (trainer.epsilon_low, trainer.epsilon_high, trainer.beta) == (0.2, 0.28, 0.1)


def test_adapters_learn_and_the_model_stays(made, folder):
    """In phase 1 only adapters of layers 1 ... l have gradients; what the adapted model scores is
    what the merged one does."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    grab = Grab()
    trainer = made(HAPOBuPOTrainer, callbacks=[grab], peft_config=config, max_steps=2, **PHASE_1)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    for name, p in trainer.model.named_parameters():
        changes = "lora_B" in name and re.search(r"layers\.[01]\.", name)
        assert torch.equal(p, before[name]) != bool(changes) or "lora_A" in name, name
    learned = {n for n, g in grab.steps[0].items() if g is not None}
    assert learned and all(re.search(r"layers\.[01]\..*lora", n) for n in learned)
    batch = drawn(trainer)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    trainer._layer = 2
    size = batch["completion_ids"].shape[1]
    adapted = trainer._get_per_token_logps_and_entropies(trainer.model, ids, seen, size)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    merged.load_state_dict(copy.deepcopy(trainer.model).merge_and_unload().state_dict())
    states = internals.layer_hidden(merged, ids, seen, 2)[:, -size - 1 :]
    logp = internals.layer_logits(merged, states[:, :-1]).log_softmax(-1)
    expected = logp.gather(-1, batch["completion_ids"][..., None]).squeeze(-1)
    mask = batch["completion_mask"].bool()
    torch.testing.assert_close(adapted[0][mask], expected[mask], atol=1e-4, rtol=1e-4)


def test_two_processes(folder, tmp_path):
    """A group straddles them; statistics, boundary layer and weights are the same on both."""
    script = ROOT / "tests" / "trl_processes.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), str(folder), str(tmp_path)],
        env=env, capture_output=True, text=True, encoding="utf-8", timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert re.search(r"checked: layer (\d), phases \[\1(\.0)?, ", done.stdout), done.stdout


# ------------------------------------------------------------------- statistics, resume, evaluation


def test_statistics_are_of_the_tokenizer_s_ids_and_logged(made, monkeypatch):
    """A padded vocabulary: the last 20 ids have no token."""
    monkeypatch.setattr(trl_trainers, "vocabulary", lambda tokenizer: len(tokenizer) - 20)
    trainer = made()
    batch = drawn(trainer)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
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
    """The first rollout is drawn at T_base; the second at Eq. 8 with the first one's statistics."""
    seen, rule = [], hapo.adaptive_temperature
    spy = lambda entropy, stats, **how: (seen.append((stats, how)), rule(entropy, stats, **how))[1]
    monkeypatch.setattr(trl_trainers.hapo, "adaptive_temperature", spy)
    trainer = made(tau=0.3)
    drawn(trainer)
    assert not seen
    stats = trainer._kept.stats
    drawn(trainer)
    assert 1 <= len(seen) <= T  # once a step of the second rollout
    assert all(torch.stack(s).tolist() == stats and how["tau"] == 0.3 for s, how in seen)


def test_a_resumed_run_goes_on(made):
    """Weights after a resume in phase 1 are those of a run in one go: statistics and boundary layer
    are back for the first rollout."""
    how = dict(save_strategy="steps", save_steps=2, tau=0.9, num_iterations=2)
    how |= dict(bupo_layer="auto", bupo_steps=2)
    whole = made(HAPOBuPOTrainer, **how)
    whole.train()
    again = made(HAPOBuPOTrainer, **how)
    again.train(resume_from_checkpoint=whole.args.output_dir + "/checkpoint-2")
    assert again._kept.layer == whole._kept.layer is not None
    for p, q in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(p, q)


def test_evaluation_is_trl_s(made):
    """Held-out answers are drawn at T_base and scored by the whole policy, in phase 1, too."""
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


def test_idle_mechanisms_are_named(made, capsys):
    made(num_iterations=1)
    assert capsys.readouterr().out.count("every ratio is 1") == 1
    made(num_iterations=2)
    assert "every ratio" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(importance_sampling_level="sequence"), "importance_sampling_level sequence: only"),
        (dict(loss_type="cispo"), "loss_type cispo: only"),
        (dict(bupo_layer="first"), "bupo_layer first: must be auto or a layer"),
        (dict(bupo_layer=7), "bupo_layer 7: this model has the layers 1 to 6"),
        (
            dict(use_vllm=True, **PHASE_1),
            "adaptive_temperature True: vLLM has one",
        ),
        (dict(bupo_layer=None), "HAPOBuPOTrainer takes a bupo_layer"),
        (dict(kind=HAPOTrainer, bupo_layer=2), "HAPOTrainer takes no bupo_layer"),
        (dict(config=trl_trainers.GRPOConfig), "args must be a HAPOConfig"),
    ],
)
def test_what_it_cannot_do_is_refused(made, changed, message):
    with pytest.raises(UserError, match=message):
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

    made()
    forward = Qwen3ForCausalLM.forward
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", scaled)
    with pytest.raises(
        UserError, match="HAPOTrainer: its logits are more than hidden states times"
    ):
        made()
