"""The random-effects model of sessions: what is noise of one session, what differs between them."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_inferencepio.sessions import (
    PRIOR_BIAS,
    Moments,
    SessionValue,
    bias,
    center,
    interval_variance,
    moments,
    pooled,
    session_value,
)


def drawn(between: float, noises: list[float], ratios: int, seed: int = 0) -> list[list[SessionValue]]:
    """Sessions of `ratios` ratios of 2: a bias of each session and ratio, and the session's own noise."""
    draw = random.Random(seed)
    return [
        [SessionValue(math.log(2) + draw.gauss(0, between) + draw.gauss(0, n), n * n) for n in noises]
        for _ in range(ratios)
    ]


@pytest.mark.parametrize("between", [0.01, 0.03])
@pytest.mark.parametrize("noises", [[0.01] * 5, [0.003, 0.01, 0.01, 0.02, 0.05]], ids=["equal", "unequal"])
def test_the_bias_is_found_under_the_noise(between: float, noises: list[float]) -> None:
    found = pooled(moments(values) for values in drawn(between, noises, ratios=400))
    assert bias(found) == pytest.approx(between, rel=0.1)


def test_noise_alone_is_not_taken_for_a_bias() -> None:
    found = pooled(moments(values) for values in drawn(0.0, [0.02] * 5, ratios=400))
    assert bias(found) < 0.005
    assert bias(found) > 0  # and never believed to be nothing


def test_a_noisy_session_neither_moves_the_centre_nor_widens_the_bias() -> None:
    quiet = [SessionValue(math.log(1.35), 0.01**2), SessionValue(math.log(1.33), 0.01**2)]
    noisy = SessionValue(math.log(1.44), 0.05**2)
    assert center([*quiet, noisy], 0.012).log == pytest.approx(center(quiet, 0.012).log, abs=0.006)
    assert bias(moments([*quiet, noisy])) < 1.1 * PRIOR_BIAS


def test_sessions_that_differ_without_noise_do_widen_the_bias() -> None:
    values = [SessionValue(math.log(1.3), 1e-6), SessionValue(math.log(1.5), 1e-6)]
    assert bias(moments(values)) > 2 * PRIOR_BIAS


def test_equal_values_have_their_mean_and_variance_over_n() -> None:
    values = [SessionValue(x, 0.02**2) for x in (0.1, 0.2, 0.3, 0.4)]
    found = center(values, 0.01)
    assert found.log == pytest.approx(0.25)
    assert found.variance == pytest.approx((0.02**2 + 0.01**2) / 4)


def test_one_session_or_none_says_nothing_and_the_prior_stands() -> None:
    assert moments([]) == moments([SessionValue(0.1, 0.0)]) == Moments()
    assert bias(Moments()) == pytest.approx(PRIOR_BIAS)
    assert bias(Moments(), prior=0.03) == pytest.approx(0.03)


def test_intervals() -> None:
    assert math.sqrt(interval_variance(0.98, 1.02)) == pytest.approx(0.0102, abs=1e-4)
    assert interval_variance(None, 1.0) == interval_variance(1.0, None) == 0.0
    assert interval_variance(0.0, 1.0) == math.inf
    assert session_value(0.0, None, None) is None
    assert session_value(1.0, 0.0, 2.0) == SessionValue(0.0, math.inf)


def test_a_session_of_unbounded_noise_is_left_out() -> None:
    wild = SessionValue(5.0, math.inf)
    steady = [SessionValue(0.1, 1e-4), SessionValue(0.12, 1e-4)]
    assert moments([*steady, wild]) == moments(steady)
    assert center([*steady, wild], 0.01) == center(steady, 0.01)
    with pytest.raises(ValueError, match="no session has a usable interval"):
        center([wild], 0.01)


VALUES = st.lists(
    st.builds(SessionValue, st.floats(-2, 2), st.floats(0, 0.25).map(lambda noise: noise * noise)),
    min_size=1,
    max_size=6,
)


@given(VALUES, st.floats(0.003, 0.3))
def test_the_centre_lies_among_the_sessions_and_more_of_them_narrow_it(
    values: list[SessionValue], between: float
) -> None:
    found = center(values, between)
    logs = [value.log for value in values]
    assert min(logs) - 1e-9 <= found.log <= max(logs) + 1e-9
    assert found.variance <= min(value.variance for value in values) + between**2 + 1e-12


@given(VALUES, VALUES, st.floats(-1, 1))
def test_only_differences_between_sessions_count(
    values: list[SessionValue], others: list[SessionValue], shift: float
) -> None:
    moved = [SessionValue(value.log + shift, value.variance) for value in values]
    together = pooled([moments(moved), moments(others)])
    assert bias(together) == pytest.approx(bias(moments(values) + moments(others)), rel=1e-5)
    assert 0.003 <= bias(together) < 3
