"""Specifications are read, unknown names get their near ones, pairs refuse by name."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizations.contract import ROUNDING_BUDGET, Fidelity, Kind, Optimization, Target, Undo
from optimizations.errors import (
    IncompatibleOptimizations,
    InvalidSpec,
    OptimizationError,
    UnknownOptimization,
)
from optimizations.registry import compose, lookup, parse, register, spec_of, techniques, unregister
from optimizations.runner import Runner


@dataclasses.dataclass(frozen=True)
class Widget(Optimization):
    """A technique for these tests. Source: none."""

    name: ClassVar[str] = "widget"
    kind: ClassVar[Kind] = Kind.RUNTIME
    fidelity: ClassVar[Fidelity] = Fidelity.BITWISE
    summary: ClassVar[str] = "nothing but settings"
    source: ClassVar[str] = "tests"
    budget: ClassVar = ROUNDING_BUDGET
    conflicts: ClassVar[dict[str, str]] = {"prompt_lookup": "both want the last word"}

    size: int = 4
    mode: str = "plain"
    fast: bool = False

    def refusal(self, target: Target) -> str | None:
        return None

    def apply(self, runner: Runner) -> Undo:
        return lambda: None


@pytest.fixture(autouse=True)
def widget() -> object:
    register(Widget)
    yield
    unregister("widget")


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("widget", Widget()),
        (" widget ( size = 8 ) ", Widget(size=8)),
        ("widget(size=8,mode=wide,fast=true)", Widget(8, "wide", True)),
        ("widget(mode='a+b')", Widget(mode="a+b")),
    ],
)
def test_reads(spec: str, wanted: Widget) -> None:
    assert parse(spec) == [wanted]
    assert parse(wanted.spec()) == [wanted]


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("wigdet", UnknownOptimization, "unknown optimization 'wigdet'; did you mean widget"),
        ("widget(", InvalidSpec, "unbalanced parentheses"),
        ("widget(3)", InvalidSpec, "write name\\(key=value"),
        ("widget(size=)", InvalidSpec, "write name\\(key=value"),
        ("widget(colour=3)", InvalidSpec, "has no setting 'colour'; it has: fast, mode, size"),
        ("", InvalidSpec, "cannot read ''"),
        ("widget+widget", IncompatibleOptimizations, "named twice"),
        ("widget+prompt_lookup", IncompatibleOptimizations, "both want the last word"),
    ],
)
def test_says_what_is_wrong(spec: str, error: type[OptimizationError], message: str) -> None:
    with pytest.raises(error, match=message):
        parse(spec)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse(text)
    except OptimizationError as error:
        assert str(error)


def test_order_of_composition_is_by_kind() -> None:
    names = [part.name for part in parse("widget+kv_int8+weight_int8")]
    assert names == ["weight_int8", "kv_int8", "widget"]
    assert spec_of(compose([])) == "none"


def test_two_techniques_of_one_name_are_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Other(Widget):
        pass

    with pytest.raises(InvalidSpec, match="two optimizations are named 'widget'"):
        register(Other)
    assert lookup("widget") is Widget


def test_listing_is_in_order_of_composition() -> None:
    orders = [technique.kind.order for technique in techniques().values()]
    assert orders == sorted(orders)
