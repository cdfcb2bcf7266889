"""docs/exercises.md, 4: the form "raw" of the adaptive temperature."""

import torch

from hapo import adaptive_temperature, entropy_stats
from run import option_checks


def test_by_hand():
    entropy = torch.tensor([[0.01, 0.05, 0.2, 0.5, 1.0, 3.0]])
    stats = entropy_stats(entropy, torch.ones(1, 6))  # the pivot is the fifth entropy, 1.0
    heat = adaptive_temperature(entropy, stats, base=0.8, tau=0.1, form="raw")
    torch.testing.assert_close(heat, 0.8 * torch.tensor([[0.901, 0.905, 0.92, 0.95, 1.0, 1.1]]))
    first = adaptive_temperature(entropy, None, base=0.8, tau=0.1, form="raw")
    torch.testing.assert_close(first, torch.full((1, 6), 0.8))


def test_the_option():
    parsed = option_checks.parse(["--estimate", "--temperature-form", "raw"], "")
    assert parsed.temperature_form == "raw"
