"""A record and what is stored about its cell → a verdict; a run and the whole baseline → what is missing.

Knows nothing of torch or pytest. A regression says model, optimization, metric, before → after, interval,
threshold and how to accept it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pytest_inferencepio import judgement
from pytest_inferencepio.baselines import Entry, cell_of, workload_of
from pytest_inferencepio.gate_rules import Rule, Thresholds, rule_of
from pytest_inferencepio.judgement import Case
from pytest_inferencepio.record import Record
from pytest_inferencepio.verdict import ACCEPT, CellKey, Finding, Outcome, Verdict, verdict_of

UNOPTIMIZED = "none"
# Budget key -> (metric, which side is allowed). The keys are the fields of `AccuracyBudget`.
BUDGET_METRICS = {
    "max_kl_divergence": ("kl_divergence", "at most"),
    "min_top1_agreement": ("top1_agreement", "at least"),
    "max_perplexity_ratio": ("perplexity_ratio", "at most"),
    "max_task_drop": ("task_drop", "at most"),
}
_BROKEN = (
    "the technique breaks its own promise: repair it, or change its declared budget; "
    "a baseline update does not accept this"
)
# The budget of techniques that promise identical answers (`BITWISE_BUDGET`, without importing it).
IDENTICAL = {
    "max_kl_divergence": 0.0,
    "min_top1_agreement": 1.0,
    "max_perplexity_ratio": 1.0,
    "max_task_drop": 0.0,
}
_BUDGET_SLACK = 1e-9  # a budget of exactly 0 or 1 must survive the rounding of a mean
# What only some machines can measure; its absence elsewhere is a note, not a failure.
_OPTIONAL = (Rule.ENERGY, Rule.INFORMATION)


def compare(
    record: Record,
    entry: Entry | None,
    thresholds: Thresholds | None = None,
    *,
    budget: Mapping[str, float] | None = None,
    same_machine: bool | None = None,
) -> Verdict:
    """Judge one cell.

    Args:
        record: what was measured now. Ratios carry their paired samples (one ratio per pair).
        entry: `Baselines.entry(record)`, or None when the cell has no baseline.
        thresholds: defaults to `Thresholds()`; this machine's A/A noise belongs in here.
        budget: the technique's declared `AccuracyBudget` as numbers; else `record.workload["budget"]`.
        same_machine: overrides what `entry` found out about the machine.
    """
    limits = thresholds or Thresholds()
    cell = cell_of(record)
    findings = _over_budget(record, budget if budget is not None else record.workload.get("budget"))
    if entry is None:
        findings.append(_no_baseline(cell, "this benchmark has no baseline"))
    elif difference := _workload_difference(entry, record):
        findings.append(_no_baseline(cell, f"the workload changed, so nothing was compared: {difference}"))
    else:
        if same_machine is not None:
            entry = _as_machine(entry, same_machine)
        findings += _judged(record, entry, limits)
    return verdict_of(cell, confirm(findings))


def aa_noise(records: Iterable[Record]) -> float:
    """How far apart two equal models were on this machine, as a fraction: the largest of the speed ratios that
    `records` of the unoptimized model carry (measured against a copy of itself)."""
    apart = [
        abs(math.log(value.value))
        for record in records
        if record.optimization == UNOPTIMIZED
        for name, value in record.metrics.items()
        if rule_of(name) is Rule.RATIO and value.value
    ]
    return math.expm1(max(apart, default=0.0))


def looks_slower(record: Record, entry: Entry, limits: Thresholds) -> bool:
    """Whether a ratio of `record` may be a regression once more pairs are measured; see `judgement.looks_slower`."""
    if record.optimization == UNOPTIMIZED or _workload_difference(entry, record):
        return False
    return any(
        judgement.looks_slower(Case(entry.cell, name, value, entry.metrics[name], limits, False))
        for name, value in record.metrics.items()
        if rule_of(name) is Rule.RATIO and value.measured and name in entry.metrics
    )


def confirm(findings: Sequence[Finding]) -> list[Finding]:
    """The one place through which every suspected regression passes before it counts.

    Today each suspect stands. Measuring suspects again in new processes, corrected for how many there are,
    belongs here: it gets all findings of a cell and returns them with the refuted ones turned into notes.
    """
    return list(findings)


def _judged(record: Record, entry: Entry, limits: Thresholds) -> list[Finding]:
    findings: list[Finding] = []
    for name, value in record.metrics.items():
        history = entry.metrics.get(name)
        if history is None:
            if value.measured and rule_of(name) is not Rule.INFORMATION:
                findings.append(_new_metric(entry.cell, record, name))
            continue
        case = Case(entry.cell, name, value, history, limits, record.optimization == UNOPTIMIZED)
        if not value.measured:
            findings.append(_lost(case, f"not measured now: {value.reason}", history.same_machine))
        elif finding := judgement.judge(case, record.metrics, entry.metrics):
            findings.append(finding)
    for name, history in entry.metrics.items():
        if name not in record.metrics:
            case = Case(entry.cell, name, None, history, limits, record.optimization == UNOPTIMIZED)
            findings.append(_lost(case, "the baseline has it, this run does not", True))
    return findings


def _lost(case: Case, why: str, counts: bool) -> Finding:
    """A metric the baseline has and the record has not. What another machine could measure and this one
    cannot (`counts` is False) is a note."""
    gated = counts and rule_of(case.metric) not in _OPTIONAL
    return Finding(
        case.cell,
        case.metric,
        Outcome.MISSING if gated else Outcome.NOTE,
        before=case.history.center,
        unit=judgement.unit_of(case.metric),
        detail=why,
        advice=ACCEPT if gated else "",
    )


def _new_metric(cell: CellKey, record: Record, name: str) -> Finding:
    value = record.metrics[name]
    note = "new metric, the baseline does not have it; --pio-update-baseline stores it"
    return Finding(cell, name, Outcome.NOTE, after=value.value, unit=value.unit, detail=note)


def _no_baseline(cell: CellKey, why: str) -> Finding:
    advice = "store one with --pio-update-baseline"
    return Finding(cell, "(all)", Outcome.NO_BASELINE, detail=why, advice=advice)


def _over_budget(record: Record, budget: Any) -> list[Finding]:
    """Findings where the record's accuracy leaves what the technique declares.

    Budgets are of trained models. Random weights give flat logits, whose order any rounding changes: for them only
    the promise of identical answers is judged.
    """
    if record.workload.get("weights") == "random" and dict(budget or {}) != IDENTICAL:
        return []
    findings = []
    for key, limit in (budget or {}).items():
        if key not in BUDGET_METRICS:
            raise ValueError(f"unknown budget {key!r}; an accuracy budget has {', '.join(BUDGET_METRICS)}")
        name, side = BUDGET_METRICS[key]
        value = record.metrics.get(name)
        if value is None or value.value is None:
            continue
        if _beyond(value.value, limit, side):
            nearest = value.low if side == "at most" else value.high
            proven = _beyond(value.value if nearest is None else nearest, limit, side)
            findings.append(
                _budget_finding(record, name, f"declared budget: {side} {limit:g}", proven=proven)
            )
    return findings


def _beyond(value: float, limit: float, side: str) -> bool:
    return (value - limit if side == "at most" else limit - value) > _BUDGET_SLACK


def _budget_finding(record: Record, name: str, threshold: str, *, proven: bool) -> Finding:
    """Few positions or examples may land beyond a bound by chance: then the interval still holds the bound."""
    value = record.metrics[name]
    return Finding(
        cell_of(record),
        name,
        Outcome.BUDGET if proven else Outcome.INCONCLUSIVE,
        after=value.value,
        low=value.low,
        high=value.high,
        n=value.n,
        unit=value.unit,
        threshold=threshold,
        detail="" if proven else "beyond the declared budget, but the samples do not prove it",
        advice=_BROKEN if proven else "",
    )


def _workload_difference(entry: Entry, record: Record) -> str:
    """Which keys of the workload differ, `key: before → after`; empty when none does."""
    before, now = dict(entry.workload), workload_of(record)
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    return ", ".join(f"{key}: {before.get(key)!r} → {now.get(key)!r}" for key in changed)


def _as_machine(entry: Entry, same: bool) -> Entry:
    metrics = {
        name: dataclasses.replace(history, same_machine=same, same_isa=same or history.same_isa)
        for name, history in entry.metrics.items()
    }
    return dataclasses.replace(entry, metrics=metrics)
