"""Packed weights on AMX: integer sums are exact and the float operations the same, so the bits must be AVX-512's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from optimizations.native.experts import pack_experts
from optimizations.native.linear import linear, moe
from optimizations.native.loader import native
from optimizations.native.packing import pack

pytestmark = pytest.mark.skipif(
    "amx" not in native().available_isas(), reason="this processor or system has no AMX"
)


@pytest.fixture(autouse=True)
def same_set_afterwards() -> Iterator[None]:
    before = native().isa()
    yield
    native().set_isa(before)


def on_both(call: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    results = []
    for name in ("avx512", "amx"):
        native().set_isa(name)
        results.append(call())
    return results[0], results[1]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("m", "rows", "cols"), [(1, 40, 96), (7, 16, 32), (16, 33, 130), (55, 100, 300)])
def test_linear(
    bits: int, group_size: int, m: int, rows: int, cols: int, threads: int, generator: torch.Generator
) -> None:
    weight = pack(torch.randn(rows, cols, generator=generator), bits=bits, group_size=group_size)
    x = torch.randn(m, cols, generator=generator)
    vectors, tiles = on_both(lambda: linear(x, weight))
    assert torch.equal(vectors, tiles)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("experts", "k"), [(2, 1), (5, 3)])
def test_experts_gather_rows_that_do_not_lie_together(
    bits: int, experts: int, k: int, generator: torch.Generator
) -> None:
    gate_up = torch.randn(experts, 2 * 40, 96, generator=generator) * 0.1
    packed = pack_experts(gate_up, torch.randn(experts, 96, 40, generator=generator) * 0.1, bits=bits)
    x = torch.randn(61, 96, generator=generator)
    weights, chosen = torch.rand(61, experts, generator=generator).topk(k)
    vectors, tiles = on_both(lambda: moe(x, chosen, weights, packed))
    assert torch.equal(vectors, tiles)
