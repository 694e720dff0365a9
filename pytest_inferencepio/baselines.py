"""Stored runs: one JSON file per model and scale, made to be reviewed as a diff.

A file holds sessions (when, on which machine, from which commit) and cells; a cell holds per metric the values
of up to five sessions of each machine, one metric per line. What varies from run to run keeps its sessions, so
that their spread is known; what is deterministic keeps the last. Absolute times are kept as information.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_inferencepio import baseline_json, sessions
from pytest_inferencepio.baseline_json import BaselineFile, Session, Stored, StoredCell, Value, rounded
from pytest_inferencepio.errors import BaselineError
from pytest_inferencepio.gate_rules import Rule, rule_of, sessions_kept
from pytest_inferencepio.record import Metric, Record
from pytest_inferencepio.sessions import SessionValue
from pytest_inferencepio.verdict import CellKey, Outcome, Status, Verdict

UNKNOWN_MACHINE = "unknown machine"
# Keys of `workload` that are not part of what was asked of the model.
NOT_COMPARED = ("budget",)
NOT_STORED = ("read_bandwidth", "arithmetic", "machine_class", "isa")


@dataclasses.dataclass(frozen=True)
class History:
    """The stored values of one metric that a new value is compared with: all of one machine, oldest first."""

    values: tuple[Value, ...]
    same_machine: bool
    same_isa: bool
    pooled_bias: float = sessions.PRIOR_BIAS  # of the technique's ratios, on all models

    @property
    def latest(self) -> Value:
        return self.values[-1]

    @property
    def center(self) -> float:
        """Median over sessions."""
        ordered = sorted(value.value for value in self.values)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    @property
    def ratios(self) -> list[SessionValue]:
        """The sessions of a ratio with their own noise; what is not positive is left out."""
        return _session_values(self.values)

    @property
    def bias(self) -> float:
        """Standard deviation of a ratio between sessions beyond their noise, shrunk towards the pooled one."""
        return sessions.bias(sessions.moments(self.ratios), self.pooled_bias)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a record is compared with: the workload it was measured on and the history of each metric."""

    cell: CellKey
    workload: Mapping[str, Any]
    metrics: Mapping[str, History]


@dataclasses.dataclass(frozen=True)
class Baselines:
    """All baseline files of a directory, by (model, scale)."""

    directory: Path
    files: Mapping[tuple[str, str], BaselineFile]

    @property
    def cells(self) -> list[CellKey]:
        return [cell for file in self.files.values() for cell in file.cells]

    def entry(self, record: Record) -> Entry | None:
        """What to compare `record` with, values of this machine preferred metric by metric."""
        file = self.files.get((record.model, record.scale))
        cell = cell_of(record)
        stored = file.cells.get(cell) if file else None
        if file is None or stored is None:
            return None
        pooled = self._pooled_bias(file, cell)
        here = (machine_class(record.fingerprint), _isa(record.fingerprint))
        metrics = {name: _history(file, metric, here, pooled) for name, metric in stored.metrics.items()}
        return Entry(cell, stored.workload, metrics)

    def _pooled_bias(self, file: BaselineFile, cell: CellKey) -> float:
        """Standard deviation between sessions of one machine beyond their noise.

        Of the technique's ratios on all models of the scale, shrunk towards that of the file's other techniques: one that
        trades arithmetic for bandwidth follows the state of the machine, one that changes neither does not. Three
        sessions of every technique on two shared cores: native_decoder 3.9 %, weight_nf4 2.6 %, layer_streaming 2.2 %,
        kv_int8, prompt_lookup and the unoptimized model against itself 0.
        """
        alike = [
            (other, key)
            for other in self.files.values()
            for key in other.cells
            if (other.scale, key.optimization, key.category)
            == (file.scale, cell.optimization, _measured_in(cell))
        ]
        others = [
            (file, key)
            for key in file.cells
            if key.optimization != cell.optimization and key.category == _measured_in(key)
        ]
        return sessions.bias(_moments(alike), sessions.bias(_moments(others)))


def cell_of(record: Record) -> CellKey:
    """The address of `record`."""
    return CellKey(
        record.model, record.scale, record.optimization, record.category, record.device, record.dtype
    )


def machine_class(fingerprint: Mapping[str, Any]) -> str:
    """What must be equal for absolute values to be comparable; `machine.machine_class` wrote it."""
    return str(fingerprint.get("machine_class") or UNKNOWN_MACHINE)


def workload_of(record: Record) -> dict[str, Any]:
    """The part of a record's workload that must be equal for two runs to be comparable, as plain JSON types."""
    compared = {key: value for key, value in record.workload.items() if key not in NOT_COMPARED}
    return dict(baseline_json.plain(compared))


def read(directory: Path) -> Baselines:
    """Read every `*.json` of `directory`; a directory that does not exist holds no baselines.

    Raises:
        BaselineError: a file that is corrupt, truncated, of another schema, or names another model.
    """
    files: dict[tuple[str, str], BaselineFile] = {}
    for path in sorted(directory.glob("*.json")) if directory.is_dir() else ():
        file = read_file(path)
        files[file.model, file.scale] = file
    return Baselines(directory, files)


def read_file(path: Path) -> BaselineFile:
    """One baseline file.

    Raises:
        BaselineError: unreadable, not JSON, of another schema, of wrong types, or of another name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BaselineError(f"cannot read baseline {path}: {error}") from error
    file = baseline_json.loads(text, str(path))
    if path.name != file_name(file.model, file.scale):
        raise BaselineError(
            f"baseline {path} holds {file.model} at scale {file.scale}, which belongs into "
            f"{file_name(file.model, file.scale)}; rename it or measure again with --pio-update-baseline"
        )
    return file


def file_name(model: str, scale: str) -> str:
    return f"{model}-{scale}.json"


def write_file(directory: Path, file: BaselineFile) -> Path:
    """Write `file` under `directory` so that a crash leaves the old file or the new one, never a part."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / file_name(file.model, file.scale)
    write_atomically(path, baseline_json.dumps(file))
    return path


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to a temporary file beside `path`, then rename it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)  # mkstemp gives 0600, which would hide the file from a group
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def update(
    baselines: Baselines,
    measured: Sequence[tuple[Record, Verdict]],
    *,
    session: str,
    failures: Sequence[str] = (),
    gone: Collection[CellKey] = (),
) -> list[Path]:
    """Store `measured` as a session named `session` (the moment in ISO 8601, UTC); the files written.

    A regression against the stored values is what an update accepts: the history of such a metric starts anew.
    `failures` are the tests that failed for any other reason, `gone` the cells to drop (`RunVerdict.gone`).

    Raises:
        BaselineError: nothing was measured, a test failed, or an accuracy budget was exceeded.
    """
    _refuse_failing(measured, failures)
    files = dict(baselines.files)
    for record, verdict in measured:
        key = (record.model, record.scale)
        file = files.get(key) or BaselineFile(record.model, record.scale, {}, {})
        files[key] = _with(file, record, verdict, session)
    for cell in gone:
        file = files[cell.model, cell.scale]
        kept = {key: stored for key, stored in file.cells.items() if key != cell}
        files[cell.model, cell.scale] = dataclasses.replace(file, cells=kept)
    changed = [key for key, file in files.items() if file is not baselines.files.get(key)]
    return [write_file(baselines.directory, files[key].pruned()) for key in changed]


def _refuse_failing(measured: Sequence[tuple[Record, Verdict]], failures: Sequence[str]) -> None:
    if not measured:
        raise BaselineError("no benchmark was measured, so there is nothing to store as a baseline")
    over = [str(v.cell) for _, v in measured if v.status == Status.BUDGET_EXCEEDED]
    broken = [*failures, *over]
    if broken:
        listed = "\n  ".join(broken[:20])
        raise BaselineError(
            f"a failing run never becomes a baseline; {len(broken)} failed, nothing was written:\n  {listed}"
        )


def _with(file: BaselineFile, record: Record, verdict: Verdict, session: str) -> BaselineFile:
    cell, workload = cell_of(record), workload_of(record)
    machine = machine_class(record.fingerprint)
    sessions = {**file.sessions, session: _session(record, machine)}
    old = file.cells.get(cell)
    known = dict(old.metrics) if old and old.workload == workload else {}
    moved = {f.metric for f in verdict.of(Outcome.REGRESSION, Outcome.IMPROVED)}
    for name, value in record.metrics.items():
        if value.measured:
            earlier = known.get(name) or Stored(value.unit, value.better, {})
            kept = _kept(earlier, sessions, machine, name, anew=name in moved)
            known[name] = dataclasses.replace(earlier, values={**kept, session: _value(name, value)})
    here = {name: value for name, value in known.items() if name in record.metrics}
    cells = {**file.cells, cell: StoredCell(workload, here)}
    return dataclasses.replace(file, sessions=sessions, cells=cells)


def _kept(
    stored: Stored, sessions: Mapping[str, Session], machine: str, name: str, *, anew: bool
) -> dict[str, Value]:
    """The values that stay beside a new one: all of other machines, the last few of this one."""
    foreign = {key: value for key, value in stored.values.items() if sessions[key].machine != machine}
    own = [key for key in stored.values if key not in foreign]
    recent = [] if anew else own[len(own) - min(len(own), sessions_kept(name) - 1) :]
    return {**foreign, **{key: stored.values[key] for key in recent}}


def _value(name: str, value: Metric) -> Value:
    assert value.value is not None
    examples = ""
    if rule_of(name) == Rule.TASK and set(value.samples) <= {0.0, 1.0}:
        examples = "".join(str(int(sample)) for sample in value.samples)
    low, high = (None if bound is None else rounded(bound) for bound in (value.low, value.high))
    return Value(rounded(value.value), low, high, value.n, examples)


def _session(record: Record, machine: str) -> Session:
    """The fingerprint without its measured rates: they differ from run to run and would fill every diff."""
    told = {key: value for key, value in record.fingerprint.items() if key not in NOT_STORED}
    return Session(machine, _isa(record.fingerprint), baseline_json.plain(told))


def _isa(fingerprint: Mapping[str, Any]) -> str:
    return str(fingerprint.get("isa", ""))


def _history(file: BaselineFile, metric: Stored, here: tuple[str, str], pooled: float) -> History:
    """Values of this machine; else of the machine measured last, one of this instruction set preferred."""
    machine, isa = here

    def rank(key: str) -> tuple[bool, bool, str]:
        session = file.sessions[key]
        return session.machine == machine != UNKNOWN_MACHINE, session.isa == isa, key

    best = file.sessions[max(metric.values, key=rank)]
    values = [
        metric.values[key] for key in sorted(metric.values) if file.sessions[key].machine == best.machine
    ]
    return History(tuple(values), best.machine == machine != UNKNOWN_MACHINE, best.isa == isa, pooled)


def _measured_in(cell: CellKey) -> str:
    """The category whose samples a cell's ratios are: optimization_impact has inference_speed's once more."""
    return "inference_speed" if cell.category == "optimization_impact" else cell.category


def _moments(cells: Iterable[tuple[BaselineFile, CellKey]]) -> sessions.Moments:
    """What the sessions of all ratios of `cells` say about the variance between sessions of one machine."""
    return sessions.pooled(
        sessions.moments(_session_values(values))
        for file, cell in cells
        for name, metric in file.cells[cell].metrics.items()
        if rule_of(name) == Rule.RATIO
        for values in _by_machine(file, metric)
    )


def _by_machine(file: BaselineFile, metric: Stored) -> Iterable[list[Value]]:
    def machine(key: str) -> str:
        return file.sessions[key].machine

    for _, keys in itertools.groupby(sorted(metric.values, key=machine), key=machine):
        yield [metric.values[key] for key in keys]


def _session_values(values: Iterable[Value]) -> list[SessionValue]:
    found = (sessions.session_value(value.value, value.low, value.high) for value in values)
    return [value for value in found if value is not None]
