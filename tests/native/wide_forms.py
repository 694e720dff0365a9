"""The ways in which many bf16 rows are multiplied, one per instruction set and width of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
from torch import Tensor

from optimizations.native.loader import native
from optimizations.native.reference_wide import byte_rows, integer_rows

LEAST = 32  # rows, of a call or an expert


@dataclasses.dataclass(frozen=True)
class Wide:
    """A way in which many bf16 rows are multiplied."""

    isa: str
    bits: int  # of the weights
    rows: Callable[[Tensor], Tensor]  # their values as they are multiplied


WIDE = [
    Wide("amx", 8, lambda x: x.double()),
    Wide("amx", 4, byte_rows),
    Wide("avx512", 4, integer_rows),
]


@pytest.fixture(params=WIDE, ids=lambda wide: f"{wide.isa}-int{wide.bits}")
def wide(request: pytest.FixtureRequest) -> Iterator[Wide]:
    """Every way of the machine's, its instruction set in use."""
    if request.param.isa not in native().available_isas():
        pytest.skip(f"this processor or system has no {request.param.isa}")
    before = native().isa()
    native().set_isa(request.param.isa)
    yield request.param
    native().set_isa(before)
