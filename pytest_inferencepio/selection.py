"""From what the user named to the rows that are measured: model x scale x composition of optimizations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pytest

from optimizations.contract import Optimization, Target
from optimizations.errors import OptimizationError
from optimizations.registry import parse, spec_of, techniques
from pytest_inferencepio.errors import UnknownName
from pytest_inferencepio.models import Model, choose

if TYPE_CHECKING:
    from pytest_inferencepio.options import Settings

Composition = tuple[Optimization, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One model at one scale under one composition; `refusal` says why the composition cannot apply.

    With a category it makes a cell of the matrix.
    """

    model: Model
    scale: str
    parts: Composition
    refusal: str | None = None

    @property
    def spec(self) -> str:
        return spec_of(self.parts)

    @property
    def id(self) -> str:
        """Stable on every machine: names only."""
        return f"{self.model.name}-{self.scale}-{self.spec}"


def choose_models(settings: Settings, known: Sequence[Model]) -> list[Model]:
    """The models of the run (UsageError with the near names)."""
    try:
        return choose(settings.models, known)
    except UnknownName as error:
        raise pytest.UsageError(f"--pio-model: {error}") from error


def resolve_checkpoints(settings: Settings, known: Sequence[Model]) -> Mapping[str, str]:
    """Model name -> checkpoint, aliases resolved (UsageError with the near names)."""
    try:
        return {choose([name], known)[0].name: place for name, place in settings.checkpoints.items()}
    except UnknownName as error:
        raise pytest.UsageError(f"--pio-checkpoint: {error}") from error


def choose_compositions(texts: Sequence[str]) -> list[Composition]:
    """The compositions of the run, each once, `none` first.

    Raises:
        pytest.UsageError: unknown name or setting, a pair that cannot be combined.
    """
    found: dict[str, Composition] = {}
    for text in texts:
        for parts in _expand(text):
            found.setdefault(spec_of(parts), parts)
    return sorted(found.values(), key=bool)


def _expand(text: str) -> list[Composition]:
    if text == "none":
        return [()]
    try:
        if text == "all":
            return [(), *((technique.from_settings({}),) for technique in techniques().values())]
        return [tuple(parse(text))]
    except OptimizationError as error:
        raise pytest.UsageError(f"--pio-optimization: {error}") from error


def rows(settings: Settings, models: Sequence[Model], compositions: Sequence[Composition]) -> list[Row]:
    """Every row, ordered by model, scale, composition, so that one pair of models is alive at a time."""
    return [
        Row(model, scale, parts, refusal(model, scale, parts, settings.device, settings.dtype))
        for model in models
        for scale in settings.scales
        for parts in compositions
    ]


def refusal(model: Model, scale: str, parts: Composition, device: str, dtype: str) -> str | None:
    """Why `parts` cannot be applied to `model`, in words that begin with the technique's name, or None."""
    if scale not in model.scales:
        return f"{model.name} has no {scale} scale; it has: {', '.join(model.scales)}"
    if not parts:
        return None
    target = Target(model.config(scale), device, dtype)
    for part in parts:
        reason = part.refusal(target)
        if reason:
            return f"{part.name} refuses {model.name}: {reason}"
    return None
