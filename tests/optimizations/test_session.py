"""A composition is applied in order, undone in reverse, and undone when a part of it fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import pytest

from optimizations.contract import ROUNDING_BUDGET, Fidelity, Kind, Optimization, Target, Undo
from optimizations.errors import Refusal
from optimizations.runner import Runner
from optimizations.session import apply_all, optimize

log: list[str] = []


@dataclasses.dataclass(frozen=True)
class Step(Optimization):
    """Notes when it is applied and undone. Source: none."""

    name: ClassVar[str] = "step"
    kind: ClassVar[Kind] = Kind.CACHE
    fidelity: ClassVar[Fidelity] = Fidelity.BITWISE
    summary: ClassVar[str] = "notes"
    source: ClassVar[str] = "tests"
    budget: ClassVar = ROUNDING_BUDGET
    refuse: bool = False
    fail: bool = False

    def refusal(self, target: Target) -> str | None:
        return "it was told to" if self.refuse else None

    def apply(self, runner: Runner) -> Undo:
        if self.fail:
            raise RuntimeError("half way")
        log.append(f"+{self.name}")
        return lambda: log.append(f"-{self.name}")


@dataclasses.dataclass(frozen=True)
class Later(Step):
    name: ClassVar[str] = "later"
    kind: ClassVar[Kind] = Kind.RUNTIME


@pytest.fixture
def runner(tiny_runner: Callable[[str], Runner]) -> Runner:
    log.clear()
    return tiny_runner("qwen3_4b_instruct_2507")


def test_applied_by_kind_and_undone_in_reverse(runner: Runner) -> None:
    with optimize(runner, Later(), Step()) as inside:
        assert [part.name for part in inside.applied] == ["step", "later"]
    assert log == ["+step", "+later", "-later", "-step"]
    assert runner.applied == []


def test_a_refusal_undoes_what_was_applied(runner: Runner) -> None:
    with pytest.raises(Refusal, match="later refuses qwen3: it was told to"):
        apply_all(runner, [Step(), Later(refuse=True)])
    assert log == ["+step", "-step"]
    assert runner.applied == []


def test_a_failure_undoes_what_was_applied(runner: Runner) -> None:
    with pytest.raises(RuntimeError, match="half way"):
        apply_all(runner, [Step(), Later(fail=True)])
    assert log == ["+step", "-step"]


def test_an_exception_inside_the_block_still_undoes(runner: Runner) -> None:
    with pytest.raises(KeyError), optimize(runner, Step()):
        raise KeyError("user")
    assert log == ["+step", "-step"]


def test_a_bare_model_becomes_a_runner(runner: Runner) -> None:
    with optimize(runner.model, Step()) as inside:
        assert inside.model is runner.model
