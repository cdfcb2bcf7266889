"""The memory estimate: numbers worked by hand on a small shape, and which option it blames."""

import dataclasses

import pytest
from conftest import TINY, random_model

from fast.logprobs import LOGIT_CHUNK_BYTES
from program.errors import BadInput
from program.models import load_config
from run import opening, options
from scale import memory

STEP = (
    "--estimate --prompts-per-step 4 --answers-per-prompt 2 --updates-per-rollout 2 "
    "--max-new-tokens 10"
).split()


def some_options(*more):
    return options.parse([*STEP, *more], "")


def test_parts_by_hand():
    model = random_model(layers=3, vocab=50, hidden=32)
    parameters = sum(p.numel() for p in model.parameters())

    def needs(*more):
        return memory.estimate(model.config, some_options(*more), prompt_tokens=6, cuda=True)

    e = needs()
    assert e.parameters == parameters
    assert e.weights == e.gradients == 4 * parameters
    assert e.moments == 8 * parameters and e.replica == 2 * parameters
    held = needs("--kl", "0.1")
    assert e.reference == 0 and held.reference == 4 * parameters == held.peak - e.peak
    # KV cache: 8 answers x 16 tokens x 3 layers x (keys and values) x 2 heads x head size x 2 bytes
    assert e.kv_cache == 8 * 16 * 3 * 2 * 2 * model.config.head_dim * 2
    # the logits chunk is never larger than an update's answers, 4 x 10; three float32 copies and
    # the unembedding's gradient
    assert e.logits == 40 * 50 * 4 * 3 + 4 * 50 * 32
    # 4 answers of 10 tokens, two to a line with their prompt of 6, and the lines' masks;
    # bfloat16 weights
    size = model.config.head_dim
    a_token = 2 * (3 * 64 + 2 * 4 * size + 2 * 2 * size) + (4 + 2) * 4 * 32
    assert e.activations == 3 * (2 * 26 * a_token + 2 * 26 * 26 * 2) + 2 * parameters
    # with checkpointing: one hidden state a layer, two layers' insides
    less = needs("--gradient-checkpointing")
    insides = 2 * (52 * a_token + 2 * 26 * 26 * 2)
    assert less.activations == 52 * 4 * 32 * 3 + insides + 2 * parameters
    # answers of 100 tokens stand alone: 4 lines of 106
    alone = needs("--max-new-tokens", "100")
    assert alone.activations == 3 * 4 * 106 * a_token + 2 * parameters
    # passes of at most 50 tokens are full, however long an answer could be;
    # 4 answers of 16 are not more than 64; and one answer always goes through
    for limit, tokens in (("50", 50), ("1000", 64), ("5", 16)):
        some = needs("--micro-tokens", limit)
        assert some.activations == 3 * tokens * a_token + 2 * parameters
    updating, sampling = e.gradients + e.activations + e.logits, e.kv_cache + e.sampling
    assert e.peak == e.weights + e.moments + e.replica + max(updating, sampling)


def test_what_makes_it_smaller():
    config, o = load_config(TINY), some_options("--max-new-tokens", "200")
    whole = memory.estimate(config, o)
    changed = lambda **changes: memory.estimate(config, dataclasses.replace(o, **changes))
    assert changed(gradient_checkpointing=True).activations < whole.activations
    assert changed(micro_batch=1).activations < whole.activations
    assert memory.estimate(config, o, world_size=2).weights == whole.weights // 2
    assert changed(offload=True).moments == 0


def test_a_chunk_of_logits_has_a_fixed_size():
    config = load_config(TINY)
    config.vocab_size = 151_936
    e = memory.estimate(config, some_options("--max-new-tokens", "512"), prompt_tokens=512)
    assert e.logits < 3 * LOGIT_CHUNK_BYTES + 4 * 151_936 * config.hidden_size + 1


def test_a_device_that_is_too_small_is_named_with_the_number_to_change(monkeypatch):
    from types import SimpleNamespace

    import torch

    small = lambda device: SimpleNamespace(total_memory=10**6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", small)
    o = some_options("--max-new-tokens", "400")
    world = SimpleNamespace(device=torch.device("cuda"), size=1)
    fake = SimpleNamespace(options=o, items=[(None, [1, 2, 3])], world=world)
    message = "this run needs 0.. GiB and the device has 0.0; try --gradient-checkpointing"
    with pytest.raises(BadInput, match=message):
        opening.describe(fake, load_config(TINY), print)
