"""Fixtures of every folder that runs kernels: on which instruction set, by how many threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from optimizations.native.loader import native


@pytest.fixture(params=native().available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set in use during the test, each of the machine's in turn; the best one afterwards."""
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
