"""Circumstances under which measuring would mislead: each is an error in words before any work."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from pytest_inferencepio.options import Settings

_PACKAGE = Path(__file__).resolve().parent


def check_tools(config: pytest.Config) -> None:
    """pytest-benchmark is there and times, and no other process measures at the same time (UsageError)."""
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError(
            "--pio-model needs pytest-benchmark, which -p no:benchmark switched off: it times the rounds and "
            "stores them; run without -p no:benchmark"
        )
    for option, flag in (
        ("benchmark_disable", "--benchmark-disable"),
        ("benchmark_skip", "--benchmark-skip"),
    ):
        if config.getoption(option) and not (
            option == "benchmark_disable" and config.getoption("benchmark_enable")
        ):
            raise pytest.UsageError(
                f"{flag} and --pio-model contradict each other: nothing would be measured; drop one of them"
            )
    if config.getoption("dist", "no") != "no" or config.getoption("numprocesses", None):
        raise pytest.UsageError(
            "--pio-model cannot run under pytest-xdist: processes that measure at the same time measure each "
            "other; run without -n (and --dist)"
        )


def check_compare(config: pytest.Config) -> None:
    """`--benchmark-compare` takes an optional value and so swallows a path that follows it (UsageError)."""
    value = config.getoption("benchmark_compare")
    if isinstance(value, str) and is_path(value, config.invocation_params.dir):
        raise pytest.UsageError(
            f"--benchmark-compare took {value!r} for the number of a stored run; a path goes before it: "
            f"pytest {value} --benchmark-compare"
        )


def settle_compare(config: pytest.Config) -> None:
    """Spare pytest-benchmark a comparison with nothing: the gate compares with our own baselines.

    Where pytest-benchmark has stored a run its table of old and new times stays; where it has none it would
    warn that it cannot compare, which is an error under `-W error`.
    """
    from pytest_benchmark.utils import get_machine_id, load_storage

    uri = str(config.getoption("benchmark_storage"))
    if config.getoption("benchmark_compare") is not True or uri.startswith("elasticsearch"):
        return
    storage = load_storage(uri, logger=None, default_machine_id=get_machine_id(), netrc=None)
    if not storage.query("[0-9][0-9][0-9][0-9]_"):  # the files pytest-benchmark would load
        config.option.benchmark_compare = []


def check_optimizations() -> None:
    """The package `optimizations` that Python finds is the one of this distribution (UsageError)."""
    spec = importlib.util.find_spec("optimizations")
    places = [] if spec is None else list(spec.submodule_search_locations or [str(spec.origin)])
    ours = _PACKAGE.parent / "optimizations"
    if ours.resolve() in (Path(place).resolve() for place in places):
        return
    found = ", ".join(places) or "nothing"
    raise pytest.UsageError(
        f"another package named `optimizations` shadows the one of pytest-inferencepio: found {found}, "
        f"expected {ours}; rename it, or keep its parent directory off sys.path (`pytest` instead of "
        "`python -m pytest`, --import-mode=importlib)"
    )


def check_device(settings: Settings) -> None:
    """The device that was asked for exists (UsageError)."""
    if settings.device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise pytest.UsageError(
            f"--pio-device={settings.device}: torch {torch.__version__} sees no such device here; use "
            "--pio-device=cpu, or install a torch build with CUDA on a machine with a GPU"
        )


def is_path(value: str, base: Path) -> bool:
    """A test path rather than a run's number, a glob `machine/0001*`, or the file of a stored run."""
    place = base / value
    return (
        value.endswith((".py", "/"))
        or "::" in value
        or place.is_dir()
        or (place.is_file() and place.suffix != ".json")
    )
