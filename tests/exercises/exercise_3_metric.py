"""docs/exercises.md, 3: the mean h of right and of wrong answers."""

import pytest
from one_step import first_step

from run import report


def test_both_means(tmp_path):
    step, run = first_step(tmp_path, with_run=True)
    metrics = report.step_metrics(step, report.weight_sample(run), run)
    h, mask, right = step.batch.h, step.batch.rollout.mask, step.batch.correct
    assert right.any() and not right.all()
    for name, rows in (("h_right", right), ("h_wrong", ~right)):
        assert metrics[name] == pytest.approx(h[rows][mask[rows]].mean().item(), abs=1e-6)


def test_other_algorithms_have_no_h(tmp_path):
    step, run = first_step(tmp_path, "--algo", "grpo", with_run=True)
    assert "h_right" not in report.step_metrics(step, report.weight_sample(run), run)


def drawn(rows):
    """The y values of every line that some panel draws of these rows."""
    import matplotlib.pyplot as plt

    from scripts import curves

    lines = []
    for _, draw in curves.PANELS:
        figure, panel = plt.subplots()
        draw(panel, rows, [], "run", "black")
        lines += [list(line.get_ydata()) for line in panel.lines]
        plt.close(figure)
    return lines


def test_a_panel_draws_both():
    pytest.importorskip("matplotlib")
    usual = {"phase": "full", "reward": 0.5, "entropy": 0.4, "response_length": 9}
    usual |= {"grad_norm": 1.5, "zero_std_groups": 1, "groups": 4}
    without = [usual | {"step": step} for step in (1, 2)]
    right, wrong = [-0.31, -0.32], [0.21, 0.22]
    rows = [r | {"h_right": a, "h_wrong": b} for r, a, b in zip(without, right, wrong)]
    lines = drawn(rows)
    assert right in lines and wrong in lines
    assert not any(values in drawn(without) for values in (right, wrong))  # and runs without h
