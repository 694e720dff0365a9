"""Where memory is asked for ahead: a choice by the processor's caches that must not change a bit of any result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from optimizations.native.dense import dense_linear
from optimizations.native.linear import linear
from optimizations.native.loader import native
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


def packed(bits: int, group: int) -> Callable[[], Tensor]:
    weight, x = pack(draw(16 * 23 + 5, 330), bits=bits, group_size=group), draw(1, 330)
    return lambda: linear(x, weight)


def heads(transposed: bool) -> Callable[[], Tensor]:
    weight, x = pack(draw(3 * 112, 96), bits=4), draw(1, 3, 1, 48 if transposed else 96)
    return lambda: packed_head_linear(x, weight, 3, 64 if transposed else 0, 48, transposed)


def dense() -> Tensor:
    return dense_linear(draw(1, 330), draw(77, 330))


def read() -> Tensor:
    memory = torch.arange(64 * 1009, dtype=torch.int32)
    return torch.tensor(native().stream_read(memory.data_ptr(), memory.nbytes, 1))


@pytest.mark.usefixtures("choice", "isa")
@pytest.mark.parametrize(
    "call",
    [packed(4, 32), packed(4, 128), packed(8, 64), heads(True), heads(False), dense, read],
    ids=["int4", "int4 g128", "int8", "keys", "values", "bf16", "read"],
)
def test_both_ways_give_the_same_bits(call: Callable[[], Tensor]) -> None:
    native().set_few_ways(False)
    near = call()
    native().set_few_ways(True)
    assert torch.equal(call(), near)
    assert near.any()


@pytest.mark.skipif(
    not (FIRST_LEVEL / "ways_of_associativity").is_file(), reason="the system does not describe its caches"
)
def test_the_choice_follows_the_first_level_data_cache() -> None:
    if (FIRST_LEVEL / "type").read_text().strip() != "Data" or native().available_isas() == ["portable"]:
        pytest.skip("the first cache described is not the data cache, or CPUID is not asked")
    ways = int((FIRST_LEVEL / "ways_of_associativity").read_text())
    assert native().few_ways() == (ways < 12)
