"""Hooks for a user's own models, optimizations and workloads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from optimizations.contract import Optimization
    from pytest_inferencepio.models import CustomModel


@pytest.hookspec
def pytest_pio_models(config: pytest.Config) -> Iterable[CustomModel]:  # type: ignore[empty-body]
    """Models of this repository, beside the catalog's; `--pio-model` takes their names.

    ```python
    def pytest_pio_models():
        return [CustomModel("my_model", make_config=my_config, make_runner=my_runner)]
    ```
    """


@pytest.hookspec
def pytest_pio_optimizations(config: pytest.Config) -> Iterable[type[Optimization]]:  # type: ignore[empty-body]
    """Optimizations of this repository; `--pio-optimization` takes their names, `all` includes them.

    Packages that are installed may use the entry point group `pytest_inferencepio.optimizations` instead.
    """


@pytest.hookspec
def pytest_pio_workloads(config: pytest.Config, scale: str) -> Mapping[str, Any]:  # type: ignore[empty-body]
    """Fields of `measure.budget.Budget` to measure with at `scale`, such as `{"prompt_tokens": 512}`.

    Records carry the workload, so a baseline of another workload is not compared with.
    """
