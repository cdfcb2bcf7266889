"""The page of a model against transformers' own hidden states, and one line for bad input."""

import json
import math
import re

import pytest
import torch
from conftest import TINY

from common.errors import UserError
from run.batch import rollout_of
from scripts import internal_report, model_page

# one sequence: two prompt tokens and three of an answer, all real
IDS, RESPONSE = torch.tensor([[5, 9, 11, 7, 30]]), torch.tensor([[0, 0, 1, 1, 1]])
ANSWER = (IDS, torch.ones_like(IDS), RESPONSE)


def reference(model, ids, layer, norm):
    """Log-probabilities behind tokens 1, 2, 3 from transformers' hidden_states: the last of them
    is normed already, the inner ones are not."""
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        states = out.hidden_states[layer][0, 1:4]
        if norm:
            states = model.base_model.norm(states)
        return (states @ model.get_output_embeddings().weight.T).log_softmax(-1), out.logits[0, 1:4]


def test_every_layer_against_transformers(any_model):
    """Inner layers of three; the last one is the model's own policy with its norm, which is applied
    once, and is not without: a norm that doubles its input tells one from two."""
    any_model.eval()
    with torch.no_grad():
        any_model.base_model.norm.weight.mul_(2)
    cells = model_page.cells_of(any_model, *ANSWER, vocab_size=64)
    for layer, norm in ((1, False), (1, True), (2, False), (2, True), (3, True)):
        logp, own = reference(any_model, IDS, layer, norm and layer < 3)
        for t, target in enumerate((11, 7, 30)):
            cell = cells["layer_norm" if norm else "layer"][layer - 1][t]
            p = logp[t].exp()
            assert cell["probability"] == pytest.approx(p[target].item(), rel=2e-3, abs=1e-7)
            assert cell["rank"] == 1 + int((p > p[target]).sum())
            assert cell["entropy"] == pytest.approx(-(p * logp[t]).sum().item(), rel=2e-3, abs=1e-6)
            kl = (p * (logp[t] - own[t].log_softmax(-1))).sum().item()
            assert cell["kl"] == pytest.approx(kl, rel=2e-3, abs=1e-5)
            assert cell["top"][0][0] == int(p.argmax()) and len(cell["top"]) == 5
            assert cell["top"][0][1] == pytest.approx(p.max().item(), rel=1e-3)
            assert layer < 3 or (abs(kl) < 1e-5 < 1e-3 < cells["layer"][-1][t]["kl"])
    # ids that only pad the vocabulary are no candidates
    cells = model_page.cells_of(any_model, *ANSWER, vocab_size=40)
    assert all(i < 40 for cell in cells["layer"][0] for i, _ in cell["top"])
    assert cells["layer"][0][0]["entropy"] <= math.log(40) + 1e-3


def test_the_page_of_the_shipped_model(tmp_path, capsys):
    arguments = ["--model", TINY, "--samples", "6", "--out", tmp_path]
    internal_report.main([str(x) for x in arguments])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "page.html in a browser" in capsys.readouterr().out and len(text) < 3e6
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    data = json.loads(found.group(1))
    record = json.loads((tmp_path / "internals.json").read_text(encoding="utf-8"))[str(TINY)]
    model = data["models"][0]
    assert model["boundary_layer"] == record["boundary_layer"]
    assert 1 < model["boundary_layer"] < 6  # strictly inside, so that phase 1 has something to save
    assert len(data["chosen"]) == len(data["questions"]) == len(model["cells"]) == 4
    # the question alone, without the template's marks
    assert all(re.fullmatch(r"What is \d+ \+ \d+\?", q) for q in data["questions"])
    for ids, policies in zip(data["chosen"], model["cells"]):
        assert set(policies) == {k + n for k in model_page.KINDS for n in ("", "_norm")}
        assert all(len(layers) == 6 for layers in policies.values())
        assert all(len(row) == len(ids) for layers in policies.values() for row in layers)
    shown = {str(i) for ids in data["chosen"] for i in ids}
    assert shown <= data["texts"].keys()


def test_a_page_has_room_for_few_tokens_of_a_deep_model():
    rollout = rollout_of([[1]] * 9, [[2] * 30] * 9)
    shown = model_page.shown_answers(rollout, layers=30, models=1)
    assert sum(n for _, n in shown) * 30 * 6 <= model_page.MOST_CELLS and shown[0] == (0, 30)
    assert model_page.shown_answers(rollout, layers=6, models=1) == [(i, 30) for i in range(4)]


def test_empty_answers_are_one_line(tmp_path, monkeypatch):
    empty = rollout_of([[1]], [[2]])
    empty.mask[:] = False
    monkeypatch.setattr(internal_report, "answers_for", lambda *args: (["q"], empty))
    with pytest.raises(UserError, match="its answers are empty"):
        internal_report.main(["--model", str(TINY), "--out", str(tmp_path)])
