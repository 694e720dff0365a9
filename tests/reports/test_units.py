"""Numbers as people read them: SI prefixes, and never a zero that is not one."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_inferencepio import units

FINITE = st.floats(min_value=-1e300, max_value=1e300)
POSITIVE = st.floats(min_value=1e-11, max_value=1e15)
PREFIX = {
    "p": 1e-12,
    "n": 1e-9,
    "µ": 1e-6,
    "m": 1e-3,
    "": 1,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "P": 1e15,
}


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123, "s", "12.3 ms"),
        (0.00521, "s", "5.21 ms"),
        (1.0, "s", "1.00 s"),
        (123.4, "s", "123 s"),
        (3.2e-7, "s", "320 ns"),
        (0.0, "s", "0 s"),
        (412e6, "B", "412 MB"),
        (999_960.0, "B", "1.00 MB"),
        (999.6, "B", "1.00 kB"),
        (512.0, "B", "512 B"),
        (0.5, "B", "0.500 B"),
        (4_096.0, "B", "4.10 kB"),
        (22e9, "B/s", "22.0 GB/s"),
        (81.24, "1/s", "81.2/s"),
        (12_345.0, "1/s", "12.3k/s"),
        (0.25, "1/s", "0.250/s"),
        (1.5e-3, "J", "1.50 mJ"),
        (0.0021, "nat", "0.00210 nat"),
        (9.1234, "1", "9.12"),
        (-0.00005, "s", "-50.0 µs"),
        (None, "s", "not measured"),
    ],
)
def test_quantities(value: float | None, unit: str, text: str) -> None:
    assert units.quantity(value, unit) == text


@pytest.mark.parametrize(
    ("before", "after", "unit", "text"),
    [
        (0.0123, 0.00521, "s", "12.3 ms → 5.21 ms"),
        (12.3457, 12.4, "1", "12.35 → 12.40"),
        (9.12, 9.1234, "1", "9.1200 → 9.1234"),
        (1000.0, 1001.0, "B", "1.000 kB → 1.001 kB"),
        (2.0, 2.0, "1", "2.00 → 2.00"),
        (None, 2.0, "1", "not measured → 2.00"),
    ],
)
def test_a_change_shows_its_difference(before: float | None, after: float, unit: str, text: str) -> None:
    assert units.change(before, after, unit) == text


@pytest.mark.parametrize(
    ("fraction", "text"), [(0.1, "+10 %"), (-0.49, "-49 %"), (0.00031, "+0.031 %"), (0.0, "+0 %")]
)
def test_percents(fraction: float, text: str) -> None:
    assert units.percent(fraction) == text


def test_ratios_and_intervals() -> None:
    assert units.times(2.3149) == "2.31x"
    assert units.times(None) == "not measured"
    assert units.interval(0.01, 0.02, "s") == "[10.0 ms, 20.0 ms]"
    assert units.interval(None, 1.0) == ""
    assert units.relative(2.0, 1.0) == "-50 %"
    assert units.relative(0.0, 1.0) == "was 0"
    assert units.share(0.066) == "6.6 %"


@settings(deadline=None)
@given(value=FINITE)
def test_significant_digits_keep_the_value(value: float) -> None:
    text = units.significant(value, 4)
    assert float(text) == pytest.approx(value, rel=5.001e-4)
    assert (float(text) == 0) == (value == 0)


@settings(deadline=None)
@given(value=POSITIVE, unit=st.sampled_from(["s", "J"]))
def test_a_quantity_reads_back_as_itself(value: float, unit: str) -> None:
    match = re.fullmatch(rf"([\d.]+) (\D?){unit}", units.quantity(value, unit))
    assert match is not None
    assert float(match[1]) * PREFIX[match[2]] == pytest.approx(value, rel=5.001e-3)
    assert value >= 1e15 or 1 <= float(match[1]) < 1000


@settings(deadline=None)
@given(value=FINITE, unit=st.sampled_from(["s", "B", "B/s", "1/s", "J", "1", "nat"]))
def test_no_quantity_but_zero_is_shown_as_zero(value: float, unit: str) -> None:
    text = units.quantity(value, unit)
    number = re.match(r"-?[\d.]+(e[-+]\d+)?", text)
    assert number is not None
    assert (float(number[0]) == 0) == (value == 0)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_said(value: float) -> None:
    assert units.quantity(value, "s") == f"{value} s"
