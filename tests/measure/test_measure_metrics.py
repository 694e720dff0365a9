"""Estimates as metrics, and what techniques say about themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import pytest

from optimizations.contract import BITWISE_BUDGET, Fidelity, Kind, Optimization, Target, Undo
from optimizations.runner import Runner
from pytest_inferencepio.errors import RecordError
from pytest_inferencepio.measure import metrics
from pytest_inferencepio.stats import Estimate


@dataclasses.dataclass(frozen=True)
class Counting(Optimization):
    """Says that it recompiled twice."""

    name = "counting"
    kind = Kind.RUNTIME
    fidelity = Fidelity.BITWISE
    summary = "counts"
    source = "none"
    budget = BITWISE_BUDGET
    counted: str = "recompilations"

    def refusal(self, target: Target) -> str | None:
        return None

    def apply(self, runner: Runner) -> Undo:
        return lambda: None

    def figures(self, runner: Runner) -> Mapping[str, float]:
        return {self.counted: 2.0}

    def remarks(self, runner: Runner) -> Sequence[str]:
        return ["twice"]


def test_an_estimate_becomes_a_metric_with_unit_and_samples() -> None:
    found = metrics.from_estimate("time_to_first_token", Estimate(2.0, 1.0, 3.0, 7, 0.98), [2.0])
    assert (found.value, found.low, found.high, found.n) == (2.0, 1.0, 3.0, 7)
    assert (found.unit, found.better, found.samples) == ("s", "lower", (2.0,))


@pytest.mark.parametrize(("count", "worst"), [(99, 98.0), (200, 197.01)])
def test_the_worst_is_the_maximum_until_a_percentile_means_something(count: int, worst: float) -> None:
    found = metrics.worst_metric("time_to_first_token_worst", [float(i) for i in range(count)])
    assert found.value == pytest.approx(worst) and found.n == count


def test_ratios_keep_their_pairs() -> None:
    found = metrics.ratio_metric("speedup", [2.0, 4.0, 6.0], [1.0, 1.0, 2.0])
    assert found.samples == (2.0, 4.0, 3.0) and found.value == pytest.approx(3.0)


def test_techniques_are_asked_what_they_counted(runner: Runner) -> None:
    assert metrics.technique_metrics(runner) == ({}, [])
    runner.applied.append(Counting())
    found, remarks = metrics.technique_metrics(runner)
    assert found["recompilations"].value == 2.0 and remarks == ["counting: twice"]


def test_streaming_says_what_it_read(runner: Runner) -> None:
    from optimizations.registry import parse
    from optimizations.session import apply_all
    from pytest_inferencepio import workloads

    undo = apply_all(runner, parse("layer_streaming"))
    try:
        runner.generate(**workloads.prompt(runner, 4), max_new_tokens=3, do_sample=False)
        _, remarks = metrics.technique_metrics(runner)
    finally:
        undo()
    assert len(remarks) == 1
    assert "MB per pass from disk at " in remarks[0] and "compute waited" in remarks[0]


def test_a_figure_that_no_metric_has_the_name_of_is_refused(runner: Runner) -> None:
    runner.applied.append(Counting(counted="sheep"))
    with pytest.raises(RecordError, match="unknown metric 'sheep'"):
        metrics.technique_metrics(runner)
