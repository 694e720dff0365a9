"""Where a run's state hangs on pytest's configuration; apart, so that asking for it imports nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_inferencepio.session import Run

RUN: pytest.StashKey[Run] = pytest.StashKey()
