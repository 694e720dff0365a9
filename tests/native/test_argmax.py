"""argmax over rows on every instruction set: the place that torch.argmax finds, also among ties, infinities and NaN."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimizations.native.argmax import argmax

DTYPES = [torch.float32, torch.bfloat16]
# Around vectors (16), blocks (1,024) and a whole vocabulary.
WIDTHS = [1, 2, 15, 16, 17, 33, 1023, 1024, 1025, 1039, 1040, 4096, 151_936]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_place_is_torchs(isa: str, width: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn((5, width), generator=generator).sub(4).to(dtype)  # mostly below zero
    assert torch.equal(argmax(x), torch.argmax(x, dim=-1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_apart(isa: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn((4, 3, 50), generator=generator).to(dtype)[:, -1]
    assert torch.equal(argmax(x), torch.argmax(x, dim=-1))


def test_a_single_row_is_dense_whatever_its_stride() -> None:
    assert argmax(torch.tensor([[1.0], [3.0], [2.0]]).T).tolist() == [1]


@pytest.mark.parametrize("place", [0, 7, 16, 1023, 1024, 2047, 2061])
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_ones_the_first_wins(isa: str, place: int, dtype: torch.dtype) -> None:
    x = torch.full((1, 2062), -3.0, dtype=dtype)
    x[0, place:] = 2.0
    assert argmax(x).tolist() == [place]


def test_zeros_of_both_signs_are_equal(isa: str) -> None:
    assert argmax(torch.tensor([[-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0]])).tolist() == [1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("place", [3, 40, 1500, 2061])
def test_nan_is_largest(isa: str, place: int, sign: float, dtype: torch.dtype) -> None:
    x = torch.full((1, 2062), 1.0, dtype=dtype)
    x[0, 1000], x[0, place] = math.inf, math.copysign(math.nan, sign)
    assert argmax(x).tolist() == torch.argmax(x, dim=-1).tolist() == [place]


def test_rows_of_minus_infinity_give_their_first(isa: str) -> None:
    assert argmax(torch.full((2, 1030), -math.inf)).tolist() == [0, 0]


ANY_FLOAT = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(st.lists(st.one_of(st.sampled_from([0.0, -0.0, 1.0]), ANY_FLOAT), min_size=1, max_size=80))
def test_any_values(values: list[float]) -> None:
    x = torch.tensor([values])
    for dtype in DTYPES:
        assert argmax(x.to(dtype)).item() == torch.argmax(x.to(dtype), dim=-1).item()


def test_no_rows_are_no_places() -> None:
    assert argmax(torch.empty(0, 5)).shape == (0,)


@pytest.mark.parametrize(
    ("x", "kind", "words"),
    [
        (torch.zeros(3), ValueError, r"x must be \[rows, n\] with dense rows, has shape \(3,\)"),
        (torch.zeros(3, 0), ValueError, r"has shape \(3, 0\)"),
        (torch.zeros(4, 3).T, ValueError, r"strides \(1, 3\)"),
        (torch.zeros(1, 4).expand(3, 4), ValueError, r"strides \(0, 1\)"),
        (torch.zeros(1, 4, dtype=torch.float64), TypeError, "x must be float32 or bfloat16"),
        (torch.zeros(1, 4, device="meta"), ValueError, "meta"),
    ],
    ids=["one dimension", "nothing to choose", "columns", "one row repeated", "float64", "no memory"],
)
def test_what_cannot_be_searched_is_said(x: torch.Tensor, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        argmax(x)
