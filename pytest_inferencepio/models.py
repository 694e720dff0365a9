"""One face for the catalog's models and for those a conftest adds. Imports no torch until it loads one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from pytest_inferencepio.catalog.entries import ENTRIES, SCALES, ModelEntry
from pytest_inferencepio.errors import CheckpointError, UnknownName
from pytest_inferencepio.naming import unknown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from optimizations.contract import Optimization
    from optimizations.runner import Runner
    from pytest_inferencepio.catalog.loading import Loaded


@dataclasses.dataclass(frozen=True)
class LoadRequest:
    """What is to be loaded. `optimizations` may be converted while loading (full scale only)."""

    scale: str
    device: str = "cpu"
    dtype: str = "bfloat16"
    seed: int = 0
    checkpoint: str | None = None
    optimizations: tuple[Optimization, ...] = ()


class Model(Protocol):
    """What the plugin asks of a model."""

    @property
    def name(self) -> str: ...

    @property
    def entry(self) -> ModelEntry: ...

    @property
    def scales(self) -> Sequence[str]: ...

    @property
    def in_catalog(self) -> bool:
        """Whether any process can load it by name."""

    def answers_to(self, name: str) -> bool:
        """Whether `name` is this model's name, an alias or its hub id, in any case."""

    def config(self, scale: str) -> PreTrainedConfig:
        """The configuration at `scale`; allocates no weight."""

    def load(self, request: LoadRequest) -> Loaded:
        """A fresh copy of the model, ready to be optimized and driven."""


@dataclasses.dataclass(frozen=True)
class CatalogModel:
    """A model of the shipped catalog."""

    entry: ModelEntry
    scales: Sequence[str] = SCALES
    in_catalog = True

    @property
    def name(self) -> str:
        return self.entry.name

    def answers_to(self, name: str) -> bool:
        names = (self.entry.name, self.entry.published_as, *self.entry.aliases)
        return name.lower() in {known.lower() for known in names}

    def config(self, scale: str) -> PreTrainedConfig:
        if scale == "tiny":
            from pytest_inferencepio.catalog.tiny import tiny_config

            return tiny_config(self.name)
        from pytest_inferencepio.catalog.configs import full_config

        return full_config(self.name)

    def load(self, request: LoadRequest) -> Loaded:
        from pytest_inferencepio.catalog.loading import load

        return load(
            self.entry,
            request.scale,
            device=request.device,
            dtype=request.dtype,
            checkpoint=request.checkpoint,
            optimizations=request.optimizations,
            seed=request.seed,
        )


@dataclasses.dataclass(frozen=True)
class CustomModel:
    """A model of the user's own repository, given by `pytest_pio_models` in a conftest.

    Args:
        name: what `--pio-model` takes and the records carry.
        make_config: scale -> transformers configuration; optimizations read it to accept or refuse.
        make_runner: `LoadRequest` -> a fresh `optimizations.runner.Runner` on every call, same weights for the
            same seed. Make it a function of an importable module if peak memory is to be measured: a fresh
            process imports it by name.
        scales: which of `tiny` and `full` exist.
        multimodal: takes images.
    """

    name: str
    make_config: Callable[[str], PreTrainedConfig]
    make_runner: Callable[[LoadRequest], Runner]
    scales: Sequence[str] = ("tiny",)
    multimodal: bool = False
    in_catalog = False

    @property
    def entry(self) -> ModelEntry:
        """A catalog row without published figures."""
        return ModelEntry(
            name=self.name,
            published_as=self.name,
            architecture="",
            model_type="",
            parameters=0,
            active_parameters=0.0,
            multimodal=self.multimodal,
        )

    def answers_to(self, name: str) -> bool:
        return name.lower() == self.name.lower()

    def config(self, scale: str) -> PreTrainedConfig:
        return self.make_config(scale)

    def load(self, request: LoadRequest) -> Loaded:
        from pytest_inferencepio.catalog.loading import Loaded

        if request.checkpoint is not None:
            raise CheckpointError(
                f"--pio-checkpoint={self.name}=...: {self.name} is not of the catalog, its own code loads it"
            )
        start = time.perf_counter()
        runner = self.make_runner(request)
        return Loaded(runner, self.entry, request.scale, "custom", time.perf_counter() - start)


def catalog_models() -> list[Model]:
    return [CatalogModel(entry) for entry in ENTRIES.values()]


def choose(wanted: Iterable[str], models: Sequence[Model]) -> list[Model]:
    """The models that `wanted` names, `all` for every one, each once, in the order of `models`.

    Raises:
        UnknownName: the near names and all names.
    """
    chosen: set[str] = set()
    for name in wanted:
        found = [model for model in models if name == "all" or model.answers_to(name)]
        if not found:
            offered = [known for model in models for known in (model.name, *model.entry.aliases)]
            hint = unknown("model", name, offered).split("; known:")[0]
            names = ", ".join(model.name for model in models)
            raise UnknownName(f"{hint}; known: {names} (or all)")
        chosen |= {model.name for model in found}
    return [model for model in models if model.name in chosen]
