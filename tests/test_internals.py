"""Internal policies: the residual identity, agreement with transformers, and a model whose
entropies are known."""

import dataclasses
import json
import math
import sys

import pytest
import torch
import transformers
from conftest import checkpoint_layers, random_model

import internals
from common.errors import UserError
from engine import packing
from engine.micro_batches import split_by_tokens
from internals import (
    boundary_layer,
    internal_entropy,
    layer_hidden,
    layer_logits,
    layer_similarity,
    policy_hidden,
    residual_stream,
    unembedding,
)
from run.batch import rollout_of
from sampling import position_ids
from scripts import internal_report

IDS = torch.randint(4, 50, (3, 9), generator=torch.Generator().manual_seed(0))
LEFT, RIGHT = torch.ones(3, 9, dtype=torch.long), torch.ones(3, 9, dtype=torch.long)
LEFT[0, :4], RIGHT[1, 6:] = 0, 0
PADDINGS = {"none": torch.ones(3, 9, dtype=torch.long), "left": LEFT, "right": RIGHT}


def reference(model, mask):
    """transformers' own pass: inner hidden states un-normed, the last one normed."""
    inputs = dict(attention_mask=mask, position_ids=position_ids(mask))
    with torch.no_grad():
        return model.eval()(IDS, **inputs, output_hidden_states=True)


@pytest.mark.parametrize("padding", PADDINGS)
def test_residual_stream_adds_up_and_equals_transformers(any_model, padding):
    mask = PADDINGS[padding]
    real, out = mask.bool(), reference(any_model, mask)
    with torch.no_grad():
        stream = residual_stream(any_model, IDS, mask)
    assert len(stream.hidden) == 4 and all(len(part) == 3 for part in stream[1:])
    for l in range(1, 4):  # H^l = H^(l-1) + A^l + F^l
        below, block = stream.hidden[l - 1], any_model.model.layers[l - 1]
        middle = below + stream.attention[l - 1]
        above = middle + stream.feed_forward[l - 1]
        torch.testing.assert_close(stream.hidden[l], above, atol=1e-5, rtol=1e-5)
        normed = block.input_layernorm(below)
        torch.testing.assert_close(stream.attention_input[l - 1], normed)
        normed = block.post_attention_layernorm(middle)
        torch.testing.assert_close(stream.feed_forward_input[l - 1], normed)
    last = any_model.model.norm(stream.hidden[-1])
    for ours, theirs in zip([*stream.hidden[:-1], last], out.hidden_states):
        torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-5)
    # the trap: theirs is normed, ours is not
    assert (stream.hidden[-1] - out.hidden_states[-1])[real].abs().max() > 0.1
    # layer L with the norm is the model's own policy
    with torch.no_grad():
        logits = layer_logits(any_model, layer_hidden(any_model, IDS, mask, 3), norm=True)
        own = layer_logits(any_model, policy_hidden(any_model, IDS, mask))
    for ours in (logits, own):
        torch.testing.assert_close(ours[real], out.logits[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", PADDINGS)
def test_layer_hidden_equals_the_full_pass(any_model, padding):
    mask, real = PADDINGS[padding], PADDINGS[padding].bool()
    theirs = reference(any_model, mask).hidden_states
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_layers(any_model)
        any_model.train()
        for l in (1, 2):
            ours = layer_hidden(any_model, IDS, mask, l)
            torch.testing.assert_close(ours[real], theirs[l][real], atol=1e-5, rtol=1e-5)
            assert ours.requires_grad
    # all put back
    assert len(any_model.model.layers) == 3
    assert any_model.get_output_embeddings().weight.shape[0] == 50


def same_gradients(model, others, tolerance):
    for p, g in zip(model.parameters(), others):
        assert (p.grad is None) == (g is None)
        assert g is None or torch.allclose(p.grad, g, atol=tolerance, rtol=tolerance)


def gradients_of(model):
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def test_checkpointed_gradients_are_the_same():
    model = random_model().train()
    layer_hidden(model, IDS, LEFT, 2).square().mean().backward()
    plain = gradients_of(model)
    checkpoint_layers(model)
    layer_hidden(model, IDS, LEFT, 2).square().mean().backward()
    same_gradients(model, plain, 1e-6)


def test_nothing_above_the_layer_runs():
    model, ran = random_model(layers=4), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: ran.append(name))
    layer_hidden(model, IDS, LEFT, 2)
    layers = {int(n.split(".")[2]) for n in ran if n.startswith("model.layers.")}
    assert layers == {0, 1} and "model.norm" not in ran and "lm_head" not in ran
    before = dict(model.named_modules())  # all put back after an error
    with pytest.raises(IndexError):
        layer_hidden(model, torch.full((1, 3), 10_000), torch.ones(1, 3), 2)
    assert dict(model.named_modules()) == before


def test_left_padded_equals_unpadded():
    model = random_model().eval()
    with torch.no_grad():
        padded = policy_hidden(model, IDS, LEFT)[0, 4:]
        alone = policy_hidden(model, IDS[:1, 4:], torch.ones(1, 5, dtype=torch.long))[0]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- states that predict answers

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
ANSWERS = [[12, 13, 14], [3], [24], [15, 16], [17, 18, 19, 20], [25, 26, 27], [21], [22, 23], [28]]
ROLLOUT = rollout_of(PROMPTS, ANSWERS)
ROWS = {"rows of three groups": [5, 0, 1, 4, 3, 8], "answers of one token": [1, 2, 6, 6]}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("layer", [None, 2])
def test_answer_states_are_those_of_each_line_alone(any_model, layer, rows, monkeypatch):
    """Prompts of unequal length, a micro-batch that cuts through groups, lines with empty places:
    every state and the gradient of every weight, in every packing (None: a line an answer)."""
    any_model.train()
    expected = []
    for r in rows:
        prompt, answer = PROMPTS[r // 3], ANSWERS[r]
        line = torch.tensor([prompt + answer])
        mask = torch.ones_like(line)
        states = policy_hidden(any_model, line, mask, layer, norm=layer is None)
        expected.append(states[0, len(prompt) - 1 : -1])
    expected = torch.cat(expected)
    weight = torch.randn(expected.shape)
    (expected * weight).sum().backward()
    grads = gradients_of(any_model)
    monkeypatch.setattr(packing, "cost", lambda packing, D: 0)  # pack, whatever it costs
    for steps in ((1,), (1.5,), (3,), None):
        monkeypatch.setattr(packing, "STEPS", steps)
        if steps is None:
            monkeypatch.setattr(packing, "choose_packing", lambda *sizes: None)
        packed = packing.Packer(any_model.config).pack(ROLLOUT, rows)
        states = internals.response_states(any_model, packed, layer, layer is None)
        assert packed.tokens.tolist() == [t for r in rows for t in ANSWERS[r]]
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
        (states * weight).sum().backward()
        same_gradients(any_model, grads, 3e-4)
        any_model.zero_grad()


def shapes_seen(model):
    """A list that fills with the shape of the ids in every forward pass."""
    shapes = []
    note = lambda m, args, out: shapes.append(tuple(args[0].shape))
    model.get_input_embeddings().register_forward_hook(note)
    return shapes


def states_of(model, rollout, rows):
    """In the running layout."""
    return internals.response_states(model, packing.Packer(model.config).pack(rollout, rows))


def test_a_shared_prompt_runs_once():
    model = random_model()
    shapes = shapes_seen(model)
    states_of(model, ROLLOUT, [0, 1, 3, 4])
    # prompts of 4 and 1 tokens, answers of 3, 1, 2 and 4, each without its last token
    assert shapes == [(1, 11)]
    plain = internals.unpacked(ROLLOUT, [0, 1, 3, 4])  # a line an answer
    internals.response_states(model, plain)
    assert shapes[1] == (4, 6)


def test_a_line_by_hand():
    """Two prompts, of 2 and of 1 tokens; answers of 3, 2 and 4 tokens, whose last ones predict
    nothing: a line of 2 + 2 + 1 and 1 + 3 tokens, and one of padding."""
    rollout = rollout_of([[1, 2], [3]], [[4, 5, 6], [7, 8], [9, 10, 11, 12], [13]])
    segment = packing.Segment
    packed = [[segment(5, 0, [0, 1]), segment(4, 1, [2, 3])], [segment(1, 1, [3])]]
    packed[0][1] = segment(4, 1, [2])
    ids, owners, positions, predecessors, tokens = packing.laid_out(
        rollout, [2, 0, 3, 1], packed, 9, rollout.lengths.tolist(), [2, 1]
    )
    assert ids.tolist() == [[1, 2, 4, 5, 7, 3, 9, 10, 11], [3] + [0] * 8]
    assert positions[0].tolist() == [0, 1, 2, 3, 2, 0, 1, 2, 3]
    # of answers 2, 0, 3 and 1
    assert predecessors.tolist() == [5, 6, 7, 8] + [1, 2, 3] + [9] + [1, 4]
    assert tokens.tolist() == [9, 10, 11, 12] + [4, 5, 6] + [13] + [7, 8]
    mask = packing.visible(*owners)
    sees = [row.nonzero().flatten().tolist() for row in mask[0, 0]]
    assert sees[:5] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4]]
    assert sees[5:] == [[5], [5, 6], [5, 6, 7], [5, 6, 7, 8]]
    assert mask[1, 0].sum() == 9 and bool(mask[1, 0].diagonal().all())  # padding sees itself


def test_packing_is_tight_and_holds_every_answer_once():
    torch.manual_seed(4)
    lengths, prompts = torch.randint(1, 30, (64,)).tolist(), torch.randint(10, 20, (8,)).tolist()
    config = random_model().config
    packed, width = packing.choose_packing(config, range(64), lengths, prompts, 8)
    assert sorted(row for line in packed for s in line for row in s.rows) == list(range(64))
    for line in packed:
        assert sum(s.size for s in line) <= width
        for s in line:
            assert s.size == prompts[s.prompt] + sum(lengths[row] - 1 for row in s.rows)
            assert {row // 8 for row in s.rows} == {s.prompt}
    needed = sum(lengths) - 64 + sum(prompts)
    assert len(packed) * width <= 1.2 * needed


def test_packing_takes_the_cheapest_width():
    """W (6 D + W) a line: a wide model fills its lines, a narrow one keeps them short."""
    config = random_model().config
    widths = []
    for config.hidden_size in (96, 4096):
        _, width = packing.choose_packing(config, range(64), [33] * 64, [16] * 8, 8)
        widths.append(width)
    assert widths[0] < widths[1] == 16 + 8 * 32
    # 40 answers to as many prompts of a token: lines of their own cost no more, and see no mask
    assert packing.choose_packing(config, range(40), [9] * 40, [1] * 40, 1) is None
    assert packing.choose_packing(config, range(8), [packing.LONGEST_ROW] * 8, [2], 8) is None


def test_scoring_and_updating_share_a_layout():
    model = random_model()
    packer = packing.Packer(model.config)
    ids = lambda rollout, rows: packer.pack(rollout, rows).ids
    assert ids(ROLLOUT, [0, 1]) is ids(ROLLOUT, [0, 1])
    assert ids(ROLLOUT, [0, 1]) is not ids(ROLLOUT, [0, 2])
    first, other = ids(ROLLOUT, [0, 1]), dataclasses.replace(ROLLOUT)
    assert ids(other, [0, 1]) is not first and torch.equal(ids(other, [0, 1]), first)


@pytest.mark.parametrize("packed", [True, False])
def test_no_pass_holds_more_tokens_than_asked_for(packed):
    """--micro-tokens: real ones where answers are packed, else with their padding."""
    torch.manual_seed(3)
    answers = [[7] * n for n in torch.randint(1, 33, (96,)).tolist()]
    prompts = [[5] * n for n in torch.randint(10, 40, (12,)).tolist()]
    rollout, model = rollout_of(prompts, answers), random_model()
    shapes = shapes_seen(model)
    assert packing.Packer(model.config).packs(rollout, slice(0, 96))
    parts = split_by_tokens(rollout, slice(0, 96), 700, packed)
    parts = [rollout.row_list(part) for part in parts]
    for part in parts:
        if packed:
            states_of(model, rollout, part)
        else:
            internals.response_states(model, internals.unpacked(rollout, part))
        asked = sum(len(prompts[p]) for p in {r // 8 for r in part})
        assert sum(len(answers[r]) for r in part) + asked <= 700
    assert sorted(sum(parts, [])) == list(range(96))
    computed = [rows * width for rows, width in shapes]
    assert len(shapes) == len(parts)
    assert max(computed) <= (700 * 1.3 if packed else 700)
    if packed:
        assert sum(computed) < 1.2 * (sum(map(len, answers)) + sum(map(len, prompts)))


@pytest.mark.parametrize("setting", ["eager", "sliding window"])
def test_models_that_take_no_such_mask_run_every_line_alone(setting):
    model = random_model()
    expected = states_of(model, ROLLOUT, [0, 1, 2])
    if setting == "eager":
        model.set_attn_implementation("eager")
    else:
        model.config.sliding_window = 100
    shapes = shapes_seen(model)
    states = states_of(model, ROLLOUT, [0, 1, 2])
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
    assert shapes == [(3, 6)]


# ------------------------------------------------------------------------------------------ entropy


def test_entropies_against_plain_softmax(any_model):
    response = LEFT.clone()
    response[:, :6] = 0

    def mean_entropy(states):  # the state one to the left predicts a response token
        p = (states[:, 5:8] @ unembedding(any_model).T).double().softmax(-1)
        return -(p * p.log()).sum(-1).mean().item()

    with torch.no_grad():
        ours = internal_entropy(any_model, IDS, LEFT, response, batch=2)
        stream = residual_stream(any_model, IDS, LEFT)
        for l in range(3):
            pairs = [(ours.layer[l + 1], stream.hidden[l + 1])]
            for name in ("attention", "feed_forward", "attention_input", "feed_forward_input"):
                pairs.append((getattr(ours, name)[l], getattr(stream, name)[l]))
            for mine, part in pairs:
                assert mine.item() == pytest.approx(mean_entropy(part), abs=1e-4)
            middle = stream.hidden[l] + stream.attention[l]
            cosine = torch.cosine_similarity(stream.feed_forward[l], middle, dim=-1)
            mean = cosine[:, 5:8].mean().item()
            assert ours.feed_forward_cosine[l].item() == pytest.approx(mean, abs=1e-5)
        last = any_model.model.norm(stream.hidden[-1])
        assert ours.policy.item() == pytest.approx(mean_entropy(last), abs=1e-4)
    torch.testing.assert_close(ours.layer_change, ours.layer[1:] - ours.layer[:-1])
    change = ours.feed_forward - ours.feed_forward_input
    torch.testing.assert_close(ours.feed_forward_change, change)


def test_blocks_that_add_nothing():
    """Zero attention and feed-forward output: every layer policy is the embedding's, and A and F
    unembed to the uniform distribution."""
    model = random_model(vocab=50)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    entropy = internal_entropy(model, IDS, LEFT, LEFT)
    assert torch.allclose(entropy.layer_change, torch.zeros(3, dtype=torch.float64), atol=1e-9)
    uniform = torch.full((3,), math.log(50), dtype=torch.float64)
    for part in (entropy.attention, entropy.feed_forward):
        torch.testing.assert_close(part, uniform, rtol=1e-6, atol=1e-6)
    assert (entropy.feed_forward_change > 0).all()
    assert boundary_layer(entropy.feed_forward_change) == 3
    torch.testing.assert_close(entropy.attention_input, entropy.feed_forward_input)


BOUNDARIES = [([-1, -2, -3], None), ([1, 2, 3], 3), ([-1, -1, 0.1], 3), ([1, -1, -1], 1)]
BOUNDARIES += [([1, -1, 1, 0], 3), ([], None)]


@pytest.mark.parametrize("change, layer", BOUNDARIES)
def test_boundary_layer(change, layer):
    assert boundary_layer(torch.tensor(change, dtype=torch.float64)) == layer
    assert boundary_layer(change) == layer


# ---------------------------------------------------------------------------------------- comparing


def test_similarity_of_layers():
    model = random_model()
    cosine, kl = layer_similarity(model, IDS, LEFT, LEFT, 1)
    with torch.no_grad():
        stream = residual_stream(model, IDS, LEFT)
    valid = LEFT[:, 1:].bool()
    h1, h3 = stream.hidden[1][:, :-1][valid], stream.hidden[3][:, :-1][valid]
    p, q = ((h @ unembedding(model).T).log_softmax(-1) for h in (h1, h3))
    assert cosine.shape == kl.shape == (2,)
    expected = torch.cosine_similarity(h1, h3, dim=-1).mean().item()
    assert cosine[1].item() == pytest.approx(expected, abs=1e-6)
    assert kl[1].item() == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    for one, both in zip(layer_similarity(model, IDS, LEFT, LEFT, 1, batch=1), (cosine, kl)):
        torch.testing.assert_close(one, both)
    none = internals.policy_kl(h1, h1, unembedding(model), chunk_tokens=2)
    assert none.item() == pytest.approx(0, abs=1e-7)
    assert len(layer_similarity(model, IDS, LEFT, LEFT, 3)[0]) == 0


def test_divergence_with_weights_in_low_precision():
    """--split-master and the like: products in bfloat16, and nothing else."""
    torch.manual_seed(5)
    weight, states = torch.randn(20_000, 32) * 0.2, torch.randn(50, 32)
    others = states + 0.01 * torch.randn(50, 32)
    low = weight.bfloat16()
    found = internals.policy_kl(states, others, low)
    p, q = ((x.bfloat16().double() @ low.double().T).log_softmax(-1) for x in (states, others))
    exact = (p.exp() * (p - q)).sum(-1).mean()
    assert found.item() == pytest.approx(exact.item(), rel=0.3)


def test_perplexity_is_that_of_the_labels():
    model = random_model().eval()
    labels = torch.where(LEFT.bool(), IDS, -100)
    labels[0, 4] = -100  # predicted from padding: has no real predecessor
    response = (labels != -100).long()
    with torch.no_grad():
        loss = model(IDS, attention_mask=LEFT, position_ids=position_ids(LEFT), labels=labels).loss
    ours = internals.perplexity(model, IDS, LEFT, response)
    assert ours == pytest.approx(math.exp(loss.item()), rel=1e-4)
    assert internals.perplexity(model, IDS, LEFT, response, batch=1) == pytest.approx(ours)


# ---------------------------------------------------------------------------------------- bad input


def test_layers_outside_the_model_and_no_response():
    for layer in (0, 4, -1):
        with pytest.raises(ValueError, match=f"layer {layer}: this model has the layers 1 to 3"):
            layer_hidden(random_model(), IDS, LEFT, layer)
    with pytest.raises(ValueError, match="at least one response token"):
        internal_entropy(random_model(), IDS, LEFT, torch.zeros_like(LEFT))


def test_architectures_without_such_blocks():
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50)
    with pytest.raises(ValueError, match="GPT2LMHeadModel: no 'layers'"):
        residual_stream(transformers.GPT2LMHeadModel(config), IDS, LEFT)
    sizes = dict(hidden_size=16, intermediate_size=32, vocab_size=50)
    config = transformers.GPTNeoXConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM"):
        residual_stream(transformers.GPTNeoXForCausalLM(config), IDS, LEFT)


def test_blocks_that_are_not_pre_norm_residual():
    layers = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    sizes = dict(hidden_size=16, intermediate_size=32, vocab_size=50)
    config = transformers.GraniteConfig(**layers, **sizes, residual_multiplier=0.3)
    granite = transformers.GraniteForCausalLM(config)
    with torch.no_grad():
        for p in granite.parameters():
            p.mul_(5)
    with pytest.raises(ValueError, match=r"H\^1 is not H\^0 \+ A\^1 \+ F\^1"):
        residual_stream(granite, IDS, LEFT)


def test_command_line(tmp_path, tiny_folder, capsys, monkeypatch):
    def record(out, *options):
        model = ["--model", str(tiny_folder), "--out", str(tmp_path / out)]
        internal_report.main([*model, *map(str, options)])
        said = (tmp_path / out / "internals.json").read_text(encoding="utf-8")
        return json.loads(said)[str(tiny_folder)]

    found = record("a", "--samples", 4, "--max-new-tokens", 8)
    layers = len(found["feed_forward_change"])
    assert found["answers"] == 4 and len(found["layer"]) == layers + 1
    assert found["boundary_layer"] == boundary_layer(found["feed_forward_change"])
    assert f"boundary layer: {found['boundary_layer']} of {layers}" in capsys.readouterr().out
    question = "Use 1, 2, 3 once each with + - * / to make 6. Reply with the expression only."
    answers, line = tmp_path / "answers.jsonl", {"question": question, "answer": "1+2+3"}
    answers.write_text(json.dumps(line) + "\n", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "scripts.internal_figures", None)  # without matplotlib
    assert record("b", "--answers", answers, "--compare", tiny_folder)["tokens"] == 6
    assert "for the two figures: pip install matplotlib" in capsys.readouterr().out
    with pytest.raises(UserError, match="--answers .*nowhere: no such file"):
        record("c", "--answers", "nowhere")


def test_the_responses_of_a_run_are_finished_answers():
    for name in ("response", "answer"):
        line = json.dumps({"question": "1 + 1?", name: "2"}).encode()
        assert internal_report.question_and_answer(line, "line 1") == ("1 + 1?", "2")
    with pytest.raises(UserError, match="line 1: needs a JSON object with question and answer"):
        internal_report.question_and_answer(b'{"question": "1 + 1?"}', "line 1")
