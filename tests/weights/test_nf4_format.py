"""NF4 layouts against bitsandbytes' own dequantization."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from optimizations.contract import Target
from optimizations.registry import parse
from optimizations.weights.formats import allocate
from optimizations.weights.nf4_format import Nf4Format, nearest_levels
from pytest_inferencepio.catalog.tiny import tiny_config

CPU = torch.device("cpu")
SIZES = [(64, 128), (96, 64), (4128, 64), (10, 70), (33, 192)]  # fused and not, one over a chunk, odd ones


def stored(fmt: Nf4Format, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = allocate(fmt, *weight.shape, CPU)
    fmt.encode(weight, parts)
    return parts


def weight_of(rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))


def reference(weight: torch.Tensor, block_size: int, nested: bool) -> torch.Tensor:
    codes, state = bnb.quantize_4bit(
        weight, blocksize=block_size, quant_type="nf4", compress_statistics=nested
    )
    return bnb.dequantize_4bit(codes, state)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("size", SIZES)
def test_values_are_those_of_bitsandbytes(size, block_size, double_quant):
    fmt, weight = Nf4Format(block_size, double_quant), weight_of(*size)
    parts = stored(fmt, weight)
    wanted = reference(weight, block_size, double_quant)
    got = fmt.decode(parts, *size, torch.float32)
    scale_rounding = 2**-8 if fmt.fused(*size) else 1e-6  # the fused layout keeps scales in bf16
    assert ((got - wanted).abs() <= scale_rounding * wanted.abs() + 1e-7).all()
    rows = torch.tensor([0, size[0] - 1, size[0] // 2, 0])
    assert torch.equal(fmt.decode(parts, *size, torch.float32, indices=rows), got[rows])


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("size", SIZES)
def test_products_are_those_of_the_decoded_matrix(size, rows, double_quant):
    fmt, weight = Nf4Format(64, double_quant), weight_of(*size)
    parts, x = stored(fmt, weight), torch.randn(2, rows, size[1], generator=torch.Generator().manual_seed(1))
    bias = torch.randn(size[0], generator=torch.Generator().manual_seed(2))
    wanted = x @ fmt.decode(parts, *size, torch.float32).T + bias
    got = fmt.linear(x, parts, size[0], bias)
    bound = 0.02 if fmt.fused(*size) else 1e-5  # the fused kernel computes in bf16
    assert (got - wanted).norm() < bound * wanted.norm()


def test_codes_and_scales_are_those_of_bitsandbytes_to_the_bit():
    Nf4Format(64, False).layout(64, 64)  # loads the tables
    weight = torch.cat([weight_of(4100, 64), torch.zeros(1, 64), torch.full((1, 64), -3.0)]).to(
        torch.bfloat16
    )
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    codes, scales = nearest_levels(weight)
    pairs = codes.view(-1, 2)
    assert torch.equal((pairs[:, 0] << 4) | pairs[:, 1], packed.view(-1))
    assert torch.equal(scales, state.absmax)


def test_the_fused_layout_is_that_of_bitsandbytes():
    fmt, weight = Nf4Format(64, False), weight_of(96, 128)
    if not fmt.fused(96, 128):
        pytest.skip("bitsandbytes' fused kernel needs AVX512-BF16, which this CPU lacks")
    quantized = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    codes, state = bnb._convert_weight_packed_for_cpu(*quantized)
    parts = stored(fmt, weight)
    assert torch.equal(parts["codes"], codes)
    assert torch.equal(parts["absmax"], state.absmax)


def test_bits_per_weight():
    def bits(double_quant: bool, rows: int) -> float:
        parts = stored(Nf4Format(64, double_quant), weight_of(rows, 4096))
        return sum(part.nbytes for part in parts.values()) * 8 / (rows * 4096)

    assert bits(double_quant=True, rows=64) == pytest.approx(4.127, abs=0.01)
    assert bits(double_quant=False, rows=64) in (4.25, 4.5)  # bf16 scales where the fused kernel runs
    assert bits(double_quant=False, rows=63) == 4.5


def test_a_matrix_of_odd_width_is_kept_with_the_reason():
    assert Nf4Format(64, False).unfit(8, 7) == "NF4 stores pairs of columns and the matrix has 7"


def test_without_bitsandbytes_the_technique_refuses(monkeypatch):
    [part], target = parse("weight_nf4"), Target(tiny_config("glm_4_7_flash"))
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        reason = part.refusal(target)
    assert reason == "bitsandbytes is not installed; pip install bitsandbytes"


def test_tables_do_not_depend_on_where_they_are_first_needed(monkeypatch):
    """transformers builds models with other defaults in force; bfloat16 tables once made every scale wrong."""
    monkeypatch.setattr("optimizations.weights.nf4_format._TABLES", {})
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            Nf4Format(64, True).layout(64, 64)
            Nf4Format(64, False).layout(64, 64)
    finally:
        torch.set_default_dtype(torch.float32)
    fmt, weight = Nf4Format(64, True), weight_of(64, 64)
    wanted = reference(weight, 64, nested=True)
    assert torch.equal(fmt.decode(stored(fmt, weight), 64, 64, torch.float32), wanted)
