"""docs/exercises.md, 5: --bupo-layer 1,2 aligns two layers at once."""

import pytest
import torch
from one_step import first_step


@pytest.fixture
def first_gradient(tmp_path, monkeypatch):
    """first_gradient(layers): {weight: gradient} of the first update, which is applied; and the
    run. The answers are the same whichever layers are aligned."""
    applied = torch.optim.AdamW.step

    def of(layers):
        kept = {}

        def step(self):
            for group in self.param_groups:
                kept.update({p: p.grad.clone() for p in group["params"] if p.grad is not None})
            return applied(self)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        folder = tmp_path / layers
        options = ["--bupo-layer", layers, "--bupo-steps", "1", "--grad-clip", "1e6"]
        _, run = first_step(folder, *options, with_run=True)
        names = {p: name for name, p in run.policy.named_parameters()}
        before = torch.load(folder / "before.pt", weights_only=True)
        return {names[p]: gradient for p, gradient in kept.items()}, run, before

    return of


def test_layers_up_to_the_higher_one_move(first_gradient):
    _, run, before = first_gradient("1,2")
    for name, p in run.policy.named_parameters():
        upper = name == "model.norm.weight" or name.startswith("model.layers.2.")
        assert torch.equal(p, before[name]) == upper, name


def test_the_gradient_is_the_mean_of_both(first_gradient):
    """Not their sum; and not with one layer's old log-probabilities for both, since then the ratios
    of the other are not 1."""
    both, one, two = (first_gradient(layers)[0] for layers in ("1,2", "1", "2"))
    assert both.keys() == two.keys() > one.keys()
    for name, gradient in both.items():
        expected = (one.get(name, 0.0) + two[name]) / 2
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-3)
        assert gradient.abs().max() > 1e-5
