"""Bringing the shipped suite into a run: with the same node ids on every machine, installed or not."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SUITE = Path(__file__).resolve().parent / "suite"
NODEID = "pytest_inferencepio/suite"


class SuiteModule(pytest.Module):
    """A module of the suite, imported under its package name.

    pytest's own import modes would put the parent of the package on sys.path, and in a checkout that parent
    holds `kernels/`, a folder named like a package that transformers looks for.
    """

    def _getobj(self) -> ModuleType:
        return importlib.import_module(f"pytest_inferencepio.suite.{self.path.stem}")


class SuiteDirectory(pytest.Collector):
    """The whole suite, hung directly under the session.

    Given to pytest as a path, its parents up to the root of the file system would be collected and their
    conftests loaded.
    """

    def collect(self) -> Iterable[pytest.Module]:
        for path in sorted(SUITE.glob("test_*.py")):
            found = module(path, self)
            assert found is not None
            yield found


def suite(session: pytest.Session) -> SuiteDirectory:
    """The collector of the shipped suite."""
    options: dict[str, Any] = {"name": NODEID, "path": SUITE, "nodeid": NODEID}
    return SuiteDirectory.from_parent(session, **options)


def directory(path: Path, parent: pytest.Collector) -> pytest.Dir | None:
    """A plain directory for the package and its suite: as a package, pytest would import their __init__ by path."""
    if path.name in (SUITE.name, SUITE.parent.name) and path.resolve() in (SUITE, SUITE.parent):
        return pytest.Dir.from_parent(parent, path=path)
    return None


def module(path: Path, parent: pytest.Collector) -> SuiteModule | None:
    """The suite's own collector for one of its modules, None for any other file.

    pytest-benchmark stores and matches by node id, so it names the package, not the place it lies in.
    """
    if path.resolve().parent != SUITE:
        return None
    options: dict[str, Any] = {"path": path, "nodeid": f"{NODEID}/{path.name}"}
    return SuiteModule.from_parent(parent, **options)


def arguments(config: pytest.Config) -> tuple[list[str], bool]:
    """The paths of the command line, and whether the whole suite is run besides.

    Paths that lead into the suite replace it. A node id of the suite, as pytest prints it, is understood in every
    directory. `testpaths` and the working directory count for nothing.
    """
    given = config.args if config.args_source is config.ArgsSource.ARGS else []
    base = config.invocation_params.dir
    placed = [_placed(argument, base) for argument in given]
    return placed, not any(_in_suite(argument, base) for argument in placed)


def _placed(argument: str, base: Path) -> str:
    match = re.match(rf"{NODEID}(?=/|$)", argument)
    exists = (base / argument.split("::")[0]).exists()
    return argument if exists or match is None else f"{SUITE}{argument[match.end() :]}"


def _in_suite(argument: str, base: Path) -> bool:
    place = argument.split("::")[0]
    if place == "pytest_inferencepio.suite" or place.startswith("pytest_inferencepio.suite."):
        return True
    return (base / place).resolve().is_relative_to(SUITE)


def category_of(item: pytest.Item) -> str | None:
    """The category that a test of the suite measures, None for other tests."""
    if not isinstance(item.parent, SuiteModule):
        return None
    return item.parent.path.stem.removeprefix("test_")
