"""What the comparison says: findings about metrics, a verdict per cell. Messages a person can act on."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Protocol

from pytest_inferencepio import units

ACCEPT = "to accept it: run again with --pio-update-baseline and commit baselines/"


class Status(enum.StrEnum):
    """A cell's verdict, as written into its record."""

    PASSED = "passed"
    REGRESSION = "regression"
    INCONCLUSIVE = "inconclusive"
    NO_BASELINE = "no_baseline"
    BUDGET_EXCEEDED = "budget_exceeded"


class Outcome(enum.StrEnum):
    """What was found about one metric."""

    REGRESSION = "regression"
    BUDGET = "budget exceeded"
    MISSING = "missing"
    INCONCLUSIVE = "inconclusive"
    NO_BASELINE = "no baseline"
    IMPROVED = "improved"
    NOTE = "note"


FAILING = (Outcome.REGRESSION, Outcome.MISSING, Outcome.BUDGET)


@dataclasses.dataclass(frozen=True)
class CellKey:
    """Address of a record: what was measured on what."""

    model: str
    scale: str
    optimization: str
    category: str
    device: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.model}/{self.scale}/{self.optimization}/{self.category}"


class NotMeasured(Protocol):
    """A cell without a record (refused by its technique, or not reached), and why."""

    @property
    def model(self) -> str: ...
    @property
    def scale(self) -> str: ...
    @property
    def optimization(self) -> str: ...
    @property
    def category(self) -> str: ...
    @property
    def reason(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing to know about one metric of one cell.

    `before`, `after`, `low`, `high` are in `unit`; `threshold` says in words what was allowed; `advice` says
    what to do about it.
    """

    cell: CellKey
    metric: str
    outcome: Outcome
    before: float | None = None
    after: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    unit: str = "1"
    threshold: str = ""
    detail: str = ""
    advice: str = ""

    @property
    def failing(self) -> bool:
        return self.outcome in FAILING

    def __str__(self) -> str:
        """One line: where, what, before → after, interval, threshold, what to do."""
        cell = self.cell
        parts = [
            f"{self.outcome}: {cell.model} {cell.scale}, {cell.optimization}, {cell.category}: {self.metric}"
        ]
        if self.before is not None or self.after is not None:
            parts.append(self._numbers())
        parts += [text for text in (self.detail, self.threshold, self.advice) if text]
        return "; ".join(parts)

    def _numbers(self) -> str:
        if self.before is None:
            text = units.quantity(self.after, self.unit)
        else:
            text = units.change(self.before, self.after, self.unit)
            if self.after is not None:
                text += f" ({units.relative(self.before, self.after)})"
        bounds = units.interval(self.low, self.high, self.unit)
        return f"{text} {bounds} from {self.n} samples" if bounds else text


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The verdict about one cell."""

    cell: CellKey
    status: Status
    findings: tuple[Finding, ...] = ()

    @property
    def failed(self) -> bool:
        return self.status in (Status.REGRESSION, Status.BUDGET_EXCEEDED)

    def of(self, *outcomes: Outcome) -> list[Finding]:
        """The findings with one of `outcomes`."""
        return [finding for finding in self.findings if finding.outcome in outcomes]

    @property
    def message(self) -> str:
        """The failing findings, one line each; empty when nothing failed."""
        return "\n".join(str(finding) for finding in self.findings if finding.failing)


def verdict_of(cell: CellKey, findings: Sequence[Finding]) -> Verdict:
    """The gravest finding decides: budget, then regression, then inconclusive, then no baseline."""
    outcomes = {finding.outcome for finding in findings}
    if Outcome.BUDGET in outcomes:
        status = Status.BUDGET_EXCEEDED
    elif outcomes & set(FAILING):
        status = Status.REGRESSION
    elif Outcome.INCONCLUSIVE in outcomes:
        status = Status.INCONCLUSIVE
    elif Outcome.NO_BASELINE in outcomes:
        status = Status.NO_BASELINE
    else:
        status = Status.PASSED
    return Verdict(cell, status, tuple(findings))
