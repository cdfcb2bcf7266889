"""Schedules say themselves what they do: console, options and resume ask them."""

import dataclasses

import pytest

import bupo
from common.errors import UserError
from run import option_checks, schedules


def given(*more):
    return option_checks.parse(["--estimate", *more], "")


def test_phases_by_hand():
    o = given("--steps", "6", "--bupo-layer", "2", "--bupo-steps", "2")
    assert [schedules.target_layer(step, o, 2) for step in range(1, 7)] == [2, 2] + [None] * 4
    frozen = dataclasses.replace(o, bupo_baseline="freeze")  # the full policy trains in phase 1
    assert schedules.phase_1_steps(frozen) == [1, 2]
    assert schedules.target_layer(1, frozen, 2) is None
    assert schedules.phase_1_steps(dataclasses.replace(o, bupo_baseline="layer-lr")) == []
    assert schedules.phase_1_steps(given("--steps", "6")) == []


def test_steps_as_text():
    of = schedules.shown_steps
    assert (of([]), of([3]), of([1, 2, 3]), of([5, 10])) == ("none", "3", "1 to 3", "5, 10")
    assert of(list(range(5, 80, 5))) == "5, 10, 15, ... 75"


def every_fifth(step, inter_steps, layer):
    """A changed Eq. 10: the internal policy at every fifth step."""
    return layer if layer is not None and step % 5 == 0 else None


def test_a_changed_schedule_is_announced_and_what_it_ignores_is_refused(monkeypatch):
    o = given("--steps", "20", "--bupo-layer", "2", "--bupo-steps", "4")
    assert schedules.described(o).endswith("BuPO's first phase: steps 1 to 4")
    monkeypatch.setattr(bupo, "target_layer", every_fifth)
    assert schedules.described(o).endswith("BuPO's first phase: steps 5, 10, 15, 20")
    given("--bupo-layer", "2")
    with pytest.raises(UserError, match="--bupo-steps 12: does nothing"):
        given("--bupo-layer", "2", "--bupo-steps", "12")


def test_steps_may_change_on_resume_only_if_the_steps_taken_stay_what_they_were(monkeypatch):
    before, longer = given("--steps", "20"), given("--steps", "40")
    schedules.check_resume(before, longer, 20)
    decay = lambda step, options: 1 - step / (options.steps + 1)
    monkeypatch.setattr(schedules, "learning_rate_factor", decay)
    with pytest.raises(UserError, match="--steps 40: with it, the learning rate of step 1 would"):
        schedules.check_resume(before, longer, 20)
    schedules.check_resume(before, longer, 0)  # nothing was taken yet
    schedules.check_resume(before, before, 20)
    monkeypatch.setattr(schedules, "learning_rate_factor", lambda step, o: step * o.steps != 800)
    schedules.check_resume(before, longer, 19)
    with pytest.raises(UserError, match="--steps 40: with it, the learning rate of step 20 would"):
        schedules.check_resume(before, longer, 20)


def test_the_learning_rate_is_told_by_asking():
    text = schedules.described(given("--steps", "75"))
    assert text == "learning rate 2e-05 at step 1, 0.0002 at step 37, 0.0002 at step 75"
