"""Every kernel test runs on every instruction set of the machine."""

from __future__ import annotations

import pytest
import torch
from kernel_fixtures import isa, threads
from wide_forms import wide

__all__ = ["isa", "threads", "wide"]


@pytest.fixture
def generator() -> torch.Generator:
    """A generator with a fresh seed, which a failing test's output shows."""
    out = torch.Generator()
    print("seed", out.seed())
    return out
