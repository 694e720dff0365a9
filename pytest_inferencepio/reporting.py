"""From a finished run to its verdict as a whole, its baselines, its files and its lines on the terminal."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from pytest_inferencepio import baselines, gate_run
from pytest_inferencepio.errors import BaselineError
from pytest_inferencepio.naming import EXTRA_CATEGORIES
from pytest_inferencepio.reports import files, terminal
from pytest_inferencepio.reports.run_data import RunData
from pytest_inferencepio.run_key import RUN
from pytest_inferencepio.session import Run

DATA: pytest.StashKey[RunData] = pytest.StashKey()
REFUSED_UPDATE: pytest.StashKey[str] = pytest.StashKey()


def header(run: Run) -> list[str]:
    """What is about to be measured, and what it is compared with."""
    models = len({row.model.name for row in run.rows})
    settings = run.settings
    size = f"{models} models, {len(run.rows)} rows, {len(settings.categories)} categories"
    how = f"{', '.join(settings.scales)} scale, {settings.device}, {settings.dtype}, seed {settings.seed}"
    role = "gate" if settings.gate else "comparison only (--benchmark-compare makes it a gate)"
    stored = f"baselines {run.baselines.directory} ({len(run.baselines.cells)} cells)"
    peers = [f"pio: peers: {'; '.join(_peers(settings.peers))}"] if settings.peers else []
    return [f"pio: {size}; {how}", f"pio: {role}, {stored}", *peers]


def _peers(names: Iterable[str]) -> Iterator[str]:
    """Each peer with its version, or with what to install."""
    from pytest_inferencepio.peers.registry import peers

    known = peers()
    for name in names:
        yield known[name].missing() or f"{name} ({known[name].version()})"


def finish(config: pytest.Config, run: Run, *, complete: bool) -> bool:
    """Judge the run, store baselines if asked to, write the report files; True when the run as a whole failed."""
    verdict = gate_run.compare_run(
        run.gated,
        run.baselines,
        _selection(run),
        refused=run.refused,
        complete=complete and run.whole and run.settings.time_budget is None,
        gated=run.settings.gate,
    )
    updated: list[Path] = []
    failed = run.settings.gate and not run.settings.update_baseline and bool(verdict.failures)
    if run.settings.update_baseline:
        try:
            updated = _update(run, verdict, complete=complete)
        except BaselineError as error:
            config.stash[REFUSED_UPDATE] = f"baselines were not updated: {error}"
            failed = True
    data = RunData(
        measured=run.measured,
        refused=run.refused,
        missing=run.missing,
        run=verdict,
        seconds=run.seconds,
        fingerprint=run.fingerprint() if run.measured else {},
        updated=updated,
        gated=run.settings.gate,
    )
    config.stash[DATA] = data
    if run.settings.report is not None:
        files.write(run.settings.report, data)
    return failed


def show(config: pytest.Config, reporter: pytest.TerminalReporter) -> None:
    """The impact report, and where the files are."""
    data = config.stash.get(DATA, None)
    if data is None:
        return
    terminal.write(reporter, data)
    if refusal := config.stash.get(REFUSED_UPDATE, None):
        reporter.write_line(refusal, red=True)
    if (directory := config.stash[RUN].settings.report) is not None:
        reporter.write_line(f"report: {directory}/summary.json, report.md, coverage.json")


def _selection(run: Run) -> gate_run.Selection:
    """What of the baselines this run should have measured; None where everything was asked for."""
    settings = run.settings
    everything = {"all"} & set(settings.optimizations)
    return gate_run.Selection(
        models=None if "all" in settings.models else {row.model.name for row in run.rows},
        scales=set(settings.scales),
        optimizations=None if everything else {row.spec for row in run.rows},
        categories=set(settings.categories),
        devices={settings.device},
        dtypes={settings.dtype},
        deselected=run.deselected,
    )


def _update(run: Run, verdict: gate_run.RunVerdict, *, complete: bool) -> list[Path]:
    if not complete:
        raise BaselineError("the run was interrupted; run it to its end, or select fewer cells")
    if run.measured and not run.gated:
        raise BaselineError(
            f"only {' and '.join(EXTRA_CATEGORIES)} were measured; they tell of this machine and of other engines and "
            "are not stored; add a category to --pio-category"
        )
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return baselines.update(run.baselines, run.gated, session=now, failures=run.failures, gone=verdict.gone)
