"""docs/exercises.md, 3: the mean h of right and of wrong answers."""

import pytest
from one_step import first_step

from run import report


def test_both_means(tmp_path):
    step, run = first_step(tmp_path, with_run=True)
    metrics = report.step_metrics(step, report.weight_sample(run), run)
    h, mask, right = step.batch.h, step.batch.rollout.mask, step.batch.right
    assert right.any() and not right.all()
    for name, rows in (("h_right", right), ("h_wrong", ~right)):
        assert metrics[name] == pytest.approx(h[rows][mask[rows]].mean().item(), abs=1e-6)


def test_other_algorithms_have_no_h(tmp_path):
    step, run = first_step(tmp_path, "--algo", "grpo", with_run=True)
    assert "h_right" not in report.step_metrics(step, report.weight_sample(run), run)


def test_a_panel():
    curves = pytest.importorskip("scripts.curves")
    assert len(curves.PANELS) >= 6
