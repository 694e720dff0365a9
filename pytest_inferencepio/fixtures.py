"""Fixtures of the shipped suite and for users' own benchmark tests. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from pytest_inferencepio.run_key import RUN

if TYPE_CHECKING:
    from optimizations.contract import Optimization
    from optimizations.runner import Runner
    from pytest_inferencepio.measurement import Measurement
    from pytest_inferencepio.models import Model
    from pytest_inferencepio.pairs import Pair
    from pytest_inferencepio.selection import Row
    from pytest_inferencepio.session import Run


@pytest.fixture(scope="session")
def pio_run(pytestconfig: pytest.Config) -> Run:
    """The state of this run; only with --pio-model."""
    return pytestconfig.stash[RUN]


@pytest.fixture(scope="session")
def pio_row(request: pytest.FixtureRequest, pio_run: Run) -> Iterator[Row]:
    """The row (model, scale, composition) that this test measures; its models are dropped after the last test."""
    row = pio_run.row(request.param)
    yield row
    pio_run.pairs.release(keep_reference_of=row)


@pytest.fixture(scope="session")
def pio_model(pio_row: Row) -> Model:
    """The model that this test measures: its name, catalog entry, configuration."""
    return pio_row.model


@pytest.fixture(scope="session")
def pio_optimization(pio_row: Row) -> tuple[Optimization, ...]:
    """The optimizations in force, in order of composition; empty for the unoptimized model."""
    return pio_row.parts


@pytest.fixture(scope="session")
def pio_pair(pio_row: Row, pio_run: Run) -> Pair:
    """Both sides of the row, loaded."""
    from pytest_inferencepio.measurement import loaded_pair

    return loaded_pair(pio_run, pio_row)


@pytest.fixture(scope="session")
def pio_runner(pio_pair: Pair) -> Runner:
    """The optimized model, ready to be driven."""
    return pio_pair.after


@pytest.fixture(scope="session")
def pio_reference(pio_pair: Pair) -> Runner:
    """The unoptimized model; a test that needs it is skipped, in words, where it does not fit."""
    if pio_pair.before is None:
        pytest.skip(pio_pair.why_no_before)
    return pio_pair.before


@pytest.fixture
def pio_measure(
    request: pytest.FixtureRequest, pio_run: Run, pio_row: Row, benchmark: Any
) -> Iterator[Measurement]:
    """Timing of both sides and the conclusion: record, comparison, failure on a regression."""
    from pytest_inferencepio.measurement import Measurement, category_of

    measurement = Measurement(pio_run, pio_row, benchmark, category_of(request.node.originalname))
    yield measurement
    if not measurement.concluded:  # the report says why; that nothing was timed is no further news
        benchmark.skipped = True
