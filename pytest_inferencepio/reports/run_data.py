"""What the reports are made from: everything one run measured, refused, missed and decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_inferencepio.gate_run import RunVerdict
from pytest_inferencepio.record import Record
from pytest_inferencepio.verdict import Finding, NotMeasured, Outcome, Status, Verdict


@dataclasses.dataclass(frozen=True)
class RunData:
    """One run. `missing` was wanted and not measured; `seconds` is the whole run.

    `gated` is False when regressions were reported without failing a test.
    """

    measured: Sequence[tuple[Record, Verdict]]
    refused: Sequence[NotMeasured] = ()
    missing: Sequence[NotMeasured] = ()
    run: RunVerdict | None = None
    seconds: float = 0.0
    fingerprint: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    updated: Sequence[Path] = ()
    gated: bool = True

    @property
    def verdicts(self) -> list[Verdict]:
        return [verdict for _, verdict in self.measured]

    def findings(self, *outcomes: Outcome) -> list[Finding]:
        """Findings of all cells with one of `outcomes`, in the order of the run."""
        return [finding for verdict in self.verdicts for finding in verdict.of(*outcomes)]

    @property
    def status_counts(self) -> dict[Status, int]:
        """How many cells have each verdict, zeros included."""
        return {status: sum(verdict.status == status for verdict in self.verdicts) for status in Status}

    @property
    def failed(self) -> bool:
        """A cell or the run failed, or would have under the gate."""
        return any(verdict.failed for verdict in self.verdicts) or bool(self.run and self.run.failures)

    @property
    def record_notes(self) -> list[str]:
        """Notes of the run, of the comparison and of the records, each once, each with its cells counted."""
        told: dict[str, list[str]] = {}
        for record, _ in self.measured:
            for note in record.notes:
                told.setdefault(note, []).append(record.cell)
        of_cells = [
            f"{cells[0]}: {note}" if len(cells) == 1 else f"{len(cells)} cells ({cells[0]}, ...): {note}"
            for note, cells in told.items()
        ]
        return [*self.notes, *(self.run.notes if self.run else ()), *of_cells]
