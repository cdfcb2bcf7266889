"""The decoder, plain and fast: fake models whose answers are known, then real architectures."""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import TINY, checkpoint_layers, random_model
from transformers import AutoTokenizer

import sampling
from engine import decoding, onednn, rows
from engine.engine import Engine
from engine.micro_batches import equal_counts, split_by_tokens
from losses import token_logprobs_and_entropy
from run.batch import join, rollout_of, select
from sampling import (
    AdaptiveTemperature,
    NonFinite,
    cache_argument,
    entropy_of,
    eos_ids_of,
    generate,
    position_ids,
)

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]


def draws_of(tokens, rows):
    return torch.rand(tokens, rows, generator=torch.Generator().manual_seed(0))


def full_logits(model, ids):
    """The logits after every prefix of one unpadded sequence, from one pass without cache."""
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].float()


both = pytest.fixture(params=[True, False], ids=["plain", "fast"])


@both
def decode(request):
    return sampling.generate if request.param else decoding.generate


# ------------------------------------------------------------------------------------------ drawing


@both
def draw(request):
    return sampling.draw if request.param else decoding.Draw()


def draw_with_entropy(draw, *args):
    """The plain draw always measures it."""
    return draw(*args) if draw is sampling.draw else draw(*args, measure_entropy=True)


@both
def invert_cdf(request):
    if request.param:
        return sampling.invert_cdf
    return lambda probs, u: decoding.index_and_shares(probs, u)[0]


def test_the_likeliest_id_is_argmax():
    for size in (1, 63, 64, 65, 200, 384, 4097):
        logits = torch.randn(50, size)
        logits[0], logits[1, size // 2] = -torch.inf, torch.nan
        assert torch.equal(rows.likeliest(logits), logits.argmax(-1, keepdim=True)), size


def test_log_probability_of_a_sure_and_of_a_rare_token(draw):
    """log p = -log1p(q / p) with q the share of the others: by hand, 1e-9 from certainty too."""
    logits = torch.zeros(2, 100).index_fill(1, torch.tensor([7]), 25.0)
    others = 99 * math.exp(-25)
    for function in (draw_with_entropy, lambda draw, *args: draw(*args)):
        drawn = function(draw, logits, 1.0, torch.tensor([0.5, 0.0]))
        assert drawn.tokens.tolist() == [7, 0]
        assert drawn.logp[0].item() == pytest.approx(-math.log1p(others), rel=1e-5)
        assert drawn.logp[1].item() == pytest.approx(-25 - math.log1p(others), rel=1e-6)


def test_draw_by_hand(draw):
    # probabilities 1/4, 1/2, 1/4: u below 0.25 gives 0, below 0.75 gives 1, the rest 2
    logits = torch.tensor([[1.0, 2.0, 1.0]]).log().repeat(5, 1)
    drawn = draw(logits, 1.0, torch.tensor([0.0, 0.24, 0.26, 0.74, 0.99]))
    assert drawn.tokens.tolist() == [0, 0, 1, 1, 2]
    assert drawn.logp.exp().tolist() == pytest.approx([0.25, 0.25, 0.5, 0.5, 0.25])
    assert (drawn.temperature == 1).all()
    if draw is sampling.draw:  # 1/2 ln 2 + 1/2 ln 4
        assert drawn.entropy.tolist() == pytest.approx([1.5 * math.log(2)] * 5)
    else:
        assert drawn.entropy.isnan().all()


def test_draw_at_a_temperature_is_softmax_of_scaled_logits(draw):
    logits, uniform = torch.randn(4, 7), torch.rand(4)
    drawn = draw(logits, 0.5, uniform)
    scaled = (logits / 0.5).log_softmax(-1)
    torch.testing.assert_close(drawn.logp, scaled.gather(-1, drawn.tokens[:, None]).squeeze(-1))
    adaptive = draw(logits, lambda h, t: torch.full_like(h, 0.5), uniform)
    assert torch.equal(adaptive.tokens, drawn.tokens)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(adaptive.entropy, entropy)
    measured = draw_with_entropy(draw, logits, 0.5, uniform)
    assert torch.equal(measured.tokens, drawn.tokens)
    torch.testing.assert_close(measured.entropy, entropy)


def test_inverse_cdf_against_a_loop(invert_cdf):
    for size in (1, 2, 3, 10, 97, 1000):
        probs, uniform = torch.rand(200, size).double().softmax(-1), torch.rand(200).double()
        probs[:, size // 2] = 0 if size > 2 else probs[:, size // 2]
        probs = probs / probs.sum(-1, keepdim=True)
        tokens = invert_cdf(probs, uniform).tolist()
        for row, u, token in zip(probs.tolist(), uniform.tolist(), tokens):
            below = sum(row[:token])
            assert below <= u + 1e-12 and u < below + row[token] + 1e-12 and row[token] > 0


def test_a_token_of_probability_zero_is_never_drawn_even_at_the_edge(invert_cdf, draw):
    probs = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0, 0.0]])
    edge = torch.tensor([1 - 2**-24])  # the largest float32 below 1
    assert invert_cdf(probs, edge).item() == 3 and invert_cdf(probs, torch.zeros(1)).item() == 1
    masked = torch.tensor([[0.0, 0.0, -torch.inf]])
    entropy = draw_with_entropy(draw, masked, 1.0, torch.rand(1)).entropy
    assert entropy.item() == pytest.approx(math.log(2), abs=1e-6)


def test_frequencies_are_those_of_the_softmax(draw):
    logits = torch.randn(1, 30) * 2
    tokens = draw(logits.expand(200_000, -1), 1.0, torch.rand(200_000)).tokens
    share = torch.bincount(tokens, minlength=30) / 200_000
    assert (share - logits.softmax(-1)[0]).abs().max() < 0.005


def test_the_draw_of_a_later_step_is_a_draw_of_its_own():
    """The buffer of a rollout's first step serves the others: it leaves no trace in them."""
    logits, uniform = torch.randn(4, 7), torch.rand(4)
    logits[1, 3] = -torch.inf
    used, rule = decoding.Draw(), lambda h, t: 0.5 + h
    used(torch.full((6, 7), 5.0), rule, torch.rand(6))
    for temperature in (1.0, 0.7, 0, rule):
        before = logits.clone()
        a, b = decoding.Draw()(logits, temperature, uniform), used(logits, temperature, uniform)
        assert torch.equal(a.tokens, b.tokens) and torch.equal(logits, before)
        for x, y in zip(a, b):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    by_hand = torch.distributions.Categorical(logits=logits[[0, 2, 3]]).entropy()
    torch.testing.assert_close(used(logits, rule, uniform).entropy[[0, 2, 3]], by_hand)


# ----------------------------------------------------------------------------------------- decoding


def test_matches_the_full_forward_pass(any_model, decode):
    """Every token's log-probability and entropy, for prompts of unequal length, equal those of an
    uncached, unpadded pass."""
    rule = lambda h, t: 0.9 + 0.1 * h.tanh()
    rollout = decode(any_model, PROMPTS, 3, 6, [3], rule, uniform=draws_of(6, 9))
    for b, answer in enumerate(rollout.responses()):
        prompt = PROMPTS[b // 3]
        logits = full_logits(any_model, prompt + answer)[len(prompt) - 1 : -1]
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        n = len(answer)
        heat = rollout.temperature[b, :n]
        torch.testing.assert_close(rollout.entropy[b, :n], entropy, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(heat, rule(entropy, None), atol=1e-4, rtol=1e-4)
        logp = (logits / heat[:, None]).log_softmax(-1)[range(n), answer]
        torch.testing.assert_close(rollout.logp[b, :n], logp, atol=1e-4, rtol=1e-4)


def test_greedy_matches_generate(any_model):
    greedy = dict(do_sample=False, max_new_tokens=8, eos_token_id=3, pad_token_id=0)
    whole = [any_model.eval().generate(torch.tensor([p]), **greedy)[0].tolist() for p in PROMPTS]
    theirs = [ids[len(prompt) :] for ids, prompt in zip(whole, PROMPTS)]
    for decode in (sampling.generate, decoding.generate):
        rollout = decode(any_model, PROMPTS, 1, 8, eos_ids=[3], temperature=0)
        assert rollout.responses() == theirs


class Chain(torch.nn.Module):
    """A model whose next token is a function of the last one: chains of tokens known beforehand."""

    NEXT = {1: 7, 7: 8, 8: 9, 9: 2, 5: 2, 6: 10, 10: 11, 11: 4}

    def __init__(self):
        super().__init__()
        self.inner, self.calls = random_model(layers=1, vocab=12), []
        self.config, self.get_input_embeddings = self.inner.config, self.inner.get_input_embeddings

    def forward(self, ids, **kwargs):
        kwargs[cache_argument(type(self.inner))] = kwargs.pop(cache_argument(type(self)))
        out = self.inner(ids, **kwargs)
        self.calls.append((ids[:, -1].tolist(), kwargs["position_ids"][:, -1].tolist()))
        out.logits = torch.full_like(out.logits, -1e9)
        for row, token in enumerate(ids[:, -1].tolist()):
            out.logits[row, -1, self.NEXT.get(token, token)] = 0.0
        return out


def test_rows_leave_when_they_end_and_every_eos_counts(decode):
    model = Chain()
    rollout = decode(model, [[1], [5], [3, 3, 6]], 1, 8, eos_ids=[2, 4])
    assert rollout.responses() == [[7, 8, 9, 2], [2], [10, 11, 4]]
    assert rollout.finished.all() and rollout.lengths.tolist() == [4, 1, 3]
    # the end-of-sequence token is inside the mask
    assert rollout.mask[1].tolist() == [True, False, False, False]
    # what the model was fed: last tokens and their positions; row 1 leaves after one token, row 2
    # after three, where rows leave
    fed = [([1, 5, 6], [0, 0, 2]), ([7, 10], [1, 3]), ([8, 11], [2, 4]), ([9], [3])]
    if decode is sampling.generate:
        fed = [([1, 5, 6], [0, 0, 2]), ([7, 2, 10], [1, 1, 3]), ([8, 2, 11], [2, 2, 4])]
        fed += [([9, 2, 4], [3, 3, 5])]
    assert model.calls == fed


def test_keys_and_values_go_by_the_name_that_the_model_knows():
    class Old(torch.nn.Module):
        def forward(self, ids, past_key_values=None): ...

    class New(torch.nn.Module):
        def forward(self, ids, cache=None): ...

    class Wrapped(New):
        def forward(self, *args, **kwargs): ...

    assert cache_argument(Old) == "past_key_values"
    assert cache_argument(New) == cache_argument(Wrapped) == "cache"


def test_dropping_rows_changes_no_other_row(decode):
    """With and without an end id that some rows meet: the rows that never meet it draw the same
    tokens. The length cap is not an end."""
    model, draws = random_model(), draws_of(10, 12)
    free = decode(model, PROMPTS, 4, 10, eos_ids=[], uniform=draws)
    stop = int(free.tokens[0, 2])
    dropped = decode(model, PROMPTS, 4, 10, eos_ids=[stop], uniform=draws)
    for whole, cut in zip(free.responses(), dropped.responses()):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert cut == whole[:end]
    assert dropped.finished.any() and not dropped.finished.all() and not free.finished.any()
    assert free.tokens.shape == (12, 10) and free.mask.all()


def test_pad_equal_to_eos_is_trained_on():
    """Masks come from lengths: token 0 is drawn as an ordinary token, id 3 is both pad and end and
    still counts."""
    rollout = rollout_of([[1]], [[0, 5, 3]])
    assert rollout.mask.tolist() == [[True, True, True]] and rollout.responses() == [[0, 5, 3]]


def test_padded_vocabulary_is_never_drawn(decode):
    model = random_model(vocab=50)
    with torch.no_grad():
        model.lm_head.weight[40:] *= 100  # padding rows with the largest logits
    rollout = decode(model, PROMPTS, 8, 10, vocab_size=40)
    assert rollout.tokens.max() < 40
    ids, mask, predicts = rollout.sequences(list(range(24)))
    out = model.model(ids, attention_mask=mask, position_ids=position_ids(mask))
    states, tokens = out.last_hidden_state[predicts], rollout.tokens[rollout.mask]
    logp, _ = token_logprobs_and_entropy(states, model.lm_head.weight[:40], tokens)
    torch.testing.assert_close(logp, rollout.logp[rollout.mask], atol=1e-4, rtol=1e-4)


def test_generation_config_and_training_mode_do_not_change_answers(decode):
    """model.generate in train() mode with checkpointing drops the cache; ours must not, and must
    put the modes back."""
    model, draws = random_model().eval(), draws_of(10, 12)
    want = decode(model, PROMPTS, 4, 10, uniform=draws)
    settings = dict(top_k=1, top_p=0.1, repetition_penalty=3.0, temperature=0.1)
    model.generation_config = transformers.GenerationConfig(do_sample=True, **settings)
    assert torch.equal(decode(model, PROMPTS, 4, 10, uniform=draws).tokens, want.tokens)
    checkpoint_layers(model)
    model.train()
    model.model.norm.eval()
    got = decode(model, PROMPTS, 4, 10, uniform=draws)
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.logp, want.logp)
    assert model.training and not model.model.norm.training
    assert model.model.layers[0].gradient_checkpointing and torch.is_grad_enabled()


def test_the_product_for_few_rows_is_the_product(monkeypatch):
    monkeypatch.setattr(onednn, "LEAST_WEIGHTS", 1)
    net = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Linear(20, 40, bias=False))
    net.requires_grad_(False)
    for count in (1, 5, 300):
        x = torch.randn(count, 1, 30)
        want = net(x)
        with onednn.onednn_linear(net, count):
            assert all("forward" in vars(m) for m in net)
            torch.testing.assert_close(net(x), want, atol=1e-5, rtol=1e-5)
        assert not any("forward" in vars(m) for m in net)
    net.double()
    with onednn.onednn_linear(net, count):  # oneDNN's product is for float32
        assert not any("forward" in vars(m) for m in net)


def test_non_finite_logits_are_refused(decode):
    model = random_model()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(NonFinite, match="position 0"):
        decode(model, PROMPTS, 1, 4)
    with pytest.raises(ValueError, match="at least one token"):
        decode(random_model(), [[1], []], 1, 4)


# ----------------------------------------------------------------------------------------- rollouts


def test_select_and_join_keep_rows_together():
    a = generate(random_model(), PROMPTS, 2, 5, [3])
    b = generate(random_model(), [[1, 2, 3, 4, 5, 6]], 2, 7, [3])
    joined = join([a, b])
    assert joined.responses() == a.responses() + b.responses()
    picked = select(joined, [3, 1])
    assert picked.responses() == b.responses() + a.responses()[2:4]
    ids, mask, predicts = picked.sequences([2, 0])
    line = PROMPTS[1] + a.responses()[2]
    assert ids[0, mask[0]].tolist() == line and mask[0, : len(line)].all()  # no padding on the left
    places = predicts[0].nonzero().flatten().tolist()
    assert places == list(range(len(PROMPTS[1]) - 1, len(line) - 1))
    assert ids[1, mask[1]].tolist() == [1, 2, 3, 4, 5, 6] + b.responses()[0]
    _, _, response = picked.with_response_mask(4)
    assert response.sum().item() == picked.mask.sum().item() and not response[:, 0].any()


def test_micro_batches_cover_every_row_once():
    lengths = (1, 9, 2, 8, 3, 7)
    rollout = rollout_of([[1, 1]] * 6, [[5] * n for n in lengths])
    engine = lambda size: SimpleNamespace(options=SimpleNamespace(micro_batch=size))
    split = lambda rows, size: Engine.micro_batches(engine(size), rollout, rows)
    assert split(slice(0, 6), 4) == [slice(0, 4), slice(4, 6)]
    assert split(slice(2, 6), 0) == [slice(2, 6)]
    parts = split_by_tokens(rollout, slice(0, 6), 20, packed=False)
    parts = [rollout.row_list(part) for part in parts]
    assert sorted(sum(parts, [])) == list(range(6))
    assert all(len(p) == 1 or len(p) * (2 + max(lengths[r] for r in p)) <= 20 for p in parts)
    # one answer longer than the limit still goes through
    assert split_by_tokens(rollout, [1], 3, packed=False) == [slice(1, 2)]


def test_every_rank_makes_the_same_number_of_passes():
    """A rank with two passes where another has four cuts its longest ones in two."""
    other = SimpleNamespace(all_reduce_max=lambda count: max(count, 4))
    rollout = rollout_of([[1]] * 6, [[5]] * 6)
    parts = [rollout.row_list(part) for part in equal_counts([[0, 2, 1, 3, 4], [5]], other)]
    assert len(parts) == 4 and sorted(sum(parts, [])) == list(range(6)) and all(parts)
    assert equal_counts([[0, 1, 2, 3]], other) == [slice(i, i + 1) for i in range(4)]


# --------------------------------------------------------------------------- transformers' generate


def test_logits_processor_samples_the_same_distribution():
    rule = lambda entropy, position: 1 + 0.3 * entropy.tanh()
    logits = torch.randn(5, 20)
    scaled = AdaptiveTemperature(rule)(torch.zeros(len(logits), 1).long(), logits)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(scaled, logits / rule(entropy, None)[:, None])
    model, rule = random_model(layers=1).eval(), lambda entropy, position: 0.1 * entropy
    ids, processors = torch.tensor([[5, 6]]).repeat(5_000, 1), [AdaptiveTemperature(rule)]
    how = dict(do_sample=True, top_k=0, max_new_tokens=1, pad_token_id=0)
    drawn = model.generate(ids, **how, logits_processor=processors)[:, -1]
    first = full_logits(model, [5, 6])[-1:]
    share = (first / rule(entropy_of(first), None)[:, None]).softmax(-1)[0]
    assert (torch.bincount(drawn, minlength=50) / 5_000 - share).abs().max() < 0.015
    # the rule makes a difference that this would see
    assert (first.softmax(-1)[0] - share).abs().max() > 0.03


def test_eos_ids_come_from_everywhere():
    model, tokenizer = random_model(layers=1), SimpleNamespace(eos_token_id=11)
    model.generation_config.eos_token_id, model.config.eos_token_id = [3, 9], 4
    assert eos_ids_of(model, tokenizer) == [3, 4, 9, 11]
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    assert eos_ids_of(model, SimpleNamespace(eos_token_id=None)) == []


def test_the_token_behind_a_turn_ends_an_answer():
    """Also where neither model nor tokenizer calls it an end: a base model with a template."""
    tokenizer, model = AutoTokenizer.from_pretrained(TINY), random_model()
    text, turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    model.generation_config.eos_token_id = model.config.eos_token_id = text
    tokenizer.eos_token = "<|endoftext|>"
    assert eos_ids_of(model, tokenizer) == sorted([text, turn])
    words = tokenizer.chat_template.replace("<|im_end|>", "\n\n")  # words are no end
    raises = "{{ raise_exception('users only') if messages[1] }}"
    for template in (words, raises, None):
        tokenizer.chat_template = template
        assert eos_ids_of(model, tokenizer) == [text], template
    tokenizer.chat_template = words
    tokenizer.add_tokens(["\n\n"])  # nor is whitespace with an entry of its own
    assert eos_ids_of(model, tokenizer) == [text]


def test_the_logits_processor_counts_positions_from_the_prompt():
    """In transformers' generate, positions count from 0 in each call, at any prompt width."""
    model, seen = random_model().eval(), []

    def rule(entropy, positions):
        seen.append(positions.tolist())
        return torch.ones_like(entropy)

    how = dict(do_sample=True, top_k=0, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    processors = [AdaptiveTemperature(rule)]  # one for all calls
    for width in (3, 2, 7):
        model.generate(torch.full((2, width), 5), **how, logits_processor=processors)
    assert seen == [[t, t] for t in range(4)] * 3
