"""Where memory is asked for ahead: a choice by the processor's caches that must not change a bit of any result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from optimizations.native.dense import dense_linear
from optimizations.native.experts import pack_experts
from optimizations.native.linear import linear, moe
from optimizations.native.loader import native
from optimizations.native.lossless import lossless_linear, pack_lossless
from optimizations.native.packed_heads import packed_head_linear
from optimizations.native.packing import pack

FIRST_LEVEL = Path("/sys/devices/system/cpu/cpu0/cache/index0")


@pytest.fixture
def choice() -> Iterator[None]:
    before = native().few_ways()
    yield
    native().set_few_ways(before)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)


def packed(rows: int, bits: int, group: int) -> Tensor:
    weight = pack(draw(16 * 23 + 5, 330), bits=bits, group_size=group)
    return linear(draw(rows, 330), weight)


def heads(rows: int, transposed: bool) -> Tensor:
    weight, x = pack(draw(3 * 112, 96), bits=4), draw(1, 3, rows, 48 if transposed else 96)
    return packed_head_linear(x, weight, 3, 64 if transposed else 0, 48, transposed)


def experts(rows: int) -> Tensor:
    """All tokens choose the same two of three experts of 300 x 530."""
    weights = pack_experts(draw(3, 600, 530), draw(3, 530, 300), bits=4)
    chosen = torch.tensor([[2, 0]]).expand(rows, -1).contiguous()
    return moe(draw(rows, 530), chosen, torch.full((rows, 2), 0.5), weights)


def dense(rows: int) -> Tensor:
    return dense_linear(draw(rows, 330), draw(300, 330))


def lossless(rows: int) -> Tensor:
    return lossless_linear(draw(rows, 330), pack_lossless(draw(300, 330)))


def read() -> Tensor:
    memory = torch.arange(64 * 1009, dtype=torch.int32)
    return torch.tensor(native().stream_read(memory.data_ptr(), memory.nbytes, 1))


CALLS = {
    "int4": lambda rows: packed(rows, 4, 32),
    "int4 g128": lambda rows: packed(rows, 4, 128),
    "int8": lambda rows: packed(rows, 8, 64),
    "keys": lambda rows: heads(rows, True),
    "values": lambda rows: heads(rows, False),
    "experts": experts,
    "bf16": dense,
    "12 bits": lossless,
}


@pytest.mark.usefixtures("choice", "isa")
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_both_ways_give_the_same_bits(call: Callable[[int], Tensor], rows: int) -> None:
    """Up to six rows meet weights in streams, the seventh makes them a batch."""
    native().set_few_ways(False)
    near = call(rows)
    native().set_few_ways(True)
    assert torch.equal(call(rows), near)
    assert near.any()


@pytest.mark.usefixtures("choice", "isa")
def test_both_ways_read_the_same() -> None:
    native().set_few_ways(False)
    near = read()
    native().set_few_ways(True)
    assert torch.equal(read(), near)
    assert near.any()


@pytest.mark.skipif(
    not (FIRST_LEVEL / "ways_of_associativity").is_file(), reason="the system does not describe its caches"
)
def test_the_choice_follows_the_first_level_data_cache() -> None:
    if (FIRST_LEVEL / "type").read_text().strip() != "Data" or native().available_isas() == ["portable"]:
        pytest.skip("the first cache described is not the data cache, or CPUID is not asked")
    ways = int((FIRST_LEVEL / "ways_of_associativity").read_text())
    assert native().few_ways() == (ways < 12)
