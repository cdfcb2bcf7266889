"""docs/exercises.md, 5: --bupo-layer 1,2 aligns two layers at once."""

import torch
from one_step import first_step


def moved(tmp_path, layers):
    _, run = first_step(
        tmp_path / layers, "--bupo-layer", layers, "--bupo-steps", "1", with_run=True
    )
    fresh = torch.load(tmp_path / layers / "before.pt", weights_only=True)
    return {name: p.detach() - fresh[name] for name, p in run.policy.named_parameters()}


def test_layers_up_to_the_higher_one_move(tmp_path):
    both = moved(tmp_path, "1,2")
    for name, change in both.items():
        upper = name == "model.norm.weight" or name.startswith("model.layers.2.")
        assert (change == 0).all() == upper, name


def test_it_is_neither_of_the_two_alone(tmp_path):
    both, one, two = (moved(tmp_path, layers) for layers in ("1,2", "1", "2"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not both[name].equal(one[name]) and not both[name].equal(two[name])
