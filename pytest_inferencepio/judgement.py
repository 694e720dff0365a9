"""One metric now and its stored history → a finding, or None when there is nothing to say."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from pytest_inferencepio import units
from pytest_inferencepio.baseline_json import Value
from pytest_inferencepio.baselines import History
from pytest_inferencepio.gate_rules import (
    PEAK_OF,
    SPREAD_FACTOR,
    Rule,
    Thresholds,
    Tolerance,
    rule_of,
    spread_allowance,
    tolerance_of,
)
from pytest_inferencepio.record import METRICS, Metric, parts_of
from pytest_inferencepio.stats import mcnemar, median, median_lower_bound, median_upper_bound
from pytest_inferencepio.verdict import ACCEPT, CellKey, Finding, Outcome

# A one-sided 95 % bound of the median needs five samples: 0.5^5 < 0.05 < 0.5^4.
FEWEST_PAIRS = 5
_FIXED = (Rule.PERPLEXITY, Rule.AGREEMENT, Rule.TASK)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is judged: `now` is None where the metric is gone."""

    cell: CellKey
    metric: str
    now: Metric | None
    history: History
    limits: Thresholds
    unoptimized: bool

    @property
    def value(self) -> float:
        assert self.now is not None and self.now.value is not None
        return self.now.value

    @property
    def sign(self) -> int:
        """+1 where larger is worse."""
        return -1 if METRICS.get(parts_of(self.metric)[0], ("1", "lower"))[1] == "higher" else 1

    def finding(
        self, outcome: Outcome, *, before: float | None = None, threshold: str = "", detail: str = ""
    ) -> Finding:
        assert self.now is not None
        return Finding(
            self.cell,
            self.metric,
            outcome,
            before=self.history.center if before is None else before,
            after=self.now.value,
            low=self.now.low,
            high=self.now.high,
            n=self.now.n,
            unit=unit_of(self.metric),
            threshold=threshold,
            detail=detail,
            advice=ACCEPT if outcome is Outcome.REGRESSION else "",
        )


def unit_of(metric: str) -> str:
    """The unit of `metric`, "1" for one that `METRICS` does not know."""
    return METRICS.get(parts_of(metric)[0], ("1", ""))[0]


def judge(
    case: Case, record_metrics: Mapping[str, Metric], stored_metrics: Mapping[str, History]
) -> Finding | None:
    """Judge a measured metric by its rule; the other metrics of both sides decide between memory rules."""
    rule = rule_of(case.metric)
    if rule is Rule.RATIO:
        return _aa(case) if case.unoptimized else _ratio(case)
    if rule is Rule.MEMORY:
        return _memory(case)
    if rule is Rule.MEMORY_RATIO:
        name = PEAK_OF[case.metric]
        stored, now = stored_metrics.get(name), record_metrics.get(name)
        gated_by_peak = stored is not None and stored.same_machine and now is not None
        return None if gated_by_peak else _memory_ratio(case, now)
    if rule is Rule.ENERGY:
        return _energy(case)
    if rule is Rule.INFORMATION:
        return _information(case)
    return _deterministic(case, rule)


# Speed


def speed_allowance(case: Case) -> tuple[float, str]:
    """delta and the reason for it: how much slower than the baseline is still within what is expected."""
    limits, history = case.limits, case.history
    if not history.same_machine:
        if history.same_isa:
            return limits.speed_foreign, "baseline of another machine"
        return limits.speed_foreign_isa, "baseline of another instruction set"
    spread = spread_allowance(history.spread, len(history.values))
    if spread > limits.speed:
        return spread, f"spread of {len(history.values)} stored session(s)"
    return limits.speed, "least change of interest"


def _widened(case: Case, delta: float, why: str) -> tuple[float, str]:
    """delta and its reason where this run is noisier than the stored sessions, or its equal models differed."""
    noise = SPREAD_FACTOR * math.sqrt(_excess_variance(case))
    widest = math.expm1(math.hypot(math.log1p(delta), noise))
    if case.limits.aa_noise > widest:
        return case.limits.aa_noise, "A/A noise of this machine"
    return widest, f"{why}, widened by the noise of this run" if widest > 1.05 * delta else why


def _aa(case: Case) -> Finding | None:
    """The unoptimized model against itself: what it differs by is noise of the machine, never a regression."""
    if case.value > 0 and abs(math.log(case.value)) <= math.log1p(case.limits.speed):
        return None
    detail = "two equal models differ by this much here: the machine is too noisy for smaller changes"
    return case.finding(Outcome.NOTE, before=1.0, detail=detail)


def _excess_variance(case: Case) -> float:
    """By how much the variance of this run's median of ln(ratio) exceeds that of the stored sessions."""
    assert case.now is not None
    stored = [variance for value in case.history.values if (variance := _variance(value)) is not None]
    now = _variance(case.now)
    return 0.0 if now is None else max(0.0, now - (median(stored) if stored else 0.0))


def _variance(value: Metric | Value) -> float | None:
    """Of ln(value), from its 95 % interval; None where there is none."""
    if not value.low or not value.high or value.low <= 0:
        return None
    return (math.log(value.high / value.low) / (2 * 1.96)) ** 2


def _ratio(case: Case) -> Finding | None:
    """Pairs x = ln(worsening): suspect when the median exceeds ln(1 + d) and its exact lower bound ln(1 + d/2),
    with d widened by noise. What lies between, or leaves a slow-down of interest possible, is inconclusive."""
    if case.history.center <= 0 or case.value <= 0:
        return case.finding(Outcome.INCONCLUSIVE, detail="a ratio that is not positive cannot be compared")
    known, why = speed_allowance(case)
    delta, reason = _widened(case, known, why)
    center, low, high = _worsening(case)
    threshold = f"allowed: {units.share(delta)} ({reason})"
    if center > math.log1p(delta) and low > math.log1p(delta / 2):
        return case.finding(Outcome.REGRESSION, threshold=threshold)
    excluded = max(case.limits.excluded, 2 * known)
    if center > math.log1p(known):
        detail = f"worse by {units.share(math.expm1(center))}, but the samples do not prove it"
        return case.finding(Outcome.INCONCLUSIVE, threshold=threshold, detail=detail)
    if high > math.log1p(excluded):
        detail = f"the interval is too wide to exclude a slow-down of {units.share(excluded)}"
        return case.finding(Outcome.INCONCLUSIVE, threshold=threshold, detail=detail)
    if -center > math.log1p(delta) and -high > math.log1p(delta / 2):
        return case.finding(Outcome.IMPROVED, threshold=threshold)
    return None


def _worsening(case: Case) -> tuple[float, float, float]:
    """Median of ln(worsening) with exact one-sided bounds; without samples, from the metric's interval."""
    assert case.now is not None
    logs = _logs(case.now.samples, case)
    if len(logs) >= FEWEST_PAIRS:
        confidence = case.limits.confidence
        return median(logs), median_lower_bound(logs, confidence), median_upper_bound(logs, confidence)
    center = _logs([case.value], case)[0]
    if not case.now.samples and case.now.n >= FEWEST_PAIRS and case.now.low is not None and case.now.high:
        bounds = (
            sorted(_logs([case.now.low, case.now.high], case)) if case.now.low > 0 else [-math.inf, math.inf]
        )
        return center, bounds[0], bounds[1]
    return center, -math.inf, math.inf


def _logs(ratios: Sequence[float], case: Case) -> list[float]:
    return [case.sign * math.log(ratio / case.history.center) for ratio in ratios if ratio > 0]


# Memory and energy


def _memory(case: Case) -> Finding | None:
    if not case.history.same_machine:
        return None  # libraries, allocators and page sizes differ; memory_ratio travels instead
    values = [value.value for value in case.history.values]
    noise = max(values) - min(values)
    return _by_fraction_and_floor(case, case.limits.memory, case.limits.memory_floor + noise)


def _memory_ratio(case: Case, peak: Metric | None) -> Finding | None:
    """The floor in bytes is translated into the ratio through the peak it belongs to."""
    floor = 0.0
    if peak is not None and peak.value:
        floor = case.limits.memory_floor * case.value / peak.value
    return _by_fraction_and_floor(case, case.limits.memory_ratio, floor)


def _by_fraction_and_floor(case: Case, fraction: float, floor: float) -> Finding | None:
    before = case.history.center
    worse = case.value - before
    unit = unit_of(case.metric)
    threshold = f"allowed: the larger of {units.share(fraction)} and {units.quantity(floor, unit)}"
    if abs(worse) <= max(fraction * before, floor):
        return None
    return case.finding(Outcome.REGRESSION if worse > 0 else Outcome.IMPROVED, threshold=threshold)


def _energy(case: Case) -> Finding | None:
    """Measured on both sides here: unmeasured energy never reaches this, foreign energy does not travel."""
    if not case.history.same_machine:
        return None
    return _by_fraction_and_floor(case, case.limits.energy, 0.0)


# Answers and counts


def _deterministic(case: Case, rule: Rule) -> Finding | None:
    """Worse than the last accepted value by more than the tolerance. The unoptimized model may not move in
    either direction: its answers are fixed, so a lower perplexity is a changed weight too."""
    before = case.history.latest.value
    assert case.now is not None
    tolerance = tolerance_of(rule, case.limits, same_machine=case.history.same_machine, n=case.now.n)
    if rule is Rule.EXACT and before.is_integer():
        tolerance = Tolerance()
    worse = case.sign * (case.value - before)
    if abs(worse) <= tolerance.allowed(before):
        return None
    if worse < 0:
        if not (case.unoptimized and rule in _FIXED):
            return case.finding(Outcome.IMPROVED, before=before, threshold=str(tolerance))
        detail = "the answers of the unoptimized model changed"
        return _accuracy_regression(case, before, tolerance, detail)
    if rule is Rule.TASK:
        return _task(case, before, tolerance)
    return _accuracy_regression(case, before, tolerance, "")


def _accuracy_regression(case: Case, before: float, tolerance: Tolerance, detail: str) -> Finding:
    return case.finding(Outcome.REGRESSION, before=before, threshold=str(tolerance), detail=detail)


def _task(case: Case, before: float, tolerance: Tolerance) -> Finding:
    """With examples on both sides, McNemar decides whether the lost ones are more than chance."""
    assert case.now is not None
    stored = case.history.latest.examples
    now = "".join(str(int(sample)) for sample in case.now.samples)
    if not stored or len(stored) != len(now):
        return _accuracy_regression(case, before, tolerance, "")
    lost = sum(old == "1" and new == "0" for old, new in zip(stored, now, strict=True))
    gained = sum(old == "0" and new == "1" for old, new in zip(stored, now, strict=True))
    p_value = mcnemar(lost, gained)
    detail = f"{lost} examples lost, {gained} gained of {len(now)} (McNemar p = {p_value:.2g})"
    if p_value < case.limits.task_p_value:
        return _accuracy_regression(case, before, tolerance, detail)
    return case.finding(Outcome.INCONCLUSIVE, before=before, threshold=str(tolerance), detail=detail)


def _information(case: Case) -> Finding | None:
    """Absolute times and rates never gate; on the same machine a large move is worth a sentence."""
    before = case.history.center
    if not case.history.same_machine or before <= 0 or case.value <= 0:
        return None
    worse = case.sign * math.log(case.value / before)
    if worse <= math.log1p(case.limits.information):
        return None
    return case.finding(Outcome.NOTE, detail="absolute value moved on this machine; not gated")
