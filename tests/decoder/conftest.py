"""Models, instruction sets and threads of the native decoder's tests, and when logits agree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from kernel_fixtures import isa, threads
from tiny_models import family, prompts, tiny
from torch import Tensor

__all__ = ["family", "isa", "prompts", "threads", "tiny"]


def assert_near(got: Tensor, wanted: Tensor, inputs: dict[str, Tensor], bound: float = 1e-4) -> None:
    """Logits of real tokens agree within `bound` of the largest."""
    real = inputs["attention_mask"].bool()[:, -got.shape[1] :]
    error = (got.float() - wanted.float())[real].abs().max().item()
    assert error <= bound * wanted[real].abs().max().item()


@pytest.fixture(name="assert_near")
def assert_near_fixture() -> Callable[..., None]:
    return assert_near
