"""docs/exercises.md, 1: leave-one-out advantages by tokens."""

import torch

import hapo
from run import option_checks


def test_by_hand():
    # rewards 1, 0, 0 with 1, 2, 3 tokens: the others' token means are 0/5, 1/4, 1/3
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    advantages = hapo.token_leave_one_out(torch.tensor([1.0, 0.0, 0.0]), mask, 3)
    expected = torch.tensor([[1.0, 0, 0], [-1 / 4, -1 / 4, 0], [-1 / 3, -1 / 3, -1 / 3]])
    torch.testing.assert_close(advantages, expected)


def test_equal_rewards_are_exactly_zero():
    mask = torch.ones(7, 3).bool()
    assert (hapo.token_leave_one_out(torch.full((7,), 0.1), mask, 7) == 0).all()


def test_the_switch():
    assert option_checks.parse(["--estimate"], "").leave_one_out is False
    assert option_checks.parse(["--estimate", "--leave-one-out"], "").leave_one_out is True


def test_a_step_uses_it(tmp_path):
    from one_step import first_step

    batch = first_step(tmp_path, "--leave-one-out").batch
    expected = hapo.token_leave_one_out(batch.rewards, batch.loss_mask, 4)
    torch.testing.assert_close(batch.advantages, expected)
