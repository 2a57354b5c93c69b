"""What all tests share: a seed, quiet threads, and small networks."""

import pytest
import torch


def pytest_collectstart(collector):
    """Data that a test file makes as it is read is the same in every run and every selection of tests."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    """What a fixture of a whole file makes is the same whichever test asks for it first."""
    if fixturedef.scope != "function":
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)
