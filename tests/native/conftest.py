"""Every kernel test runs on every instruction set of the machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from optimizations.native.loader import native


@pytest.fixture(params=native().available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set in use during the test; the best one afterwards."""
    before = native().isa()
    native().set_isa(request.param)
    yield request.param
    native().set_isa(before)


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch's number of threads during the test, which the kernels follow."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def generator() -> torch.Generator:
    """A generator with a fresh seed, which a failing test's output shows."""
    out = torch.Generator()
    print("seed", out.seed())
    return out
