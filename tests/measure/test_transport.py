"""Techniques of other packages reach a fresh process by file; those of this package need nothing."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from optimizations.registry import parse, techniques, unregister
from pytest_inferencepio.errors import NotMeasurable
from pytest_inferencepio.measure.processes import FreshProcesses
from pytest_inferencepio.measure.transport import foreign_techniques, register_foreign

SOURCE = '''
from dataclasses import dataclass
from optimizations.contract import BITWISE_BUDGET, Fidelity, Kind, Optimization

@dataclass(frozen=True)
class Idle(Optimization):
    """Changes nothing."""
    name = "idle_somewhere_else"
    kind = Kind.RUNTIME
    fidelity = Fidelity.BITWISE
    summary = "changes nothing"
    source = "none"
    budget = BITWISE_BUDGET
    level: int = 1

    def refusal(self, target):
        return None

    def apply(self, runner):
        return lambda: None
'''


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[ModuleType]:
    """A module beside no package, as a conftest is."""
    path = tmp_path / "somebodys_technique.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("somebodys_technique", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop(module.__name__)
    if "idle_somewhere_else" in techniques():
        unregister("idle_somewhere_else")


def test_shipped_techniques_need_no_transport() -> None:
    assert foreign_techniques(parse("prompt_lookup")) == []


def test_a_technique_is_found_again_by_its_file(elsewhere: ModuleType) -> None:
    listing = foreign_techniques([elsewhere.Idle(level=3)])
    assert listing == [["somebodys_technique", elsewhere.__file__, "Idle"]]
    sys.modules.pop("somebodys_technique")
    register_foreign(listing)
    register_foreign(listing)
    assert parse("idle_somewhere_else(level=3)")[0].spec() == "idle_somewhere_else(level=3)"


def test_a_class_inside_a_function_is_refused_in_words(elsewhere: ModuleType) -> None:
    class Hidden(elsewhere.Idle):  # type: ignore[name-defined, misc]
        name = "hidden"

    with pytest.raises(NotMeasurable, match="hidden is defined inside a function.*at the top of a module"):
        foreign_techniques([Hidden()])


def test_a_fresh_process_runs_it(elsewhere: ModuleType) -> None:
    arguments = {
        "model": "qwen3_4b_instruct_2507",
        "scale": "tiny",
        "optimization": "idle_somewhere_else(level=2)",
        "prompt_tokens": 8,
        "new_tokens": 2,
        "foreign": foreign_techniques([elsewhere.Idle(level=2)]),
    }
    with FreshProcesses() as processes:
        report = processes.run("pytest_inferencepio.measure.fresh:generation", arguments)
    assert report.result["resident"] > 0
