"""Heads of a packed weight on every instruction set, against float64 over its dequantized values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from optimizations.native.packed_heads import packed_head_linear
from optimizations.native.packing import Packed, pack
from optimizations.native.reference import round_activations, unpack

DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8}
# Integers of 15 bits: half a step is 2^-14.99 of the largest product of x and scale in a group of columns.
PARTS = 2.0**-14.9


def packed(
    heads: int, between: int, cols: int, bits: int, group: int, generator: torch.Generator
) -> tuple[Packed, Tensor]:
    """A packed weight and its values, float64 [heads, between, cols]."""
    weight = torch.randn((heads * between, cols), generator=generator) * 0.05
    weight[::7] *= 20  # scales of rows differ
    made = pack(weight, bits=bits, group_size=group)
    return made, unpack(made).double().view(heads, between, cols)


Shape = tuple[int, int, int, int, int, int, int]  # batch, heads, tokens, between, first, rows, cols
SHAPES: list[Shape] = [
    (1, 3, 1, 48, 0, 32, 64),
    (2, 2, 3, 64, 16, 48, 40),
    (1, 20, 1, 448, 0, 192, 512),
    (1, 2, 9, 448, 192, 256, 512),
    (3, 1, 2, 512, 0, 512, 130),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 32), (8, 64)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transposed_matches_float64(
    isa: str, shape: Shape, bits: int, group: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    batch, heads, tokens, between, first, rows, cols = shape
    weight, values = packed(heads, between, cols, bits, group, generator)
    x = torch.randn((batch, heads, tokens, rows), generator=generator).to(dtype)
    got = packed_head_linear(x, weight, heads, first, rows, transposed=True)
    part = values[:, first : first + rows]
    exact = x.double() @ part
    # |error| of a product: PARTS of the group's largest |x scale|, times the level, which is at most 8 or 128.
    levels = part.abs().amax(-1, keepdim=True)  # at least level x scale, so x times it bounds x scale x level
    loss = PARTS * (x.double().abs() * levels[..., 0][None, :, None]).amax(-1, keepdim=True) * rows
    assert got.dtype == dtype
    assert ((got.double() - exact).abs() <= ROUNDING[dtype] * exact.abs() + loss).all()
    typical = (got.double() - exact).norm() / exact.norm()
    assert typical < (2e-4 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 32)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_match_float64_over_rounded_activations(
    isa: str, shape: Shape, bits: int, group: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    batch, heads, tokens, between, first, rows, cols = shape
    weight, values = packed(heads, between, cols, bits, group, generator)
    x = torch.randn((batch, heads, tokens, cols), generator=generator).to(dtype)
    got = packed_head_linear(x, weight, heads, first, rows)
    rounded = round_activations(x.reshape(-1, cols), group).double().view(x.shape)
    part = values[:, first : first + rows].transpose(1, 2)
    exact, size = rounded @ part, rounded.abs() @ part.abs()
    assert ((got.double() - exact).abs() <= ROUNDING[dtype] * exact.abs() + 2e-6 * size).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_x_may_be_strided_and_threads_give_the_same_bits(
    isa: str, transposed: bool, generator: torch.Generator
) -> None:
    weight, _ = packed(4, 96, 160, 4, 32, generator)
    whole = torch.randn((2, 3, 4, 64 + 160), generator=generator)
    x = whole.transpose(1, 2)[..., :64] if transposed else whole.transpose(1, 2)[..., 64:]
    wanted = packed_head_linear(x.contiguous(), weight, 4, 32, 64, transposed)
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(packed_head_linear(x, weight, 4, 32, 64, transposed), wanted)
    torch.set_num_threads(before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_poisons_its_head_alone(
    isa: str, value: float, generator: torch.Generator
) -> None:
    weight, _ = packed(2, 32, 64, 4, 32, generator)
    x = torch.randn((1, 2, 1, 32), generator=generator)
    x[0, 1, 0, 5] = value
    got = packed_head_linear(x, weight, 2, 0, 32, transposed=True)
    assert torch.isfinite(got[0, 0]).all()
    assert not torch.isfinite(got[0, 1]).any()


def test_zeros_give_zeros(isa: str, generator: torch.Generator) -> None:
    weight, _ = packed(2, 32, 64, 8, 32, generator)
    assert not packed_head_linear(torch.zeros(1, 2, 1, 32), weight, 2, 0, 32, transposed=True).any()


@pytest.mark.parametrize(
    ("first", "rows", "heads", "words"),
    [
        (8, 32, 2, "whole panels of 16"),
        (0, 24, 2, "whole panels of 16"),
        (32, 32, 2, "within the rows of a head"),
        (0, 32, 5, "96 rows cannot be shared by 5 heads"),
    ],
)
def test_rows_that_are_no_panels_are_refused(
    first: int, rows: int, heads: int, words: str, generator: torch.Generator
) -> None:
    weight, _ = packed(2, 48, 64, 4, 32, generator)
    with pytest.raises(ValueError, match=words):
        packed_head_linear(torch.zeros(1, heads, 1, rows), weight, heads, first, rows, transposed=True)


def test_more_rows_than_the_sums_hold_are_refused(generator: torch.Generator) -> None:
    weight, _ = packed(1, 528, 32, 4, 32, generator)
    with pytest.raises(ValueError, match="a head has at most 512 rows"):
        packed_head_linear(torch.zeros(1, 1, 1, 528), weight, 1, 0, 528, transposed=True)
