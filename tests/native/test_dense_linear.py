"""Dense linear layers on every instruction set, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from optimizations.native.dense import dense_linear, dense_linears
from optimizations.native.loader import native

DTYPES = [torch.float32, torch.bfloat16]
# Half a unit in the last place of the output, and what float32 sums of a few thousand products may lose of their size.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
SUMMING = 2e-6


def normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def assert_rounded(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    wide = [t.double() for t in (x, weight)]
    exact = functional.linear(*wide, None if bias is None else bias.double())
    size = functional.linear(*(t.abs() for t in wide)) + (0 if bias is None else bias.double().abs())
    assert ((got.double() - exact).abs() <= ROUNDING[got.dtype] * exact.abs() + SUMMING * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "rows", "cols"),
    [(1, 16, 32), (1, 7, 5), (2, 33, 100), (3, 1, 31), (4, 130, 257), (5, 17, 1), (7, 64, 33), (61, 40, 515)],
)
def test_matches_float64(
    isa: str, threads: int, dtype: torch.dtype, m: int, rows: int, cols: int, generator: torch.Generator
) -> None:
    x, weight = normal((m, cols), dtype, generator), normal((rows, cols), dtype, generator)
    bias = normal((rows,), dtype, generator)
    assert_rounded(dense_linear(x, weight), x, weight)
    assert_rounded(dense_linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_weights_share_one_x(isa: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = normal((2, 3, 96), dtype, generator)
    weights = [normal((rows, 96), dtype, generator) for rows in (50, 16, 3)]
    biases = [None, normal((16,), dtype, generator), None]
    together = dense_linears(x, weights, biases)
    for got, weight, bias in zip(together, weights, biases, strict=True):
        assert got.shape == (2, 3, weight.shape[0])
        assert torch.equal(got, dense_linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_twice_alone_in_a_batch_and_for_any_threads(
    isa: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """The weight is large enough for two threads at one row, the batch for several blocks of rows."""
    before = torch.get_num_threads()
    x, weight = normal((120, 1030), dtype, generator), normal((300, 1030), dtype, generator)
    torch.set_num_threads(1)
    whole = dense_linear(x, weight)
    alone = torch.cat([dense_linear(row, weight) for row in x.split(1)])
    torch.set_num_threads(2)
    repeats = [dense_linear(x, weight) for _ in range(3)]
    pieces = torch.cat([dense_linear(rows, weight) for rows in x.split([1, 2, 3, 4, 5, 6, 16, 17, 33, 33])])
    torch.set_num_threads(before)
    assert torch.equal(alone, whole)
    assert torch.equal(pieces, whole)
    assert all(torch.equal(again, whole) for again in repeats)


@pytest.mark.parametrize(("m", "rows", "cols"), [(129, 50, 1030), (161, 33, 512), (1100, 40, 600)])
def test_many_rows_are_what_each_is_alone(
    isa: str, m: int, rows: int, cols: int, threads: int, generator: torch.Generator
) -> None:
    """Parts of the columns, a last block of one row, more rows than pass a part of the weight together."""
    x, weight = normal((m, cols), torch.bfloat16, generator), normal((rows, cols), torch.bfloat16, generator)
    bias = normal((rows,), torch.bfloat16, generator)
    whole = dense_linear(x, weight, bias)
    assert torch.equal(whole, torch.cat([dense_linear(few, weight, bias) for few in x.split(20)]))
    assert_rounded(whole, x, weight, bias)


def test_what_lies_beside_the_weight_is_not_read_into_it(isa: str, generator: torch.Generator) -> None:
    """Odd columns and rows end inside a vector; the memory after them holds NaN."""
    x = torch.full((3, 40), torch.nan)
    weight = torch.full((21, 40), torch.nan)
    flat_x, flat_weight = x.flatten()[: 3 * 37].view(3, 37), weight.flatten()[: 19 * 37].view(19, 37)
    flat_x.copy_(torch.randn(3, 37, generator=generator))
    flat_weight.copy_(torch.randn(19, 37, generator=generator))
    assert_rounded(dense_linear(flat_x, flat_weight), flat_x, flat_weight)


def test_infinity_and_nan_go_through(isa: str) -> None:
    x = torch.ones(2, 40, dtype=torch.bfloat16)
    x[0, 3], x[1, 39] = torch.inf, torch.nan
    out = dense_linear(x, torch.ones(4, 40, dtype=torch.bfloat16))
    assert out[0].eq(torch.inf).all()
    assert out[1].isnan().all()


def test_no_rows() -> None:
    assert dense_linear(torch.empty(0, 8), torch.ones(3, 8)).shape == (0, 3)


def test_a_gradient_is_torchs_own(generator: torch.Generator) -> None:
    weight = torch.randn(3, 8, generator=generator).requires_grad_()
    x = torch.randn(2, 8, generator=generator)
    dense_linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(3, 8))
    with torch.no_grad():
        assert not dense_linear(x, weight).requires_grad


def test_refusals_in_words() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(3, 8)
    with pytest.raises(TypeError, match="dense_linear: x must be float32 or bfloat16, got torch.float16"):
        dense_linear(x.half(), weight.half())
    with pytest.raises(TypeError, match="dense_linear: weight must be torch.float32, got torch.bfloat16"):
        dense_linear(x, weight.bfloat16())
    with pytest.raises(ValueError, match=r"weight must have shape \(any, 8\), got \(3, 7\)"):
        dense_linear(x, weight[:, :7].contiguous())
    with pytest.raises(ValueError, match="weight must be contiguous"):
        dense_linear(x, torch.zeros(8, 3).T)
    with pytest.raises(ValueError, match="x must be contiguous"):
        dense_linear(torch.zeros(8, 2).T, weight)
    with pytest.raises(ValueError, match=r"bias must have shape \(3\), got \(2,\)"):
        dense_linear(x, weight, torch.zeros(2))
    with pytest.raises(ValueError, match=r"x must have columns, it has shape \(2, 0\)"):
        dense_linear(torch.zeros(2, 0), torch.zeros(3, 0))
    with pytest.raises(ValueError, match="x must be on the CPU, it is on meta"):
        dense_linear(x.to("meta"), weight)


def test_bare_addresses_are_refused_in_words() -> None:
    call = native().dense_linear
    memory = torch.zeros(16)
    at = memory.data_ptr()
    with pytest.raises(ValueError, match="targets must be four numbers each"):
        call(at, 1, 4, 0, [at, 0, at], 1)
    with pytest.raises(ValueError, match="weight has no memory"):
        call(at, 1, 4, 0, [0, 0, at, 1], 1)
    with pytest.raises(ValueError, match="out must start at a multiple of 4 bytes"):
        call(at, 1, 4, 0, [at, 0, at + 2, 1], 1)
    with pytest.raises(ValueError, match="rows must be positive"):
        call(at, 1, 4, 0, [at, 0, at, 0], 1)
    with pytest.raises(ValueError, match="cols must be positive"):
        call(at, 1, 0, 0, [at, 0, at, 1], 1)
    with pytest.raises(ValueError, match="dtype code must be 0"):
        call(at, 1, 4, 7, [at, 0, at, 1], 1)
