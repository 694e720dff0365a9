"""Numbers with SI prefixes and units, as people read them. Knows nothing of the rest.

A quantity that is not zero is never shown as zero: the number of significant digits is fixed, not the number
of decimals.
"""

from __future__ import annotations

import math

_PREFIXES = {-12: "p", -9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P"}
# Units of which fractions exist; bytes and rates have no milli.
_PREFIXED = {"s": -12, "J": -12, "B": 0, "B/s": 0, "1/s": 0}
_WORDS = {"1/s": "/s"}
ARROW = "→"


def significant(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits and no needless exponent: 0.00123, 12.3, 1230, 1.23e-09."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    scientific, exponent = _rounded(value, digits)
    if -5 <= exponent < 9:
        return f"{float(scientific):.{max(0, digits - 1 - exponent)}f}"
    return scientific


def quantity(value: float | None, unit: str, digits: int = 3) -> str:
    """`value` in `unit` with the SI prefix that leaves one to three digits before the point.

    Bytes are decimal (1 MB = 10^6 B). Unit "1" is a plain number; None is "not measured".
    """
    if value is None:
        return "not measured"
    if unit not in _PREFIXED or value == 0 or not math.isfinite(value):
        return _with_unit(significant(value, digits), "", unit)
    exponent = _rounded(value, digits)[1] // 3 * 3
    exponent = min(max(exponent, _PREFIXED[unit]), max(_PREFIXES))
    return _with_unit(significant(value / 10.0**exponent, digits), _PREFIXES[exponent], unit)


def change(before: float | None, after: float | None, unit: str) -> str:
    """`before → after` with units, with as many digits (three to six) as it takes to see the difference."""
    digits = _telling_digits(before, after) if before is not None and after is not None else 3
    return f"{quantity(before, unit, digits)} {ARROW} {quantity(after, unit, digits)}"


def _telling_digits(before: float, after: float) -> int:
    """The fewest digits whose rounding distorts the difference by less than a tenth."""
    for digits in range(3, 6):
        shown = float(f"{after:.{digits - 1}e}") - float(f"{before:.{digits - 1}e}")
        if abs(shown - (after - before)) <= 0.1 * abs(after - before):
            return digits
    return 6


def interval(low: float | None, high: float | None, unit: str = "1") -> str:
    """`[low, high]` with the unit after each bound, or nothing when there is no interval."""
    if low is None or high is None:
        return ""
    return f"[{quantity(low, unit)}, {quantity(high, unit)}]"


def times(ratio: float | None) -> str:
    """A ratio as `2.31x`."""
    return "not measured" if ratio is None else f"{significant(ratio)}x"


def share(fraction: float, digits: int = 2) -> str:
    """A fraction without sign as `6.6 %`."""
    return f"{significant(fraction * 100, digits)} %"


def percent(fraction: float, digits: int = 2) -> str:
    """A signed change as `+10 %`, `-0.031 %`."""
    sign = "+" if fraction >= 0 else "-"
    return f"{sign}{share(abs(fraction), digits)}"


def relative(before: float, after: float) -> str:
    """The change from `before` to `after` in percent of `before`; `was 0` when there is nothing to divide by."""
    return percent(after / before - 1) if before else "was 0"


def _rounded(value: float, digits: int) -> tuple[str, int]:
    """Scientific notation and its exponent after rounding: 999.96 has exponent 3 with three digits."""
    text = f"{value:.{digits - 1}e}"
    return text, int(text.partition("e")[2])


def _with_unit(number: str, prefix: str, unit: str) -> str:
    if unit == "1":
        return number
    word = _WORDS.get(unit, unit)
    return f"{number}{prefix}{word}" if word.startswith("/") else f"{number} {prefix}{word}"
