"""Packing: decoded by an independent reader, within the stated error, exactly undone where values are representable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizations.native.loader import native
from optimizations.native.packing import (
    LAYOUT,
    Packed,
    dequantize,
    dequantize_rows,
    pack,
    pack_into,
    packed_shapes,
)
from optimizations.native.reference import unpack

# Mean squared error / variance on normal weights: 0.0066, 0.0082, 0.0098 for int4 and 2.9e-5, 3.5e-5, 4.2e-5 for int8
# on 1e6 values; a few thousand values scatter by some percent.
ERROR = {(4, 32): 0.0080, (4, 64): 0.0100, (4, 128): 0.0120, (8, 32): 4e-5, (8, 64): 5e-5, (8, 128): 6e-5}


def test_layout_version_is_the_kernels() -> None:
    assert native().packed_layout() == LAYOUT


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_as_stated(
    isa: str, threads: int, bits: int, group_size: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    weight = (torch.randn(67, 3 * 128, generator=generator) * 0.02).to(dtype)
    back = dequantize(pack(weight, bits=bits, group_size=group_size))
    error = (back - weight.float()).square().mean() / weight.float().var()
    assert error < ERROR[bits, group_size]


@pytest.mark.parametrize("bits", [4, 8])
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 50),
    cols=st.integers(1, 300),
    group_size=st.sampled_from([32, 64, 128]),
    magnitude=st.sampled_from([1e-6, 1e-2, 1.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_decodes_alike_and_near(
    bits: int, rows: int, cols: int, group_size: int, magnitude: float, seed: int
) -> None:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * magnitude
    packed = pack(weight, bits=bits, group_size=group_size)
    assert (tuple(packed.data.shape), tuple(packed.scales.shape)) == packed_shapes(
        rows, cols, bits, group_size
    )
    back = dequantize(packed)
    assert torch.equal(back.double(), unpack(packed))
    # No value is off by more than clipping allows: at int4 the extreme may map to -6 instead of -8, at int8 half a
    # step, and the scale's rounding to bf16 adds 1/256.
    bound = (0.3 if bits == 4 else 0.5 / 127 + 1 / 256) * 1.01
    largest = torch.nn.functional.pad(weight, (0, -cols % group_size)).unflatten(-1, (-1, group_size))
    limit = bound * largest.abs().amax(-1, keepdim=True).expand_as(largest).flatten(-2)[:, :cols]
    assert ((back - weight).abs() <= limit + 1e-30).all()


@pytest.mark.parametrize("bits", [4, 8])
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), groups=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_representable_weights_come_back_exactly(bits: int, rows: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = (-8, 8) if bits == 4 else (-127, 128)
    levels = torch.randint(low, high, (rows, groups, 32), generator=generator)
    levels[..., 0] = low  # the extreme value is there, so its scale is the exact one
    scale = 2.0 ** torch.randint(-12, 4, (rows, groups, 1), generator=generator)
    weight = (levels * scale).flatten(1)
    assert torch.equal(dequantize(pack(weight, bits=bits)), weight)


def test_packing_is_the_same_for_any_threads_and_twice(isa: str, generator: torch.Generator) -> None:
    weight = torch.randn(200, 160, generator=generator)
    torch.set_num_threads(1)
    alone = pack(weight, bits=4)
    torch.set_num_threads(2)
    for _ in range(3):
        again = pack(weight, bits=4)
        assert torch.equal(alone.data, again.data)
        assert torch.equal(alone.scales, again.scales)


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zeros(isa: str, bits: int) -> None:
    packed = pack(torch.zeros(17, 40), bits=bits)
    assert not dequantize(packed).any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_looked_up(bits: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    packed = pack(torch.randn(37, 100, generator=generator), bits=bits)
    indices = torch.randint(0, 37, (2, 5), generator=generator)
    whole = dequantize(packed, dtype=dtype)
    assert torch.equal(dequantize_rows(packed, indices, dtype=dtype), whole[indices])
    assert torch.equal(whole, unpack(packed).float().to(dtype))
    assert dequantize_rows(packed, indices[:0]).shape == (0, 5, 100)


def test_packed_size_is_as_documented() -> None:
    packed = Packed.empty(64, 256, bits=4)
    assert packed.nbytes * 8 / (64 * 256) == 4.5
    assert Packed.empty(64, 256, bits=8, group_size=128).nbytes * 8 / (64 * 256) == 8.125


def test_wrapping_checks_everything(generator: torch.Generator) -> None:
    packed = pack(torch.randn(20, 64, generator=generator), bits=4)
    again = Packed.wrap(packed.data, packed.scales, 20, 64, 4)
    assert again.group_size == 32
    with pytest.raises(ValueError, match=r"data must have shape \(2, 4, 512\), got \(2, 2, 512\)"):
        Packed.wrap(packed.data.repeat(1, 1, 2)[:, :, :512], packed.scales, 20, 100, 8)
    with pytest.raises(ValueError, match=r"data must have shape \(panels, groups, bytes\)"):
        Packed.wrap(packed.data.flatten(), packed.scales, 20, 64, 4)
    with pytest.raises(TypeError, match=r"data must be torch.uint8, got torch.int8"):
        Packed.wrap(packed.data.view(torch.int8), packed.scales, 20, 64, 4)
    with pytest.raises(TypeError, match=r"scales must be torch.bfloat16, got torch.float32"):
        Packed.wrap(packed.data, packed.scales.float(), 20, 64, 4)
    with pytest.raises(ValueError, match=r"scales must have shape \(2, 2, 16\)"):
        Packed.wrap(packed.data, packed.scales[:1], 20, 64, 4)


def test_wrapping_refuses_unaligned_memory(generator: torch.Generator) -> None:
    packed = pack(torch.randn(16, 32, generator=generator), bits=4)
    room = torch.empty(packed.data.numel() + 8, dtype=torch.uint8)
    shifted = room[8:].view(packed.data.shape)
    with pytest.raises(ValueError, match=r"must start at a multiple of 64 bytes, it starts 8 bytes past one"):
        Packed.wrap(shifted, packed.scales, 16, 32, 4)


def test_refusals_in_words(generator: torch.Generator) -> None:
    weight = torch.randn(16, 64, generator=generator)
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 3"):
        pack(weight, bits=3)
    with pytest.raises(ValueError, match=r"group_size must be one of \(32, 64, 128\), got 48"):
        pack(weight, bits=4, group_size=48)
    with pytest.raises(TypeError, match="weight must be float32 or bfloat16, got torch.float16"):
        pack(weight.half(), bits=4)
    with pytest.raises(ValueError, match="weight must be contiguous, it has shape .64, 16. and strides"):
        pack(weight.T, bits=4)
    with pytest.raises(ValueError, match="weight must have shape"):
        pack(weight.flatten(), bits=4)
    with pytest.raises(ValueError, match="weight must be on the CPU, it is on meta"):
        pack(weight.to("meta"), bits=4)
    with pytest.raises(ValueError, match="must have rows and columns, got 0 x 64"):
        pack(weight[:0], bits=4)
    packed = pack(weight, bits=4)
    with pytest.raises(ValueError, match=r"weight must have shape \(16, 64\), got \(15, 64\)"):
        pack_into(weight[:15], packed)
    with pytest.raises(ValueError, match=r"row 16 is outside 0 .. 15"):
        dequantize_rows(packed, torch.tensor([0, 16]))
    with pytest.raises(ValueError, match=r"row -1 is outside"):
        dequantize_rows(packed, torch.tensor([-1]))
    with pytest.raises(TypeError, match="indices must be torch.int64, got torch.int32"):
        dequantize_rows(packed, torch.tensor([1], dtype=torch.int32))
    with pytest.raises(TypeError, match="dtype must be float32 or bfloat16"):
        dequantize(packed, dtype=torch.float16)


def test_the_kernel_itself_refuses_bad_addresses_and_codes() -> None:
    good = torch.zeros(4096, dtype=torch.uint8)
    with pytest.raises(ValueError, match="the packed data has no memory"):
        native().pack(good.data_ptr(), 16, 32, 0, 4, 32, 0, good.data_ptr(), 1)
    with pytest.raises(ValueError, match="group must be 32, 64 or 128, got 16"):
        native().pack(good.data_ptr(), 16, 32, 0, 4, 16, good.data_ptr(), good.data_ptr(), 1)
    with pytest.raises(ValueError, match="dtype code must be 0 .float32. or 1 .bfloat16., got 7"):
        native().pack(good.data_ptr(), 16, 32, 7, 4, 32, good.data_ptr(), good.data_ptr(), 1)
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 5"):
        native().pack(good.data_ptr(), 16, 32, 0, 5, 32, good.data_ptr(), good.data_ptr(), 1)
