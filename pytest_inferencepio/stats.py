"""Estimates with intervals, and exact tests. Pure Python; knows nothing of the rest.

Intervals of the median are those of order statistics (binomial), so they assume independent samples and
nothing about their distribution. Where too few samples exist for the wanted confidence, the interval is the
range of the samples and `confidence` says what that range really covers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its interval [low, high], the confidence that interval really has, and the count."""

    value: float
    low: float
    high: float
    n: int
    confidence: float

    def scaled(self, factor: float) -> Estimate:
        """The estimate of `factor` times the quantity, `factor` > 0 (a unit, a count)."""
        if factor <= 0:
            raise ValueError(f"factor must be positive, got {factor}")
        return dataclasses.replace(
            self, value=self.value * factor, low=self.low * factor, high=self.high * factor
        )

    def inverted(self, numerator: float = 1.0) -> Estimate:
        """The estimate of `numerator` / quantity, for a positive quantity: times become rates."""
        if self.low <= 0:
            raise ValueError(f"only a positive quantity can be inverted; its interval starts at {self.low}")
        return dataclasses.replace(
            self, value=numerator / self.value, low=numerator / self.high, high=numerator / self.low
        )


def binomial_cdf(k: int, n: int, p: float = 0.5) -> float:
    """P(X <= k) for X ~ Binomial(n, p)."""
    return min(1.0, math.fsum(_binomial_pmf(i, n, p) for i in range(min(k, n) + 1)))


def quantile(samples: Sequence[float], q: float) -> float:
    """Quantile with linear interpolation between order statistics (Hyndman-Fan type 7, numpy's default)."""
    ordered = _sorted(samples)
    if not 0 <= q <= 1:
        raise ValueError(f"q must be in [0, 1], got {q}")
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    weight = position - below
    # Clamped: interpolating between equal values may be off by a rounding.
    value = ordered[below] * (1 - weight) + ordered[above] * weight
    return min(max(value, ordered[below]), ordered[above])


def median(samples: Sequence[float]) -> float:
    """Middle order statistic, or the mean of the two middle ones; ValueError without samples."""
    return quantile(samples, 0.5)


def quantile_estimate(samples: Sequence[float], q: float, confidence: float = CONFIDENCE) -> Estimate:
    """Quantile `q` with its order-statistic interval: P(x_(l) <= quantile <= x_(u)) from Binomial(n, q).

    Each tail takes at most (1 - confidence) / 2; where the samples cannot give that (a p99 of 20 samples),
    the interval ends at the extreme and `confidence` is what is covered.
    """
    ordered = _sorted(samples)
    _check_confidence(confidence)
    n, tail = len(ordered), (1 - confidence) / 2
    low_rank = _largest_rank(n, q, tail)
    high_rank = n + 1 - _largest_rank(n, 1 - q, tail)
    covered = binomial_cdf(high_rank - 1, n, q) - binomial_cdf(low_rank - 1, n, q)
    value = quantile(ordered, q)
    low, high = ordered[low_rank - 1], ordered[high_rank - 1]
    return Estimate(value, min(low, value), max(high, value), n, min(max(covered, 0.0), 1.0))


def median_estimate(samples: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Median with its exact order-statistic interval (David & Nagaraja, Order Statistics, ch. 7)."""
    return quantile_estimate(samples, 0.5, confidence)


def median_lower_bound(samples: Sequence[float], confidence: float = CONFIDENCE) -> float:
    """Largest order statistic that lies at or below the median with at least `confidence`, exactly.

    -inf when even the smallest sample is not such a bound (fewer than 5 samples at 95 %).
    """
    ordered = _sorted(samples)
    _check_confidence(confidence)
    if binomial_cdf(0, len(ordered)) > 1 - confidence:
        return -math.inf
    return ordered[_largest_rank(len(ordered), 0.5, 1 - confidence) - 1]


def median_upper_bound(samples: Sequence[float], confidence: float = CONFIDENCE) -> float:
    """Mirror image of `median_lower_bound`; +inf when there are too few samples."""
    return -median_lower_bound([-sample for sample in samples], confidence)


def log_ratios(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """ln(after / before) of pairs measured together; ValueError for unequal counts or values <= 0."""
    if len(before) != len(after):
        raise ValueError(f"pairs need as many values before as after, got {len(before)} and {len(after)}")
    for value in (*before, *after):
        if not value > 0 or not math.isfinite(value):
            raise ValueError(f"pairs need positive finite values, got {value}")
    return [math.log(b / a) for a, b in zip(before, after, strict=True)]


def ratio_estimate(logs: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """exp of the median of `logs` with its interval: after / before when given `log_ratios(before, after)`."""
    estimate = median_estimate(logs, confidence)
    return dataclasses.replace(
        estimate, value=math.exp(estimate.value), low=math.exp(estimate.low), high=math.exp(estimate.high)
    )


def speedup_estimate(
    before: Sequence[float], after: Sequence[float], confidence: float = CONFIDENCE
) -> Estimate:
    """before / after of paired times: above 1 is faster."""
    return ratio_estimate(log_ratios(after, before), confidence)


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> Estimate:
    """A proportion with Wilson's score interval (Wilson 1927); n = 0 gives the whole of [0, 1]."""
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be within [0, {n}], got {successes}")
    _check_confidence(confidence)
    if n == 0:
        return Estimate(0.0, 0.0, 1.0, 0, confidence)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Estimate(
        share, min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share), n, confidence
    )


def mcnemar(lost: int, gained: int) -> float:
    """One-sided exact p-value of McNemar's test that more examples were lost than gained by chance.

    `lost` were right before and wrong after, `gained` the other way; 1 when neither happened.
    """
    if lost < 0 or gained < 0:
        raise ValueError(f"counts cannot be negative, got {lost} and {gained}")
    return min(1.0, 1.0 - binomial_cdf(lost - 1, lost + gained)) if lost else 1.0


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values (Holm 1979): reject those <= alpha with the family-wise error at most alpha."""
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if not 0 <= p <= 1:
            raise ValueError(f"p-value of {name} must be within [0, 1], got {p}")
        running = max(running, min(1.0, p * (len(p_values) - rank)))
        adjusted[name] = running
    return adjusted


def _binomial_pmf(k: int, n: int, p: float) -> float:
    """P(X = k); through logarithms, because comb(n, k) leaves the floats from n = 1,030."""
    if p in (0.0, 1.0):
        return float(k == n * p)
    if n <= 1000:
        return math.comb(n, k) * p**k * (1 - p) ** (n - k)
    log_choices = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(log_choices + k * math.log(p) + (n - k) * math.log1p(-p))


def _largest_rank(n: int, q: float, tail: float) -> int:
    """Largest r >= 1 with P(Binomial(n, q) <= r - 1) <= tail, or 1 when there is none."""
    rank = 1
    total = 0.0
    for k in range(n):
        total += _binomial_pmf(k, n, q)
        if total > tail:
            break
        rank = k + 1
    return rank


def _sorted(samples: Sequence[float]) -> list[float]:
    if not samples:
        raise ValueError("there are no samples")
    for sample in samples:
        if math.isnan(sample):
            raise ValueError("a sample is NaN")
    return sorted(samples)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be within (0, 1), got {confidence}")
