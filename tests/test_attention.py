"""Masks and heads as kernels like them: the same numbers, and no row that sees nothing."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES, random_model

import internals
import sampling
from common import attention, devices
from engine import decoding
from engine.decode_attention import packed_heads

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]


def test_where_flash_attention_runs(monkeypatch):
    bf16, fp32 = torch.bfloat16, torch.float32
    capability = [(8, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    asked = lambda *how: devices.has_flash_attention(SimpleNamespace(type="cuda"), *how)
    assert asked(bf16, 128) and asked(torch.float16, 256)
    assert not asked(fp32, 128) and not asked(bf16, 257)
    capability[0] = (7, 5)
    assert not asked(torch.float16, 64)
    assert devices.has_flash_attention(torch.device("cpu"), fp32, 64)


def mended(monkeypatch, flash, architecture="Qwen3"):
    """(model, masks that its attention is given): as on a card with or without flash attention."""
    model, masks = random_model(architecture), []
    monkeypatch.setattr(attention, "has_flash_attention", lambda *how: flash)
    body = model.base_model
    body.register_forward_pre_hook(attention._give_mask, with_kwargs=True)
    note = lambda m, args, kwargs: masks.append(kwargs["attention_mask"])
    body.layers[0].self_attn.register_forward_pre_hook(note, with_kwargs=True)
    return model, masks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mask_where_flash_attention_cannot_run(monkeypatch, architecture):
    ids = torch.tensor([[5, 6, 7, 8], [4, 9, 9, 9]])
    plain = random_model(architecture)(ids).logits
    before = torch.ones(4, 4).tril().bool().expand(2, 1, 4, 4)
    for flash in (True, False):
        model, masks = mended(monkeypatch, flash, architecture)
        for seen in (None, torch.ones_like(ids)):
            torch.testing.assert_close(model(ids, seen).logits, plain)
            mask = masks.pop()
            assert mask is None if flash else torch.equal(mask, before)


@pytest.mark.parametrize("flash", [True, False])
def test_rows_behind_padding_see_themselves(monkeypatch, flash):
    model, masks = mended(monkeypatch, flash)
    ids, seen = sampling.pad_prompts(PROMPTS)
    positions = sampling.position_ids(seen)
    ours = model(ids, attention_mask=seen, position_ids=positions).logits
    theirs = random_model()(ids, attention_mask=seen, position_ids=positions).logits
    torch.testing.assert_close(ours[seen], theirs[seen])
    assert ours.isfinite().all()
    (mask,) = masks
    assert mask.shape == (3, 1, 4, 4) and mask.any(-1).all()
    sees = [row.nonzero().flatten().tolist() for row in mask[2, 0]]
    assert sees == [[0], [1], [2], [2, 3]]  # two of padding, two of a prompt


def test_a_whole_mask_and_a_token_behind_others_are_left_alone(monkeypatch):
    model, masks = mended(monkeypatch, False)
    whole = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    model(torch.tensor([[5, 6, 7]]), attention_mask=whole)
    assert masks.pop() is whole
    draws = torch.rand(12, 6)
    found = decoding.generate(model, PROMPTS, 2, 12, [3], uniform=draws)
    plain = sampling.generate(random_model(), PROMPTS, 2, 12, [3], uniform=draws)
    assert torch.equal(found.tokens, plain.tokens)


def test_all_diagnostics_take_the_mask(monkeypatch):
    model, masks = mended(monkeypatch, False)
    ids = torch.tensor([[5, 6, 7, 8]])
    internals.residual_stream(model, ids, torch.ones_like(ids))
    internals.policy_hidden(model, ids, torch.ones_like(ids), 2, norm=False)
    assert len(masks) == 2 and all(mask.shape == (1, 1, 4, 4) for mask in masks)


def test_which_models_are_mended():
    model = random_model()
    hooks = lambda model: len(model.base_model._forward_pre_hooks)
    before = hooks(model)  # a CPU has flash attention
    assert attention.install_mask_hook(model) is model and hooks(model) == before
    meta = random_model().to("meta")
    attention.install_mask_hook(meta)
    assert hooks(meta) == 1
    meta.config.sliding_window = 5  # a window is the model's own business
    attention.install_mask_hook(meta)
    assert hooks(meta) == 1


@pytest.mark.parametrize("prompts", [PROMPTS, [[5, 6], [7, 8]]])
def test_packed_heads_draw_the_same(prompts):
    """With padding and without; the attention is put back, also behind an error."""
    model = random_model()
    draws = torch.rand(20, 4 * len(prompts))
    found = decoding.generate(model, prompts, 4, 20, [3], uniform=draws)
    plain = sampling.generate(model, prompts, 4, 20, [3], uniform=draws)
    assert torch.equal(found.tokens, plain.tokens)
    torch.testing.assert_close(found.logp, plain.logp, atol=1e-5, rtol=1e-5)
    with pytest.raises(KeyError), packed_heads(model):
        assert model.config._attn_implementation == "packed_heads"
        raise KeyError
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with packed_heads(model):
        assert model.config._attn_implementation == "eager"


def test_text_behind_other_text_is_left_alone(monkeypatch):
    """Several tokens behind a cache, and embeddings in place of ids."""
    model, masks = mended(monkeypatch, False)
    whole = model(torch.tensor([[5, 6, 7, 8, 9]])).logits[:, 3:]
    cache = {sampling.cache_argument(type(model)): sampling.DynamicCache()}
    model(torch.tensor([[5, 6, 7]]), **cache)
    torch.testing.assert_close(model(torch.tensor([[8, 9]]), **cache).logits, whole)
    embedded = model.get_input_embeddings()(torch.tensor([[5, 6, 7, 8, 9]]))
    torch.testing.assert_close(model(inputs_embeds=embedded).logits[:, 3:], whole)
