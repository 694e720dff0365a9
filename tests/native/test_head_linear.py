"""A weight for each head on every instruction set, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optimizations.native.dense import head_linear
from optimizations.native.loader import native

DTYPES = [torch.float32, torch.bfloat16]
# Half a unit in the last place of the output, and what float32 sums of some hundred products may lose of their size.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
SUMMING = 2e-6


def normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def assert_rounded(got: Tensor, x: Tensor, weight: Tensor, transposed: bool) -> None:
    wide = weight.double() if transposed else weight.double().transpose(1, 2)
    exact, size = x.double() @ wide, x.double().abs() @ wide.abs()
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= ROUNDING[got.dtype] * exact.abs() + SUMMING * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "rows", "cols"),
    [(1, 4, 1, 48, 64), (2, 3, 5, 7, 33), (1, 1, 1, 1, 1), (1, 2, 37, 50, 131), (3, 5, 2, 192, 300)],
)
def test_matches_float64(
    isa: str,
    threads: int,
    dtype: torch.dtype,
    transposed: bool,
    batch: int,
    heads: int,
    tokens: int,
    rows: int,
    cols: int,
    generator: torch.Generator,
) -> None:
    weight = normal((heads, rows, cols), dtype, generator)
    x = normal((batch, heads, tokens, rows if transposed else cols), dtype, generator)
    assert_rounded(head_linear(x, weight, transposed), x, weight, transposed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_halves_of_kv_b_proj_and_heads_of_a_projection(
    isa: str, dtype: torch.dtype, transposed: bool, generator: torch.Generator
) -> None:
    """Neither the weight nor x is dense, as the two products of absorbed MLA find them."""
    whole = normal((3, 24 + 40, 72), dtype, generator)
    weight = whole[:, :24] if transposed else whole[:, 24:]
    width = 24 if transposed else 72
    x = normal((2, 6, 3, width + 8), dtype, generator).transpose(1, 2)[..., :width]
    assert_rounded(head_linear(x, weight, transposed), x, weight, transposed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_same_bits_twice_alone_in_a_batch_and_for_any_threads(
    isa: str, dtype: torch.dtype, transposed: bool, generator: torch.Generator
) -> None:
    before = torch.get_num_threads()
    weight = normal((20, 96, 160), dtype, generator)
    x = normal((1, 20, 41, 96 if transposed else 160), dtype, generator)
    torch.set_num_threads(1)
    whole = head_linear(x, weight, transposed)
    alone = torch.cat([head_linear(token, weight, transposed) for token in x.split(1, 2)], 2)
    torch.set_num_threads(2)
    repeats = [head_linear(x, weight, transposed) for _ in range(3)]
    torch.set_num_threads(before)
    assert torch.equal(alone, whole)
    assert all(torch.equal(again, whole) for again in repeats)


def test_no_tokens() -> None:
    assert head_linear(torch.empty(1, 2, 0, 8), torch.ones(2, 3, 8)).shape == (1, 2, 0, 3)


def test_refusals_in_words() -> None:
    x, weight = torch.zeros(1, 2, 3, 8), torch.zeros(2, 5, 8)
    with pytest.raises(TypeError, match="head_linear: x must be float32 or bfloat16, got torch.float16"):
        head_linear(x.half(), weight.half())
    with pytest.raises(TypeError, match="head_linear: weight must be torch.float32, got torch.bfloat16"):
        head_linear(x, weight.bfloat16())
    with pytest.raises(ValueError, match=r"x must have shape \(any, 2, any, 5\), got \(1, 2, 3, 8\)"):
        head_linear(x, weight, transposed=True)
    with pytest.raises(ValueError, match=r"weight must have shape \(any, any, any\), got \(5, 8\)"):
        head_linear(x, weight[0])
    with pytest.raises(ValueError, match="the rows of weight must be dense"):
        head_linear(x, torch.zeros(2, 8, 5).transpose(1, 2))
    with pytest.raises(ValueError, match="weight must be on the CPU, it is on meta"):
        head_linear(x, weight.to("meta"))


def test_bare_numbers_are_refused_in_words() -> None:
    call, memory = native().head_linear, torch.zeros(64)
    at = memory.data_ptr()
    x, weight = [at, 0, 0, 4], [at, 0, 4, 4, 4]
    with pytest.raises(ValueError, match="x and out are described by 4 numbers each"):
        call(x[:-1], weight, x, 1, 1, 1, False, 0, 1)
    with pytest.raises(ValueError, match="a weight is described by 5 numbers"):
        call(x, x, x, 1, 1, 1, False, 0, 1)
    with pytest.raises(ValueError, match="rows and cols must be positive"):
        call(x, [*weight[:-1], 0], x, 1, 1, 1, False, 0, 1)
    with pytest.raises(ValueError, match="counts must be positive"):
        call(x, weight, x, 1, 0, 1, False, 0, 1)
    with pytest.raises(ValueError, match="out has no memory"):
        call(x, weight, [0, 0, 0, 4], 1, 1, 1, False, 0, 1)
