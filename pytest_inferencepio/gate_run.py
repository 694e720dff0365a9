"""A whole run against the whole baseline: what is missing, renamed, new; whether anything was compared at all."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence

from pytest_inferencepio.baseline_json import Session
from pytest_inferencepio.baselines import UNKNOWN_MACHINE, Baselines, cell_of, machine_class, workload_of
from pytest_inferencepio.record import Record
from pytest_inferencepio.verdict import ACCEPT, CellKey, NotMeasured, Status, Verdict


@dataclasses.dataclass(frozen=True)
class Selection:
    """What the run was asked to cover; None means all. `optimizations` are canonical specs, `none` included.

    `deselected` are cells taken out by -k, -m, --deselect or --lf: the user did not ask for them.
    """

    models: Collection[str] | None = None
    scales: Collection[str] | None = None
    optimizations: Collection[str] | None = None
    categories: Collection[str] | None = None
    devices: Collection[str] | None = None
    dtypes: Collection[str] | None = None
    deselected: Collection[CellKey] = ()

    def covers(self, cell: CellKey) -> bool:
        wanted = (
            (self.models, cell.model),
            (self.scales, cell.scale),
            (self.optimizations, cell.optimization),
            (self.categories, cell.category),
            (self.devices, cell.device),
            (self.dtypes, cell.dtype),
        )
        return cell not in self.deselected and all(names is None or name in names for names, name in wanted)


@dataclasses.dataclass(frozen=True)
class RunVerdict:
    """The verdict about a run.

    `missing` maps cells of the baseline that did not run to the reason, `renamed` cells of the baseline to the
    new cell that looks like them; `gone` are those that an update of the baseline drops. Each failure in
    `failures` is one sentence; `notes` fail nothing.
    """

    verdicts: tuple[Verdict, ...]
    missing: Mapping[CellKey, str]
    renamed: Mapping[CellKey, CellKey]
    new: tuple[CellKey, ...]
    gone: tuple[CellKey, ...]
    failures: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def failed(self) -> bool:
        return bool(self.failures) or any(verdict.failed for verdict in self.verdicts)


def compare_run(
    measured: Sequence[tuple[Record, Verdict]],
    baselines: Baselines,
    selection: Selection,
    *,
    refused: Sequence[NotMeasured] = (),
    complete: bool = True,
    gated: bool = True,
) -> RunVerdict:
    """Judge the run as a whole; the cells were judged one by one with `comparison.compare`.

    Args:
        measured: every record with its verdict.
        selection: which cells of the baseline this run should have measured.
        refused: what was not measured because a technique refused it.
        complete: False after Ctrl-C, -x or a spent time budget: cells that did not run are then notes.
        gated: whether the run was asked to compare; then having compared nothing is a failure, else a note.
    """
    ran = {cell_of(record) for record, _ in measured}
    expected = {cell for cell in baselines.cells if selection.covers(cell)}
    new = tuple(cell for cell in (cell_of(record) for record, _ in measured) if cell not in baselines.cells)
    renamed = _renamed(sorted(expected - ran, key=str), measured, baselines)
    gone = [cell for cell in sorted(expected - ran, key=str) if cell not in renamed]
    reasons = {cell: refusal.reason for cell in gone for refusal in refused if _same_cell(cell, refusal)}
    missing = {cell: reasons.get(cell, "did not run") for cell in gone}
    excused = _excused(missing, reasons, measured, baselines, complete=complete)
    failures = [
        f"{cell} is in the baseline and was selected, but: {why}; {ACCEPT}"
        for cell, why in missing.items()
        if cell not in excused
    ]
    failures += [f"{old} is now called {now}; {ACCEPT}" for old, now in renamed.items()]
    nothing_compared = _zero_overlap(ran, baselines)
    failures += nothing_compared if gated else []
    notes = [] if gated else nothing_compared
    notes += [
        f"{cell} was not compared: {why} ({excused[cell]})"
        for cell, why in missing.items()
        if cell in excused
    ]
    dropped = tuple(cell for cell in (*missing, *renamed) if cell not in excused)
    verdicts = tuple(verdict for _, verdict in measured)
    return RunVerdict(verdicts, missing, renamed, new, dropped, tuple(failures), tuple(notes))


def _same_cell(cell: CellKey, other: NotMeasured) -> bool:
    """Device and type are those of the run on both sides."""
    names = (cell.model, cell.scale, cell.optimization, cell.category)
    return names == (other.model, other.scale, other.optimization, other.category)


def _zero_overlap(ran: Collection[CellKey], baselines: Baselines) -> list[str]:
    """A gate that compares nothing must not look like one that found nothing."""
    if not ran or not baselines.cells or any(cell in ran for cell in baselines.cells):
        return []
    example = difflib.get_close_matches(
        str(min(ran, key=str)), [str(cell) for cell in baselines.cells], n=1, cutoff=0
    )
    text = (
        f"none of the {len(ran)} benchmarks of this run is in the baseline {baselines.directory} "
        f"({len(baselines.cells)} cells): nothing was compared. This run has for instance "
        f"{min(ran, key=str)}, the baseline {example[0]}. Run the names that are stored, or store these with "
        "--pio-update-baseline"
    )
    return [text]


def _renamed(
    gone: Sequence[CellKey], measured: Sequence[tuple[Record, Verdict]], baselines: Baselines
) -> dict[CellKey, CellKey]:
    """Cells of the baseline that are gone while a new one differs in the optimization's name alone, on the same
    workload. Guesses only where there is exactly one such new cell, the nearest by name."""
    fresh = {cell_of(record): record for record, _ in measured if cell_of(record) not in baselines.cells}
    found: dict[CellKey, CellKey] = {}
    for old in gone:
        stored = baselines.files[old.model, old.scale].cells[old]
        alike = {
            now.optimization: now
            for now, record in fresh.items()
            if dataclasses.replace(now, optimization=old.optimization) == old
            and workload_of(record) == stored.workload
            and now not in found.values()
        }
        nearest = difflib.get_close_matches(old.optimization, alike, n=2, cutoff=0.5)
        if len(nearest) == 1:
            found[old] = alike[nearest[0]]
    return found


def _excused(
    missing: Mapping[CellKey, str],
    refused: Collection[CellKey],
    measured: Sequence[tuple[Record, Verdict]],
    baselines: Baselines,
    *,
    complete: bool,
) -> dict[CellKey, str]:
    """Missing cells that fail nothing, with the reason: an incomplete run, a refusal on another machine."""
    if not complete:
        return dict.fromkeys(missing, "the run was not completed")
    here = {machine_class(record.fingerprint) for record, _ in measured} - {UNKNOWN_MACHINE}
    stored_here = {
        cell for cell in missing if here & {session.machine for session in _sessions_of(cell, baselines)}
    }
    return {
        cell: "its baseline is of another machine"
        for cell in missing
        if cell in refused and cell not in stored_here
    }


def _sessions_of(cell: CellKey, baselines: Baselines) -> list[Session]:
    file = baselines.files[cell.model, cell.scale]
    keys = {key for metric in file.cells[cell].metrics.values() for key in metric.values}
    return [file.sessions[key] for key in keys]


def without_baseline(verdicts: Sequence[Verdict]) -> list[CellKey]:
    """The cells that were compared with nothing."""
    return [verdict.cell for verdict in verdicts if verdict.status == Status.NO_BASELINE]
