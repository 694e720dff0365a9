"""Sessions of one machine as a random-effects model: what a ratio measured again may differ by.

A session's ln(ratio) is off by two things: the noise of its pairs, which its own interval tells, and a bias of the
whole session (placement of code and data, the clock, what else the host runs), which no pairing removes. Pooling
both as one spread lets one noisy session blind the gate for quiet ones, so they are kept apart, as meta-analyses do:
the variance between sessions by the method of moments (DerSimonian & Laird 1986; any weights: DerSimonian & Kacker
2007), their centre weighted by precision. Pure Python; knows nothing of the rest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

Z95 = 1.959964

# Standard deviation of a session's bias until stored sessions show more or less. Four sessions of twelve ratios on
# two shared cores gave 1.2 % (one of them with four times the noise of the others), calm machines about 0.5 %.
PRIOR_BIAS = 0.015
_PRIOR_DEGREES = 4.0
# Noise intervals of nine pairs are themselves uncertain by a third: a bias of zero is never believed.
_LEAST_BIAS = 0.003


@dataclasses.dataclass(frozen=True)
class SessionValue:
    """ln(ratio) of one session and the variance of its own noise."""

    log: float
    variance: float


@dataclasses.dataclass(frozen=True)
class Moments:
    """Weighted squares beyond what noise explains, and how much of the variance between sessions they hold.

    `squares / weight` estimates that variance; both add over ratios.
    """

    squares: float = 0.0
    weight: float = 0.0

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.squares + other.squares, self.weight + other.weight)


def session_value(value: float, low: float | None, high: float | None) -> SessionValue | None:
    """From a ratio and its 95 % interval; without one its noise counts as none. None for what is not positive."""
    if value <= 0:
        return None
    return SessionValue(math.log(value), interval_variance(low, high))


def interval_variance(low: float | None, high: float | None) -> float:
    """Variance of ln(ratio) behind a 95 % interval, 0 without one; infinite where it reaches 0."""
    if low is None or high is None:
        return 0.0
    if low <= 0:
        return math.inf
    return (math.log(high / low) / (2 * Z95)) ** 2


def moments(values: Sequence[SessionValue]) -> Moments:
    """What `values` of one ratio say about the variance between sessions; nothing when fewer than two are usable."""
    known = [value for value in values if math.isfinite(value.variance)]
    if len(known) < 2:
        return Moments()
    weights = [1 / (value.variance + PRIOR_BIAS**2) for value in known]
    total = math.fsum(weights)
    mean = math.fsum(w * v.log for w, v in zip(weights, known, strict=True)) / total
    squares = math.fsum(w * (v.log - mean) ** 2 for w, v in zip(weights, known, strict=True))
    noise = math.fsum(w * (1 - w / total) * v.variance for w, v in zip(weights, known, strict=True))
    return Moments(squares - noise, total - math.fsum(w * w for w in weights) / total)


def pooled(parts: Iterable[Moments]) -> Moments:
    """The sum of `parts`."""
    return sum(parts, Moments())


def bias(found: Moments, prior: float = PRIOR_BIAS) -> float:
    """Standard deviation between sessions, shrunk towards `prior` while little is known.

    A pair of sessions without noise is one degree of freedom, of noisy ones less; the prior counts as four.
    """
    degrees = PRIOR_BIAS**2 * found.weight
    squares = PRIOR_BIAS**2 * found.squares
    variance = (_PRIOR_DEGREES * prior**2 + squares) / (_PRIOR_DEGREES + degrees)
    return math.sqrt(max(variance, _LEAST_BIAS**2))


def center(values: Sequence[SessionValue], between: float) -> SessionValue:
    """The mean of `values` weighted by precision, with its variance, given the bias `between` of each.

    Raises:
        ValueError: no value, or none with a finite variance.
    """
    known = [value for value in values if math.isfinite(value.variance)]
    if not known:
        raise ValueError("no session has a usable interval")
    weights = [1 / (value.variance + between**2) for value in known]
    total = math.fsum(weights)
    return SessionValue(math.fsum(w * v.log for w, v in zip(weights, known, strict=True)) / total, 1 / total)
