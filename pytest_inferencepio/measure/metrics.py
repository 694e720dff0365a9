"""From estimates to the metrics of a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pytest_inferencepio import stats
from pytest_inferencepio.record import Metric, metric

if TYPE_CHECKING:
    from optimizations.runner import Runner


def from_estimate(name: str, estimate: stats.Estimate, samples: Sequence[float] = ()) -> Metric:
    """The metric `name` with the estimate's interval and count."""
    return metric(name, estimate.value, estimate.low, estimate.high, estimate.n, tuple(samples))


def median_metric(name: str, samples: Sequence[float]) -> Metric:
    """Median of `samples` with its interval; the samples stay in the record."""
    return from_estimate(name, stats.median_estimate(samples), samples)


def worst_metric(name: str, samples: Sequence[float]) -> Metric:
    """The 99th percentile, which is the maximum below 100 samples; `n` says how many that is out of."""
    q = 0.99 if len(samples) >= 100 else 1.0
    return from_estimate(name, stats.quantile_estimate(samples, q))


def ratio_metric(name: str, before: Sequence[float], after: Sequence[float]) -> Metric:
    """before / after of paired times, above 1 is faster; `samples` are the ratios pair by pair."""
    ratios = [b / a for b, a in zip(before, after, strict=True)]
    return from_estimate(name, stats.speedup_estimate(before, after), ratios)


def technique_metrics(runner: Runner) -> tuple[dict[str, Metric], list[str]]:
    """What the applied techniques counted themselves, and their remarks; after the work that is to be counted."""
    found = {
        name: metric(name, value) for part in runner.applied for name, value in part.figures(runner).items()
    }
    return found, [f"{part.name}: {text}" for part in runner.applied for text in part.remarks(runner)]
