"""State of one run: what is to be measured, what was, what was refused or is missing."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_inferencepio import baselines, comparison, machine
from pytest_inferencepio.errors import BaselineError
from pytest_inferencepio.gate_rules import Thresholds
from pytest_inferencepio.naming import EXTRA_CATEGORIES
from pytest_inferencepio.options import Settings
from pytest_inferencepio.pairs import Pairs
from pytest_inferencepio.record import Record
from pytest_inferencepio.selection import Row
from pytest_inferencepio.verdict import CellKey, Status, Verdict

if TYPE_CHECKING:
    from pytest_inferencepio.measure.budget import Budget
    from pytest_inferencepio.measure.processes import FreshProcesses


@dataclasses.dataclass(frozen=True)
class Unmeasured:
    """A cell without a record, and why."""

    model: str
    scale: str
    optimization: str
    category: str
    reason: str


@dataclasses.dataclass
class Run:
    """One `pytest --pio-model=...`, from collection to report.

    `whole` is False when paths of the command line chose parts of the suite. `wanted` are the cells to run;
    `deselected` those that -k, -m, --lf and the like took out; `reasons` says why a wanted cell has no record;
    `failures` are the tests that failed; `kept` holds what several categories of a row measure once.
    """

    settings: Settings
    rows: Sequence[Row]
    pairs: Pairs
    baselines: baselines.Baselines
    workloads: Mapping[str, Mapping[str, Any]]
    whole: bool = True
    measured: list[tuple[Record, Verdict]] = dataclasses.field(default_factory=list)
    wanted: list[CellKey] = dataclasses.field(default_factory=list)
    deselected: list[CellKey] = dataclasses.field(default_factory=list)
    reasons: dict[CellKey, str] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)
    kept: dict[tuple[str, ...], Any] = dataclasses.field(default_factory=dict)
    started: float = dataclasses.field(default_factory=time.perf_counter)
    _processes: FreshProcesses | None = None

    def row(self, row_id: str) -> Row:
        return next(row for row in self.rows if row.id == row_id)

    def budget(self, scale: str) -> Budget:
        """How much is measured per cell at `scale`, with what `pytest_pio_workloads` changes of it."""
        from pytest_inferencepio.measure.budget import budget_for

        return budget_for(scale).changed(self.workloads.get(scale, {}))

    def judge(self, record: Record, budget: Mapping[str, float]) -> Verdict:
        """The verdict about `record` against its baseline and the technique's accuracy budget.

        What tells of the machine or of other engines has no baseline to be compared with, and passes.
        """
        if record.category in EXTRA_CATEGORIES:
            return Verdict(baselines.cell_of(record), Status.PASSED)
        return comparison.compare(
            record, self.baselines.entry(record), self._thresholds(record), budget=budget
        )

    def looks_slower(self, record: Record) -> bool:
        """Whether a speed ratio of `record`, of fewer pairs than can be had, is worth more of them.

        Only where the run compares: what is to be stored must not depend on what was stored before.
        """
        if not self.settings.gate or self.settings.update_baseline:
            return False
        entry = self.baselines.entry(record)
        return entry is not None and comparison.looks_slower(record, entry, self._thresholds(record))

    def _thresholds(self, record: Record) -> Thresholds:
        """With the noise between equal models that this run saw of the record's model."""
        of_model = (
            measured
            for measured, _ in self.measured
            if (measured.model, measured.scale) == (record.model, record.scale)
        )
        return Thresholds(aa_noise=comparison.aa_noise(of_model))

    @property
    def gated(self) -> list[tuple[Record, Verdict]]:
        """What was measured and has, or could have, a baseline."""
        return [
            (record, verdict) for record, verdict in self.measured if record.category not in EXTRA_CATEGORIES
        ]

    def fails(self, verdict: Verdict) -> str:
        """Why the test of this cell fails, or an empty text.

        A broken accuracy budget always fails. A regression fails under the gate, unless this run is to store
        its values. A cell without a baseline fails where one is required.
        """
        settings = self.settings
        if verdict.status == Status.BUDGET_EXCEEDED:
            return verdict.message
        if (
            verdict.status == Status.NO_BASELINE
            and settings.require_baseline
            and not settings.update_baseline
        ):
            return "\n".join(str(finding) for finding in verdict.findings) + " (--pio-require-baseline)"
        gated = settings.gate and not settings.update_baseline
        return verdict.message if gated and verdict.failed else ""

    def out_of_time(self) -> str:
        """Why no further cell is begun, or an empty text."""
        budget = self.settings.time_budget
        if budget is None or self.seconds < budget:
            return ""
        return f"not measured: the time budget of {budget:g} s was used up after {self.seconds:.0f} s"

    def fingerprint(self) -> dict[str, Any]:
        return machine.fingerprint(self.settings.device).to_mapping()

    def cell(self, row: Row, category: str) -> CellKey:
        settings = self.settings
        return CellKey(row.model.name, row.scale, row.spec, category, settings.device, settings.dtype)

    def processes(self) -> FreshProcesses:
        """Where peak memory is measured; started once, with as many threads as this process uses."""
        if self._processes is None:
            import torch

            from pytest_inferencepio.measure.processes import FreshProcesses

            self._processes = FreshProcesses(threads=torch.get_num_threads())
        return self._processes

    def close(self) -> None:
        """Drop the models and end the fresh processes."""
        processes, self._processes = self._processes, None
        if processes is not None:
            processes.close()
        self.pairs.release()

    def note(self, cell: CellKey | None, report: pytest.TestReport) -> None:
        """Remember a test that failed, and why its cell has no record."""
        if report.failed:
            self.failures.append(report.nodeid)
        if cell is not None and not report.passed:
            self.reasons.setdefault(cell, reason_of(report))

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def refused(self) -> list[Unmeasured]:
        """The wanted cells whose row a technique refuses, with its reason."""
        return [_unmeasured(cell, why) for cell in self.wanted if (why := self._refusals.get(_row_key(cell)))]

    @property
    def missing(self) -> list[Unmeasured]:
        """The wanted cells that were neither measured nor refused, with what is known about why."""
        known = {baselines.cell_of(record) for record, _ in self.measured}
        return [
            _unmeasured(cell, self.reasons.get(cell, "the run ended before it"))
            for cell in self.wanted
            if cell not in known and _row_key(cell) not in self._refusals
        ]

    @functools.cached_property
    def _refusals(self) -> dict[tuple[str, str, str], str]:
        return {(row.model.name, row.scale, row.spec): row.refusal for row in self.rows if row.refusal}


def _row_key(cell: CellKey) -> tuple[str, str, str]:
    return cell.model, cell.scale, cell.optimization


def _unmeasured(cell: CellKey, reason: str) -> Unmeasured:
    return Unmeasured(cell.model, cell.scale, cell.optimization, cell.category, reason)


def read_baselines(directory: Path) -> baselines.Baselines:
    """The stored baselines (UsageError when a file cannot be used)."""
    try:
        return baselines.read(directory)
    except BaselineError as error:
        raise pytest.UsageError(f"{error}") from error


def baseline_directory(settings: Settings, rootpath: Path) -> Path:
    """Where baselines lie: as told, else `baselines/` of this repository when run inside it, else the shipped ones.

    Raises:
        pytest.UsageError: an update would write into the installed package.
    """
    if settings.baseline_dir is not None:
        return settings.baseline_dir
    if (rootpath / "pytest_inferencepio" / "plugin.py").is_file():
        return rootpath / "baselines"
    if settings.update_baseline:
        raise pytest.UsageError(
            "--pio-update-baseline: this project says nowhere where its baselines are kept; add "
            "--pio-baseline-dir=DIR, or pio_baseline_dir to the ini file"
        )
    shipped = (
        Path(__file__).resolve().parent / "baselines"
    )  # in a wheel; an editable install reads the checkout's
    return shipped if shipped.is_dir() else Path(__file__).resolve().parents[1] / "baselines"


def reason_of(report: pytest.TestReport) -> str:
    """The words of a skip, or the first line of what a test failed with."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else report.longreprtext).strip().splitlines() or ["no message"]
    return f"the test failed: {lines[0]}"
