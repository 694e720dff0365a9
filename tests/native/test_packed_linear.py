"""linear over packed weights against float64, on every instruction set, with odd sizes."""

from __future__ import annotations

import pytest
import torch

from optimizations.native.linear import linear, linears
from optimizations.native.loader import native
from optimizations.native.packing import Packed, pack
from optimizations.native.reference import exact_linear, quantized_linear

ROWS = [1, 2, 3, 7, 31, 32, 33, 128]
# Relative to the standard deviation of the outputs. `ORDER`: float32 sums in another order, largest deviation. `ACTIVATIONS`: int8
# rounding of normal activations, standard deviation; 0.005 to 0.007 measured.
ORDER = 2e-6
ACTIVATIONS = 0.012


def case(
    generator: torch.Generator, m: int, n: int, k: int, bits: int, group_size: int
) -> tuple[torch.Tensor, Packed, torch.Tensor]:
    weight = pack(torch.randn(n, k, generator=generator) * 0.02, bits=bits, group_size=group_size)
    return torch.randn(m, k, generator=generator), weight, torch.randn(n, generator=generator) * 0.1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", ROWS)
def test_matches_float64(isa: str, threads: int, bits: int, m: int, generator: torch.Generator) -> None:
    x, weight, bias = case(generator, m, 211, 5 * 32, bits, 32)
    y = linear(x, weight, bias)
    torch.set_num_threads(1)
    exact, rounded = exact_linear(x, weight, bias), quantized_linear(x, weight, bias)
    spread = exact.std()
    assert y.dtype == torch.float32
    assert (y - rounded).abs().max() < ORDER * spread
    assert (y - exact).square().mean().sqrt() < ACTIVATIONS * spread


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(1, 32, 32), (16, 64, 64), (17, 100, 32), (33, 129, 128), (95, 7, 64)]
)
def test_odd_sizes(isa: str, bits: int, n: int, k: int, group_size: int, generator: torch.Generator) -> None:
    x, weight, bias = case(generator, 9, n, k, bits, group_size)
    rounded = quantized_linear(x, weight, bias)
    assert (linear(x, weight, bias) - rounded).abs().max() < ORDER * exact_linear(x, weight).abs().max()


@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_integers_do_not_saturate(isa: str, bits: int) -> None:
    """All products at their largest: 15 * 127 and 127 * 127, of both signs."""
    sign = torch.tensor([1.0, -1.0]).repeat(64)
    for weights in (torch.ones(16, 128), -torch.ones(16, 128), sign.expand(16, 128).contiguous()):
        weight = pack(weights, bits=bits)
        for x in (torch.ones(3, 128), -torch.ones(3, 128), sign.expand(3, 128).contiguous()):
            rounded = quantized_linear(x, weight)
            assert (linear(x, weight) - rounded).abs().max() <= 1e-6 * 128


@pytest.mark.parametrize("bits", [4, 8])
def test_bfloat16_is_the_rounded_float32(isa: str, bits: int, generator: torch.Generator) -> None:
    x, weight, bias = case(generator, 5, 50, 96, bits, 32)
    x, bias = x.bfloat16(), bias.bfloat16()
    assert torch.equal(linear(x, weight, bias), linear(x.float(), weight, bias.float()).bfloat16())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_has_the_same_bits_alone_in_a_batch_and_for_any_threads(
    isa: str, bits: int, generator: torch.Generator
) -> None:
    # More than 256 KB, below which one thread does it all.
    x, weight, _ = case(generator, 33, 521, 1088, bits, 64)
    torch.set_num_threads(1)
    whole = linear(x, weight)
    torch.set_num_threads(2)
    for _ in range(5):
        assert torch.equal(linear(x, weight), whole)
    for m in (1, 2, 3, 5, 6, 7):
        torch.set_num_threads(1 + m % 2)
        assert torch.equal(linear(x[:m].contiguous(), weight), whole[:m])


def test_large_batches_are_blocked_the_same(isa: str, generator: torch.Generator) -> None:
    x, weight, _ = case(generator, 500, 50, 128, 4, 32)  # 3 M multiply-adds: threads
    parts = torch.cat([linear(x[i : i + 125], weight) for i in range(0, 500, 125)])
    assert torch.equal(linear(x, weight), parts)


def test_leading_dimensions_and_no_rows(generator: torch.Generator) -> None:
    x, weight, _ = case(generator, 6, 20, 64, 4, 32)
    assert torch.equal(linear(x.view(2, 3, 64), weight), linear(x, weight).view(2, 3, 20))
    assert linear(x[0], weight).shape == (20,)
    assert linear(x[:0], weight).shape == (0, 20)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_sharing_an_input(isa: str, threads: int, bits: int, generator: torch.Generator) -> None:
    x = torch.randn(4, 96, generator=generator)
    weights = [pack(torch.randn(n, 96, generator=generator), bits=bits) for n in (40, 17, 64)]
    biases = [None, torch.randn(17, generator=generator), None]
    for got, weight, bias in zip(linears(x, weights, biases), weights, biases, strict=True):
        assert torch.equal(got, linear(x, weight, bias))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_poisons_its_row_only(isa: str, bad: float, generator: torch.Generator) -> None:
    x, weight, _ = case(generator, 3, 20, 64, 4, 32)
    clean = linear(x, weight)
    x[1, 40] = bad
    y = linear(x, weight)
    assert not y[1].isfinite().any()
    assert torch.equal(y[0], clean[0])
    assert torch.equal(y[2], clean[2])


@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-30, 1e30])
def test_extreme_magnitudes(isa: str, magnitude: float, generator: torch.Generator) -> None:
    x, weight, _ = case(generator, 2, 20, 64, 8, 32)
    y = linear(x * magnitude, weight)
    assert y.isfinite().all()
    # Groups whose largest magnitude is below 1e-36 count as zero (the inverse of their scale would overflow).
    assert (y - exact_linear(x, weight) * magnitude).abs().max() <= max(0.1 * magnitude, 1e-36)


def test_refusals_in_words(generator: torch.Generator) -> None:
    x, weight, bias = case(generator, 2, 20, 64, 4, 32)
    with pytest.raises(TypeError, match="linear: x must be float32 or bfloat16, got torch.float64"):
        linear(x.double(), weight)
    with pytest.raises(
        ValueError, match=r"linear: the last dimension of x must be 64, x has shape \(2, 32\)"
    ):
        linear(x[:, :32].contiguous(), weight)
    with pytest.raises(ValueError, match=r"linear: x must be contiguous, it has shape .* and strides"):
        linear(torch.randn(64, 2).T, weight)
    with pytest.raises(ValueError, match="linear: x must be on the CPU, it is on meta"):
        linear(x.to("meta"), weight)
    with pytest.raises(TypeError, match="bias must have the dtype of x, torch.float32, got torch.bfloat16"):
        linear(x, weight, bias.bfloat16())
    with pytest.raises(ValueError, match=r"bias must have shape \(20,\), got \(19,\)"):
        linear(x, weight, bias[:19])
    with pytest.raises(ValueError, match="bias must be contiguous"):
        linear(x, weight, torch.randn(20, 2)[:, 0])
    other = pack(torch.randn(20, 64), bits=8)
    with pytest.raises(ValueError, match="weights of one call must agree in cols, bits and group_size"):
        linears(x, [weight, other])


def test_the_kernel_itself_refuses_bad_addresses() -> None:
    x = torch.zeros(1024)
    address = x.data_ptr()
    with pytest.raises(ValueError, match="linear: x must start at a multiple of 4 bytes"):
        native().linear(address + 1, 1, 32, 0, 4, 32, [address, address, 0, address, 16], 1)
    with pytest.raises(ValueError, match="the packed data must start at a multiple of 64 bytes"):
        native().linear(address, 1, 32, 0, 4, 32, [address + 32, address, 0, address, 16], 1)
    with pytest.raises(ValueError, match="targets must be five numbers each"):
        native().linear(address, 1, 32, 0, 4, 32, [address], 1)
