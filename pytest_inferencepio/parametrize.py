"""One benchmark test becomes one test per row of the selection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_inferencepio.run_key import RUN

if TYPE_CHECKING:
    from _pytest.mark import ParameterSet

    from pytest_inferencepio.selection import Row

ROW = "pio_row"
NOT_ASKED = "measures models, and --pio-model says which: add --pio-model=all, or names of --pio-list"


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Give a test that uses any of the plugin's fixtures its rows; without --pio-model it is skipped in words."""
    if ROW not in metafunc.fixturenames:
        return
    run = metafunc.config.stash.get(RUN, None)
    if run is None:
        parameters = [pytest.param("", id="no-model", marks=pytest.mark.skip(reason=NOT_ASKED))]
    else:
        parameters = [_parameter(row) for row in run.rows]
    metafunc.parametrize(ROW, parameters, indirect=True, scope="session")


def _parameter(row: Row) -> ParameterSet:
    """A refused row is collected and skipped with its reason, so that no report can overlook it."""
    marks = [pytest.mark.skip(reason=row.refusal)] if row.refusal else []
    return pytest.param(row.id, id=row.id, marks=marks)
