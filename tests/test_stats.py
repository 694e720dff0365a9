"""Estimates and exact tests: properties on random input, known values, simulated coverage."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_inferencepio import stats

values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)
positive = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40)


@settings(deadline=None)
@given(values)
def test_median_is_the_standard_librarys(samples: list[float]) -> None:
    assert stats.median(samples) == pytest.approx(statistics.median(samples), abs=1e-9)


@settings(deadline=None)
@given(values, st.floats(0, 1))
def test_quantiles_lie_between_the_extremes_and_rise(samples: list[float], q: float) -> None:
    value = stats.quantile(samples, q)
    assert min(samples) <= value <= max(samples)
    assert stats.quantile(samples, q / 2) <= value


@settings(deadline=None)
@given(values, st.floats(0.5, 0.999))
def test_an_interval_holds_its_value_and_never_claims_more_than_it_covers(
    samples: list[float], confidence: float
) -> None:
    estimate = stats.median_estimate(samples, confidence)
    assert min(samples) <= estimate.low <= estimate.value <= estimate.high <= max(samples)
    assert estimate.n == len(samples)
    if estimate.confidence < confidence - 1e-12:  # too few samples: all that can be said is the range
        assert (estimate.low, estimate.high) == (min(samples), max(samples))


@settings(deadline=None)
@given(values, st.floats(0.1, 10), st.floats(-100, 100))
def test_the_interval_moves_with_the_samples(samples: list[float], factor: float, shift: float) -> None:
    moved = stats.median_estimate([factor * sample + shift for sample in samples])
    estimate = stats.median_estimate(samples)
    assert moved.low == pytest.approx(factor * estimate.low + shift, abs=1e-6)
    assert moved.high == pytest.approx(factor * estimate.high + shift, abs=1e-6)


def test_known_ranks_of_the_median_interval() -> None:
    """n = 20 at 95 %: x(6) to x(15), covering 95.86 % (David & Nagaraja, table of confidence)."""
    estimate = stats.median_estimate(list(range(1, 21)))
    assert (estimate.low, estimate.high) == (6, 15)
    assert estimate.confidence == pytest.approx(0.9586, abs=1e-4)


def test_one_sample_has_an_interval_without_confidence() -> None:
    assert stats.median_estimate([3.0]) == stats.Estimate(3.0, 3.0, 3.0, 1, 0.0)


def test_thousands_of_samples_do_not_overflow() -> None:
    estimate = stats.median_estimate([float(i) for i in range(5000)])
    assert 2425 < estimate.low < 2440 and 2560 < estimate.high < 2575


def test_the_logarithmic_binomial_continues_the_exact_one() -> None:
    assert stats.binomial_cdf(480, 1001) == pytest.approx(stats.binomial_cdf(480, 1000), rel=0.1)
    assert stats.binomial_cdf(500, 1001) == pytest.approx(0.5, abs=1e-9)


def test_simulated_coverage_is_what_is_claimed() -> None:
    """2,000 skewed series of 15: the claim is an exact 96.5 %, four standard errors are 1.7 %."""
    rng = random.Random(5)
    true_median = math.exp(1.0)
    held = bounded = 0
    for _ in range(2000):
        samples = [math.exp(rng.gauss(1.0, 0.8)) for _ in range(15)]
        estimate = stats.median_estimate(samples)
        held += estimate.low <= true_median <= estimate.high
        bounded += stats.median_lower_bound(samples) <= true_median
    assert held / 2000 == pytest.approx(estimate.confidence, abs=0.017)
    assert bounded / 2000 == pytest.approx(1 - stats.binomial_cdf(3, 15), abs=0.017)


def test_a_bound_needs_five_samples_at_95_percent() -> None:
    assert stats.median_lower_bound([1, 2, 3, 4]) == -math.inf
    assert stats.median_lower_bound([1, 2, 3, 4, 5]) == 1
    assert stats.median_upper_bound([1, 2, 3, 4, 5]) == 5


@settings(deadline=None)
@given(values)
def test_bounds_lie_on_their_side_of_the_median(samples: list[float]) -> None:
    assert stats.median_lower_bound(samples) <= stats.median(samples) <= stats.median_upper_bound(samples)


@settings(deadline=None)
@given(positive, st.floats(0.1, 10))
def test_the_ratio_of_pairs_is_the_common_factor(before: list[float], factor: float) -> None:
    after = [factor * value for value in before]
    estimate = stats.ratio_estimate(stats.log_ratios(before, after))
    assert estimate.value == pytest.approx(factor)
    assert stats.speedup_estimate(before, after).value == pytest.approx(1 / factor)


def test_pairs_remove_drift_that_both_sides_share() -> None:
    drift = [1.0, 5.0, 2.0, 9.0, 3.0, 7.0]
    estimate = stats.speedup_estimate([2 * d for d in drift], drift)
    assert estimate.low == pytest.approx(2) and estimate.high == pytest.approx(2)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([1.0], [1.0, 2.0], "as many values before as after, got 1 and 2"),
        ([0.0], [1.0], "positive finite values, got 0.0"),
        ([1.0], [math.inf], "positive finite values, got inf"),
    ],
)
def test_pairs_that_are_none_are_refused(before: list[float], after: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stats.log_ratios(before, after)


def test_scaling_and_inverting_keep_the_interval_in_order() -> None:
    estimate = stats.Estimate(0.5, 0.25, 1.0, 9, 0.95)
    assert estimate.inverted(10.0) == stats.Estimate(20.0, 10.0, 40.0, 9, 0.95)
    assert estimate.scaled(2.0) == stats.Estimate(1.0, 0.5, 2.0, 9, 0.95)
    with pytest.raises(ValueError, match="only a positive quantity"):
        stats.Estimate(0.5, 0.0, 1.0, 9, 0.95).inverted()
    with pytest.raises(ValueError, match="factor must be positive"):
        estimate.scaled(0.0)


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(0, 50))
def test_wilson_stays_within_proportions(a: int, b: int) -> None:
    successes, n = min(a, b), max(a, b)
    estimate = stats.wilson(successes, n)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1


def test_wilson_known_value() -> None:
    """Agresti & Coull 1998: 0 of 10 gives [0, 0.2775]."""
    estimate = stats.wilson(0, 10)
    assert (estimate.low, estimate.high) == (0.0, pytest.approx(0.2775, abs=1e-4))


def test_mcnemar_known_values_and_direction() -> None:
    assert stats.mcnemar(5, 0) == pytest.approx(1 / 32)
    assert stats.mcnemar(0, 5) == 1.0
    assert stats.mcnemar(0, 0) == 1.0
    assert stats.mcnemar(8, 2) == pytest.approx(56 / 1024)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=8))
def test_holm_adjusts_upwards_and_keeps_the_order(p_values: dict[str, float]) -> None:
    adjusted = stats.holm(p_values)
    assert adjusted.keys() == p_values.keys()
    for name, p in p_values.items():
        assert p <= adjusted[name] <= 1
        for other, q in p_values.items():
            assert p > q or adjusted[name] <= adjusted[other]


def test_holm_known_value() -> None:
    assert stats.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == {
        "a": pytest.approx(0.03),
        "c": pytest.approx(0.06),
        "b": pytest.approx(0.06),
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.median([]), "there are no samples"),
        (lambda: stats.median([math.nan]), "a sample is NaN"),
        (lambda: stats.quantile([1.0], 1.5), r"q must be in \[0, 1\]"),
        (lambda: stats.median_estimate([1.0], 1.0), r"confidence must be within \(0, 1\)"),
        (lambda: stats.wilson(3, 2), r"successes must be within \[0, 2\], got 3"),
        (lambda: stats.mcnemar(-1, 0), "counts cannot be negative"),
        (lambda: stats.holm({"a": 2.0}), "p-value of a must be within"),
    ],
)
def test_wrong_input_is_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
