"""What conftests and installed packages add: their models, optimizations and workloads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from pytest_inferencepio.models import CustomModel, Model, catalog_models
from pytest_inferencepio.naming import unknown


@dataclasses.dataclass(frozen=True)
class Extensions:
    """The models of this run, and who is asked about workloads."""

    config: pytest.Config
    models: Sequence[Model]

    def workloads(self, scales: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Scale -> fields of the measuring budget that hooks replace (UsageError for an unknown or impossible one)."""
        return {scale: self._workload(scale) for scale in scales}

    def _workload(self, scale: str) -> dict[str, Any]:
        from pytest_inferencepio.measure.budget import Budget, budget_for

        known = [field.name for field in dataclasses.fields(Budget)]
        found: dict[str, Any] = {}
        for answer in self.config.hook.pytest_pio_workloads(config=self.config, scale=scale):
            for name in answer or {}:
                if name not in known:
                    raise pytest.UsageError(f"pytest_pio_workloads: {unknown('field', name, known)}")
            found |= answer or {}
        try:
            budget_for(scale).changed(found)
        except (TypeError, ValueError) as error:
            raise pytest.UsageError(f"pytest_pio_workloads: {error}") from error
        return found


def collect(config: pytest.Config) -> Extensions:
    """Ask the hooks; optimizations are registered until the configuration ends.

    Raises:
        pytest.UsageError: two models or two optimizations share a name, or a hook returned something else.
    """
    models: list[Model] = catalog_models()
    for added in _flat(config.hook.pytest_pio_models(config=config)):
        _check_model(added, models)
        models.append(added)
    for technique in _flat(config.hook.pytest_pio_optimizations(config=config)):
        _register(config, technique)
    return Extensions(config, models)


def _flat(answers: Iterable[Any]) -> list[Any]:
    """Hook results, first conftest first; each is an iterable or None."""
    return [item for answer in reversed(list(answers)) for item in answer or ()]


def _check_model(added: Any, models: Sequence[Model]) -> None:
    if not isinstance(added, CustomModel):
        raise pytest.UsageError(
            f"pytest_pio_models returned {added!r}; it returns pytest_inferencepio.models.CustomModel objects"
        )
    for name in (added.name, *added.entry.aliases):
        if any(model.answers_to(name) for model in models):
            raise pytest.UsageError(
                f"pytest_pio_models: a model called {name!r} exists already; rename yours"
            )


def _register(config: pytest.Config, technique: Any) -> None:
    from optimizations.contract import Optimization
    from optimizations.errors import OptimizationError
    from optimizations.registry import register, techniques, unregister

    if not (isinstance(technique, type) and issubclass(technique, Optimization)):
        raise pytest.UsageError(
            f"pytest_pio_optimizations returned {technique!r}; it returns subclasses of "
            "optimizations.contract.Optimization"
        )
    if techniques().get(technique.name) is technique:
        return
    try:
        register(technique)
    except OptimizationError as error:
        raise pytest.UsageError(f"pytest_pio_optimizations: {error}") from error
    config.add_cleanup(lambda: unregister(technique.name))
