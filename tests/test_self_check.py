"""The self-check: what agrees passes, and each way to disagree is refused in one line."""

import types

import pytest
import torch
import transformers
from conftest import TINY, random_model
from transformers import AutoTokenizer

from common.errors import UserError
from common.models import check_logits, load_model, vocab_size_of
from engine import decoding, self_check
from problems.prompts import context_of, fit_context
from run import setup
from tasks import Problem

SIZES = dict(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


@pytest.fixture
def saved(tmp_path):
    """saved(Name, **sizes): the folder of a small random model of a class, with a tokenizer."""

    def save(name, change=lambda model: None, **more):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SIZES | more)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.mul_(4)
        change(model)
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def opened_on(opened):
    """opened_on(folder, *options): a run on a model, opened with its self-check."""
    return lambda folder, *more: opened("--model", str(folder), "--self-check", *more)


@pytest.fixture
def hooked(monkeypatch):
    """hooked(change): the first layer of a model that is opened gives change(output, module)."""

    def use(change):
        hook = lambda module, args, out: change(out, module)
        install = lambda policy, *more: policy.model.layers[0].register_forward_hook(hook)
        monkeypatch.setattr(setup, "check_blocks", install)

    return use


@pytest.mark.parametrize("more", ["", "--plain", "--temperature 0.7", "--dtype bfloat16"])
def test_a_model_that_agrees_passes(opened_on, more):
    opened_on(TINY, *more.split())


NOISY = {
    "Starcoder2": {"residual_dropout": 0.3, "embedding_dropout": 0.3},
    "SeedOss": {"residual_dropout": 0.3, "attention_dropout": 0.2},
    "Mixtral": {"router_jitter_noise": 0.3, "num_local_experts": 4},
}


@pytest.mark.parametrize("name", NOISY)
def test_dropout_and_noise_that_a_configuration_names_are_switched_off(
    saved, opened_on, monkeypatch, name
):
    folder = saved(name, **NOISY[name])
    opened_on(folder)
    monkeypatch.setattr(setup, "no_dropout", lambda policy: None)
    message = "a second pass in training mode differs .* by up to .*; lik"
    with pytest.raises(UserError, match=message):
        opened_on(folder)


def test_noise_that_nothing_names_is_refused(opened_on, hooked, tmp_path):
    hooked(lambda out, module: out + 0.1 * torch.randn_like(out) * module.training)
    out = tmp_path / "run"
    with pytest.raises(UserError, match="a second pass in training mode differs") as error:
        opened_on(TINY, "--out", str(out))
    assert "\n" not in str(error.value) and "(--no-self-check skips" in str(error.value)
    assert not out.exists()
    opened_on(TINY, "--no-self-check")


def test_a_row_that_depends_on_the_others_is_refused(opened_on, hooked):
    hooked(lambda out, module: out + 0.1 * out.mean(0, keepdim=True) * (len(out) > 2))
    with pytest.raises(UserError, match="a pass over several rows differs"):
        opened_on(TINY, "--plain")


def test_attention_that_ignores_its_mask_is_refused(opened_on, monkeypatch):
    def blind(policy, options, dist):
        forward = policy.model.forward

        def without_mask(self, *args, attention_mask=None, **kwargs):
            four = attention_mask is not None and attention_mask.dim() == 4
            return forward(*args, attention_mask=None if four else attention_mask, **kwargs)

        policy.model.forward = types.MethodType(without_mask, policy.model)

    monkeypatch.setattr(setup, "check_blocks", blind)
    message = "packing differs .* attention that ignores .* with --plain all agree"
    with pytest.raises(UserError, match=message):
        opened_on(TINY)
    opened_on(TINY, "--plain")


def test_a_decoder_that_draws_from_something_else_is_refused(monkeypatch):
    model, tokenizer = load_model(str(TINY))
    size = vocab_size_of(model, tokenizer)

    def decode(prompts, G, cap, temperature, uniform, hot=1.0):
        return decoding.generate(model, prompts, G, cap, (), hot, size, uniform)

    self_check.check_decoder(model, decode, tokenizer, size, "x")
    hot = lambda *args: decode(*args, hot=1.5)
    with pytest.raises(UserError, match="--model x: the sampler differs .* likely cause: layers w"):
        self_check.check_decoder(model, hot, tokenizer, size, "x")

    def broken(*args):
        raise IndexError("no such\nlayer")

    message = "the sampler fails on it .IndexError: no such.. Its responses"
    with pytest.raises(UserError, match=message) as error:
        self_check.check_decoder(model, broken, tokenizer, size, "x")
    assert "\n" not in str(error.value)


def test_logits_that_are_more_than_a_product_are_refused(saved):
    more = {
        "Granite": {"logits_scaling": 8.0},
        "Gemma2": {"final_logit_softcapping": 5.0, "head_dim": 8},
        "Cohere": {},
    }
    for name in more:
        folder = saved(name, **more[name])
        with pytest.raises(UserError, match="logits are more than hidden states times the output"):
            load_model(str(folder))


def test_logits_with_a_bias_are_refused():
    model = random_model()
    check_logits(model, "x")
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.full((head.weight.shape[0],), 0.5))
    with pytest.raises(UserError, match="x: its logits are more"):
        check_logits(model, "x")


def test_models_without_keys_and_values_in_every_layer_are_refused(saved, opened_on):
    sizes = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8)
    more = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
    kinds = ["full_attention", "linear_attention"]
    shared = dict(shared_expert_intermediate_size=16, linear_value_head_dim=8, layer_types=kinds)
    with pytest.raises(UserError) as error:
        opened_on(saved("Qwen3Next", **sizes, **more, **shared))
    assert "\n" not in str(error.value)


def test_heads_of_two_sizes_train_with_the_readable_decoder(saved, opened_on):
    sizes = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8)
    more = dict(v_head_dim=8, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2)
    moe = dict(moe_intermediate_size=16, n_group=1, topk_group=1, first_k_dense_replace=1)
    folder = saved("DeepseekV3", **sizes, **more, **moe)
    message = "the sampler fails on it .* with --plain all agree: add it"
    with pytest.raises(UserError, match=message):
        opened_on(folder)
    opened_on(folder, "--plain")


def test_longrope_ends_at_its_original_context():
    angles = dict(short_factor=[1.0] * 4, long_factor=[3.0] * 4, rope_theta=1e4)
    rope = dict(rope_type="longrope", original_max_position_embeddings=40, **angles)
    more = dict(rope_parameters=rope, original_max_position_embeddings=40)
    config = transformers.Phi3Config(**SIZES, **more)
    assert context_of(config) == 40
    assert context_of(transformers.LlamaConfig(**SIZES)) == 128
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    with pytest.raises(UserError, match="no prompt fits the model's context of 40 tokens"):
        fit_context([Problem("What is 1 + 1?", "2")], tokenizer, config, 39)


def test_tokens_beyond_the_embedding_are_never_drawn(saved, opened_on):
    folder = saved("Qwen3", head_dim=8)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = max(tokenizer.get_vocab().values()) + 1
    padding = [f"<pad-{i}>" for i in range(300 - size)]
    tokenizer.add_tokens([*padding, "<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<image>") == 300
    run = opened_on(folder)
    assert run.vocab_size == 300
    with pytest.raises(
        UserError, match="line 3: its prompt holds a token .* .id 300, the model has"
    ):
        fit_context([Problem("<image>?", "2", place="line 3")], tokenizer, run.policy.config, 8)


def test_embeddings_that_are_tied_and_differ_are_one_line(saved):
    folder = saved("Llama", tie_word_embeddings=False)
    config = (folder / "config.json").read_text(encoding="utf-8")
    text = config.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    assert text != config
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="ties input and output embeddings, but its files hold two"):
        load_model(str(folder))
