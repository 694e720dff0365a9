"""Hooks of a run with --pio-model; registered only then."""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import warnings
from collections.abc import Generator

import pytest

from pytest_inferencepio import collection, extensions, guards, options, reporting, selection, session
from pytest_inferencepio.extensions import Extensions
from pytest_inferencepio.measurement import category_of
from pytest_inferencepio.options import Settings
from pytest_inferencepio.pairs import Pairs
from pytest_inferencepio.parametrize import ROW
from pytest_inferencepio.run_key import RUN
from pytest_inferencepio.session import Run
from pytest_inferencepio.verdict import CellKey

_PLACES = {"memory_usage": 0, "comparative": 2}  # of a category in its row; the others are 1


def start(config: pytest.Config) -> None:
    """Check the circumstances, resolve every name, make the run; nothing is loaded or measured yet.

    Raises:
        pytest.UsageError: a circumstance that would mislead, a name that does not exist, a baseline that cannot
            be read.
    """
    guards.check_tools(config)
    guards.check_compare(config)
    settings = options.read(config)
    guards.check_optimizations()
    guards.check_device(settings)
    config.stash[RUN] = _run(config, settings, extensions.collect(config))
    guards.settle_compare(config)
    config.args, config.stash[RUN].whole = collection.arguments(config)
    config.pluginmanager.register(sys.modules[__name__], "pio-active")


def _run(config: pytest.Config, settings: Settings, added: Extensions) -> Run:
    models = selection.choose_models(settings, added.models)
    checkpoints = selection.resolve_checkpoints(settings, added.models)
    compositions = selection.choose_compositions(settings.optimizations)
    directory = session.baseline_directory(settings, config.rootpath)
    return Run(
        settings=settings,
        rows=selection.rows(settings, models, compositions),
        pairs=Pairs(settings, checkpoints),
        baselines=session.read_baselines(directory),
        workloads=added.workloads(settings.scales),
    )


def pytest_report_header(config: pytest.Config) -> list[str]:
    return reporting.header(config.stash[RUN])


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Put the suite before what the command line names."""
    report = yield
    if isinstance(collector, pytest.Session) and collector.config.stash[RUN].whole and report.passed:
        report.result.insert(0, collection.suite(collector))
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop what --pio-category leaves out, and bring the tests of a row together."""
    run = config.stash[RUN]
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        category = collection.category_of(item)
        (kept if category is None or category in run.settings.categories else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
    for item in kept:
        if collection.category_of(
            item
        ):  # a warning of a library is no regression, whatever the ini file says
            item.add_marker(pytest.mark.filterwarnings("default"))
    items[:] = sorted(kept, key=_order)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is collected now is what the run is to measure."""
    run = session.config.stash[RUN]
    run.wanted.extend(cell for item in session.items if (cell := _cell(item)))


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Keep what is imported out of garbage collections: each round begins with one, and torch and transformers hold
    360,000 objects (a collection takes 0.2 s with them and 5 us without), torch's compiler another 80,000."""
    if session.items and not session.config.option.collectonly:
        _import_first(session.config.stash[RUN])
    if gc.get_freeze_count():  # somebody around this run did so already, and unfreezing would undo theirs
        return (yield)
    gc.collect()
    gc.freeze()
    try:
        return (yield)
    finally:
        gc.unfreeze()


def _import_first(run: Run) -> None:
    """What the techniques of this run import when applied. Warnings of a library are no regression, and what cannot be
    imported its technique will say."""
    names = {name for row in run.rows if not row.refusal for part in row.parts for name in part.imports}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in sorted(names):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def pytest_deselected(items: list[pytest.Item]) -> None:
    """-k, -m, --deselect and --lf take cells out on purpose: they are not missing."""
    for item in items:
        if found := _cell(item):
            item.config.stash[RUN].deselected.append(found)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """No further cell is begun once the time budget is used up."""
    run = item.config.stash[RUN]
    if _cell(item) is not None and (reason := run.out_of_time()):
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note every failure: a run with one never becomes a baseline."""
    report = yield
    item.config.stash[RUN].note(_cell(item), report)
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int | pytest.ExitCode) -> None:
    """Judge the run as a whole, store baselines and reports; after Ctrl-C too."""
    run = session.config.stash[RUN]
    run.close()
    if session.config.option.collectonly:
        return
    complete = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not session.shouldstop
    if reporting.finish(session.config, run, complete=complete) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.option.collectonly:
        reporting.show(config, terminalreporter)


def _order(item: pytest.Item) -> tuple[int, int]:
    """By row, and in a row memory first, since at full scale its fresh processes need the room that models take, and
    peers last, since they may need the room of the unoptimized model."""
    run = item.config.stash[RUN]
    cell = _cell(item)
    if cell is None:
        return len(run.rows), 0
    rows = [(row.model.name, row.scale, row.spec) for row in run.rows]
    return rows.index((cell.model, cell.scale, cell.optimization)), _PLACES.get(cell.category, 1)


def _cell(item: pytest.Item) -> CellKey | None:
    """The cell that `item` measures; None for tests without a row."""
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return None
    row_id = item.callspec.params.get(ROW)
    if not isinstance(row_id, str):
        return None
    run = item.config.stash[RUN]
    return run.cell(run.row(row_id), category_of(item.originalname))
