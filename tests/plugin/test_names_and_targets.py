"""Lists and names a user writes, and the targets an optimization is judged by."""

from __future__ import annotations

import pytest

from pytest_inferencepio.errors import UnknownName
from pytest_inferencepio.naming import pick, split_list
from pytest_inferencepio.record import metric, not_measured
from pytest_inferencepio.targets import Targets, parse_targets


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("a,b", ["a", "b"]),
        (" a , ,b,", ["a", "b"]),
        ("a(x=1,y=2)+b(z=3),c", ["a(x=1,y=2)+b(z=3)", "c"]),
        ("", []),
        ("a(x=1,y=2", ["a(x=1,y=2"]),
    ],
)
def test_lists_split_outside_parentheses(text: str, items: list[str]) -> None:
    assert split_list(text) == items


def test_pick_keeps_the_known_order() -> None:
    assert pick(["c", "a"], "abc", "letter") == ("a", "c")
    assert pick([], "abc", "letter") == pick(["all"], "abc", "letter") == ("a", "b", "c")
    with pytest.raises(UnknownName, match="unknown letter 'd'; known: a, b, c"):
        pick(["d"], "abc", "letter")


@pytest.mark.parametrize(
    ("speedup", "memory", "perplexity", "verdict"),
    [
        (1.2, 1.0, 1.0, "targets met"),
        (1.0, 0.85, 1.01, "targets met"),
        (1.19, 0.86, 1.0, "targets not met"),
        (2.0, 0.5, 1.02, "targets not met"),
        (2.0, None, 1.0, "targets met"),
        (None, None, 1.0, "targets not judged"),
        (2.0, 0.5, None, "targets not judged"),
    ],
)
def test_targets_need_speed_or_memory_at_the_same_accuracy(
    speedup: float | None, memory: float | None, perplexity: float | None, verdict: str
) -> None:
    names = ("speedup", "memory_ratio", "perplexity_ratio")
    measured = [
        not_measured(name, "no reason") if value is None else metric(name, value)
        for name, value in zip(names, (speedup, memory, perplexity), strict=True)
    ]
    assert Targets().judged(*measured).split(":")[0] == verdict


def test_targets_say_what_was_wanted_and_found() -> None:
    told = Targets().judged(metric("speedup", 1.5), None, metric("perplexity_ratio", 1.001))
    assert "speed 1.5x (wanted >= 1.2x); memory not measured (wanted <= 0.85x)" in told


def test_targets_are_settable() -> None:
    assert parse_targets(["speedup=1.5", "accuracy_loss = 0.02"]) == Targets(1.5, 0.15, 0.02)
    with pytest.raises(ValueError, match="unknown target 'speed'; did you mean speedup"):
        parse_targets(["speed=2"])
    with pytest.raises(ValueError, match="target speedup needs a number, got 'fast'"):
        parse_targets(["speedup=fast"])
