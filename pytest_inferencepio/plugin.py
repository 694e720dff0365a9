"""pytest's side: hooks only.

Without a --pio-* option nothing here imports torch or `optimizations`, and nothing is collected.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_inferencepio import collection, hookspecs, options
from pytest_inferencepio.fixtures import (  # noqa: F401  pytest finds fixtures in a plugin's namespace
    pio_measure,
    pio_model,
    pio_optimization,
    pio_pair,
    pio_reference,
    pio_row,
    pio_run,
    pio_runner,
)
from pytest_inferencepio.parametrize import parametrize


def pytest_addoption(parser: pytest.Parser) -> None:
    options.add_options(parser)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(hookspecs)


def pytest_configure(config: pytest.Config) -> None:
    """Before pytest-benchmark's own (which is last): it would load the stored runs of a swallowed path."""
    if options.mode(config) == "run":
        from pytest_inferencepio import active

        active.start(config)


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    if options.mode(config) != "list":
        return None
    from pytest_inferencepio import listing

    print(listing.of(config))
    return 0


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Dir | None:
    return collection.directory(path, parent)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return collection.module(module_path, parent)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc)
