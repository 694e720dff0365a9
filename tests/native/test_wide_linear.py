"""Many bf16 rows over packed weights: on AMX through bf16 tiles, elsewhere as few rows; all of it against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from optimizations.native.linear import linear, linears
from optimizations.native.loader import native
from optimizations.native.packing import Packed, pack
from optimizations.native.reference import exact_linear, unpack

# Half a unit in the last place of bf16, and what float32 sums of a few thousand products may lose of their size.
ROUNDING = 2.0**-8
SUMMING = 2e-6
# Error relative to the outputs' standard deviation, weights taken as packed. AMX rounds weights and outputs to bf16 (0.0020 to
# 0.0025 measured); the other sets round activations to int8.
SPREAD = {"amx": 0.004}
QUANTIZED = 0.012


def case(
    generator: torch.Generator, m: int, n: int, k: int, bits: int, group_size: int
) -> tuple[Tensor, Packed, Tensor]:
    weight = pack(torch.randn(n, k, generator=generator) * 0.02, bits=bits, group_size=group_size)
    x, bias = torch.randn(m, k, generator=generator), torch.randn(n, generator=generator) * 0.1
    return x.bfloat16(), weight, bias.bfloat16()


def as_multiplied(weight: Packed) -> Tensor:
    """The weight's values as the tiles hold them, float64: level * significand in 11 bits, then in 8, ties away from zero."""
    fraction, exponent = torch.frexp(unpack(weight))
    eleven = torch.round(fraction * 2**11) / 2**11
    eight = torch.floor(eleven.abs() * 2**8 + 0.5) / 2**8
    return torch.ldexp(eight * fraction.sign(), exponent)


@pytest.fixture
def amx() -> Iterator[None]:
    if "amx" not in native().available_isas():
        pytest.skip("this processor or system has no AMX")
    before = native().isa()
    native().set_isa("amx")
    yield
    native().set_isa(before)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(32, 16, 32), (33, 40, 130), (47, 33, 513), (130, 211, 1500), (600, 17, 640)]
)
def test_tiles_hold_rounded_weights(
    amx: None,
    threads: int,
    bits: int,
    group_size: int,
    m: int,
    n: int,
    k: int,
    generator: torch.Generator,
) -> None:
    x, weight, bias = case(generator, m, n, k, bits, group_size)
    y = linear(x, weight, bias).double()
    wide, values = x.double(), as_multiplied(weight)
    exact = wide @ values.T + bias.double()
    size = wide.abs() @ values.abs().T + bias.double().abs()
    assert ((y - exact).abs() <= ROUNDING * exact.abs() + SUMMING * size).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [31, 32, 100])
def test_near_the_packed_weight(
    isa: str, threads: int, bits: int, m: int, generator: torch.Generator
) -> None:
    x, weight, bias = case(generator, m, 211, 5 * 32, bits, 32)
    y, exact = linear(x, weight, bias), exact_linear(x, weight, bias)
    bound = SPREAD.get(isa, QUANTIZED) if m >= 32 else QUANTIZED
    assert (y - exact).square().mean().sqrt() < bound * exact.std()


@pytest.mark.parametrize("bits", [4, 8])
def test_same_bits_twice_for_any_threads_and_any_many_rows(
    amx: None, bits: int, generator: torch.Generator
) -> None:
    """More rows than one task takes, and more columns than one block."""
    x, weight, _ = case(generator, 1100, 300, 1088, bits, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = linear(x, weight)
    torch.set_num_threads(2)
    repeats = [linear(x, weight) for _ in range(3)]
    pieces = torch.cat([linear(rows, weight) for rows in x.split([32, 33, 47, 64, 924])])
    torch.set_num_threads(before)
    assert torch.equal(pieces, whole)
    assert all(torch.equal(again, whole) for again in repeats)


@pytest.mark.parametrize("bits", [4, 8])
def test_fewer_rows_and_float32_keep_their_bits(amx: None, bits: int, generator: torch.Generator) -> None:
    """A row of a short batch is the row alone: drafts are checked against what one token at a time gives."""
    x, weight, _ = case(generator, 31, 70, 320, bits, 32)
    assert torch.equal(linear(x, weight), torch.cat([linear(row, weight) for row in x.split(1)]))
    many = x.float().repeat(3, 1)
    assert torch.equal(linear(many, weight)[:31], linear(x.float(), weight))


def test_weights_sharing_an_input(amx: None, threads: int, generator: torch.Generator) -> None:
    x = torch.randn(45, 96, generator=generator).bfloat16()
    weights = [pack(torch.randn(n, 96, generator=generator), bits=4) for n in (40, 17, 600)]
    biases = [None, torch.randn(17, generator=generator).bfloat16(), None]
    for got, weight, bias in zip(linears(x, weights, biases), weights, biases, strict=True):
        assert torch.equal(got, linear(x, weight, bias))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_poisons_its_row_only(amx: None, bad: float, generator: torch.Generator) -> None:
    x, weight, _ = case(generator, 40, 20, 64, 8, 32)
    clean = linear(x, weight)
    x[1, 40] = bad
    y = linear(x, weight)
    assert not y[1].isfinite().any()
    assert torch.equal(torch.cat((y[:1], y[2:])), torch.cat((clean[:1], clean[2:])))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("magnitude", [0.0, 1e-35, 1e-30, 1e30, 1e36])
def test_weights_of_any_size(amx: None, bits: int, magnitude: float, generator: torch.Generator) -> None:
    """x shrinks as the weight grows, so that neither leaves the range of normal numbers; a row of zeros stays one."""
    values = torch.randn(20, 96, generator=generator)
    values[3] = 0
    weight = pack(values * magnitude, bits=bits)
    x = (torch.randn(32, 96, generator=generator) / max(1.0, magnitude) ** 0.9).bfloat16()
    y, exact = linear(x, weight).double(), x.double() @ as_multiplied(weight).T
    size = x.double().abs() @ unpack(weight).abs().T
    assert (y[:, 3] == 0).all()
    assert ((y - exact).abs() <= ROUNDING * exact.abs() + SUMMING * size + 1e-37).all()
