"""--pio-time-budget: when it is used up no further cell is begun, and that is said."""

from __future__ import annotations

import json

import pytest
from inner_pytest import Project

from pytest_inferencepio.option_values import parse_duration


def test_what_is_left_out_is_skipped_and_reported(project: Project) -> None:
    result = project.measure("--pio-optimization=none", "--pio-time-budget=0.001", "--pio-report=out", "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*not measured: the time budget of 0.001 s was used up after * s"])
    (missing,) = json.loads((project.path / "out" / "coverage.json").read_text())["missing"]
    assert "time budget" in missing["reason"]


def test_what_fits_is_measured(project: Project) -> None:
    project.measure("--pio-optimization=none", "--pio-time-budget=1h").assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("12m", 720), ("1.5h", 5400), (" 2 m ", 120)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-3", "3d", "m"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration; write seconds, or 90s, 12m, 1h"):
        parse_duration(text)


def test_the_option_is_named(project: Project) -> None:
    message = project.refused("--pio-model=small", "--pio-time-budget=soon")
    assert "--pio-time-budget: 'soon' is not a duration" in message
