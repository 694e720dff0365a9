"""One metric now and its stored history → a finding, or None when there is nothing to say."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

from pytest_inferencepio import units
from pytest_inferencepio.baselines import History
from pytest_inferencepio.gate_rules import (
    DEVIATIONS,
    PEAK_OF,
    Rule,
    Thresholds,
    Tolerance,
    allowance,
    between_instruction_sets,
    rule_of,
    tolerance_of,
)
from pytest_inferencepio.record import METRICS, Metric, parts_of
from pytest_inferencepio.sessions import center, interval_variance
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


@dataclasses.dataclass(frozen=True)
class SpeedBaseline:
    """What a ratio is compared with: ln of the stored centre; `known` is the slow-down that the stored sessions leave
    open, `allowed` the one that this run's noise leaves open too; `why` says what both come from."""

    log: float
    known: float
    allowed: float
    why: str


def speed_baseline(case: Case) -> SpeedBaseline | None:
    """The sessions of this machine's ratio in the random-effects model; another machine's with a fixed allowance.

    None where no stored session is usable: not positive, or of unbounded noise.
    """
    limits, history = case.limits, case.history
    values = [value for value in history.ratios if math.isfinite(value.variance)]
    if not values:
        return None
    assert case.now is not None
    noise = interval_variance(case.now.low, case.now.high)
    middle = center(values, history.bias)
    if history.same_machine:
        stored = middle.variance + history.bias**2
        known = allowance(stored, limits.speed)
        widest = allowance(stored + noise, limits.speed)
        why = f"{len(values)} stored session(s), {units.share(history.bias)} between them"
        if known == limits.speed:
            why = "least change of interest"
    else:
        known, why = _foreign_allowance(case)
        widest = math.expm1(math.hypot(math.log1p(known), DEVIATIONS * math.sqrt(noise)))
    if limits.aa_noise > widest:
        return SpeedBaseline(middle.log, known, limits.aa_noise, "A/A noise of this machine")
    if widest > 1.5 * known:
        why = f"{why}, widened by the noise of this run"
    return SpeedBaseline(middle.log, known, widest, why)


def _foreign_allowance(case: Case) -> tuple[float, str]:
    if case.history.same_isa:
        return case.limits.speed_foreign, "baseline of another machine"
    return case.limits.speed_foreign_isa, "baseline of another instruction set"


def _aa(case: Case) -> Finding | None:
    """The unoptimized model against itself: what it differs by is noise of the machine, never a regression."""
    if case.value > 0 and abs(math.log(case.value)) <= math.log1p(case.limits.speed):
        return None
    detail = "two equal models differ by this much here: the machine is too noisy for smaller changes"
    return case.finding(Outcome.NOTE, before=1.0, detail=detail)


def _ratio(case: Case) -> Finding | None:
    """Pairs x = ln(worsening): suspect when the median exceeds ln(1 + d) and its exact lower bound ln(1 + d/2),
    with d widened by noise. What lies between, or leaves a slow-down of interest possible, is inconclusive."""
    stored = speed_baseline(case)
    if stored is None or case.value <= 0:
        return case.finding(Outcome.INCONCLUSIVE, detail="a ratio that is not positive cannot be compared")
    middle, low, high = _worsening(case, stored.log)
    finding = functools.partial(
        case.finding,
        before=math.exp(stored.log),
        # 23 % slower is a ratio 19 % lower: the message shows the second as the change, so it says what this one is.
        threshold=f"allowed: {units.share(stored.allowed)} slower ({stored.why})",
    )
    if middle > math.log1p(stored.allowed) and low > math.log1p(stored.allowed / 2):
        return finding(Outcome.REGRESSION)
    excluded = max(case.limits.excluded, 2 * stored.known)
    if middle > math.log1p(stored.known):
        detail = f"worse by {units.share(math.expm1(middle))}, but the samples do not prove it"
        return finding(Outcome.INCONCLUSIVE, detail=detail)
    if high > math.log1p(excluded):
        detail = f"the interval is too wide to exclude a slow-down of {units.share(excluded)}"
        return finding(Outcome.INCONCLUSIVE, detail=detail)
    if -middle > math.log1p(stored.allowed) and -high > math.log1p(stored.allowed / 2):
        return finding(Outcome.IMPROVED)
    return None


def looks_slower(case: Case) -> bool:
    """Whether the samples so far lie nearer to a regression than to no change: worse by more than half of what the
    stored sessions leave open. Below it more pairs would not fail the gate; above it they decide."""
    stored = speed_baseline(case)
    if stored is None or case.value <= 0:
        return False
    return _worsening(case, stored.log)[0] > math.log1p(stored.known / 2)


def _worsening(case: Case, stored: float) -> tuple[float, float, float]:
    """Median of ln(worsening) with exact one-sided bounds; without samples, from the metric's interval."""
    assert case.now is not None
    logs = _logs(case.now.samples, case, stored)
    if len(logs) >= FEWEST_PAIRS:
        confidence = case.limits.confidence
        return median(logs), median_lower_bound(logs, confidence), median_upper_bound(logs, confidence)
    (middle,) = _logs([case.value], case, stored)
    if not case.now.samples and case.now.n >= FEWEST_PAIRS and case.now.low is not None and case.now.high:
        ends = [case.now.low, case.now.high]
        bounds = sorted(_logs(ends, case, stored)) if case.now.low > 0 else [-math.inf, math.inf]
        return middle, bounds[0], bounds[1]
    return middle, -math.inf, math.inf


def _logs(ratios: Sequence[float], case: Case, stored: float) -> list[float]:
    return [case.sign * (math.log(ratio) - stored) for ratio in ratios if ratio > 0]


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
    if rule is Rule.EXACT and before.is_integer() and case.value.is_integer():
        tolerance = Tolerance()  # counts and bytes; a ratio near 1 is none of them
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
    between = between_instruction_sets(case.metric, case.limits)
    of_another_set = not (case.history.same_machine or case.history.same_isa or case.unoptimized)
    if of_another_set and between is not None and worse <= between.allowed(before):
        detail = (
            "the baseline is of another instruction set, whose kernels round elsewhere by as much; "
            "store a session of this one with --pio-update-baseline"
        )
        return case.finding(Outcome.INCONCLUSIVE, before=before, threshold=str(tolerance), detail=detail)
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
