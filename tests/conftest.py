import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def unchanged():
    """unchanged(f, *tensors): call f and hold it to the rule that no function alters its inputs."""

    def check(function, *args, **kwargs):
        before = [a.detach().clone() if torch.is_tensor(a) else a for a in args]
        result = function(*args, **kwargs)
        for old, new in zip(before, args):
            if torch.is_tensor(old):
                assert torch.equal(old, new), f"{function.__name__} changed an input"
        return result

    return check
