"""Add+RMSNorm, norm+rope, SwiGLU and GELU on every instruction set, against float64 and against transformers' rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optimizations.native import fused, fused_reference

DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [1, 3, 16, 17, 64, 97, 512, 2560]
# Relative size of one rounding; float32 also carries the error of a sum of up to 2560 squares.
UNIT = {torch.float32: 4e-6, torch.bfloat16: 2.0**-8}
EPS = 1e-6
# batch, tokens, heads, head, rotated part, neighbours
HEADS = [
    (1, 1, 32, 128, 128, False),
    (2, 3, 5, 64, 64, False),
    (2, 4, 3, 34, 10, False),
    (1, 5, 20, 256, 64, True),
    (2, 3, 1, 64, 64, True),
    (3, 2, 2, 22, 22, True),
]


def random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).mul(2).to(dtype)


def angles(
    batch: int, tokens: int, rope: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    half = torch.rand((batch, tokens, rope // 2), generator=generator) * 50
    both = torch.cat((half, half), -1)
    return both.cos().to(dtype), both.sin().to(dtype)


def units_apart(got: Tensor, wanted: Tensor) -> int:
    """Largest distance in units in the last place of bfloat16."""
    ordered = [
        torch.where(bits < 0, -(bits & 0x7FFF), bits)
        for bits in (t.contiguous().view(torch.int16).int() for t in (got, wanted))
    ]
    return int((ordered[0] - ordered[1]).abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_is_exact_up_to_its_roundings(
    isa: str, width: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x, weight = random((3, 2, width), dtype, generator), random((width,), dtype, generator)
    got = fused.rms_norm(x, weight, EPS)
    exact = fused_reference.rms_norm(x.double(), weight.double(), EPS)
    assert got.dtype == dtype
    assert ((got.double() - exact).abs() <= 2.1 * UNIT[dtype] * exact.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm_adds_and_normalizes(
    isa: str, width: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x, residual = random((5, width), dtype, generator), random((5, width), dtype, generator)
    weight = random((width,), dtype, generator)
    total, got = fused.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    exact = fused_reference.rms_norm(total.double(), weight.double(), EPS)
    assert ((got.double() - exact).abs() <= 2.1 * UNIT[dtype] * exact.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu_is_exact_up_to_its_roundings(
    isa: str, width: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    gate, up = random((3, width), dtype, generator), random((3, width), dtype, generator)
    exact = fused_reference.swiglu(gate.double(), up.double())
    got = fused.swiglu(gate, up).double()
    assert ((got - exact).abs() <= 2.1 * UNIT[dtype] * exact.abs() + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_gelu_is_exact_up_to_its_rounding(
    isa: str, width: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Also where the tanh is within a rounding of -1: torch's form cancels there, in float64 too."""
    x = random((5, width), dtype, generator).mul(3)
    wide = x.double()
    slope = 2 * (2 / torch.pi) ** 0.5 * wide * (1 + 0.044715 * wide**2)
    exact = wide * slope.sigmoid()
    got = fused.gelu(x).double()
    of_exponent = 3 * torch.finfo(torch.float32).eps * slope.abs()
    assert ((got - exact).abs() <= (1.1 * UNIT[dtype] + of_exponent) * exact.abs() + 1e-30).all()
    near = fused_reference.gelu(wide)
    assert ((got - near).abs() <= (1.1 * UNIT[dtype] + of_exponent) * near.abs() + 1e-12).all()


def test_gelu_at_the_ends_of_its_range(isa: str) -> None:
    x = torch.tensor([0.0, -0.0, 30.0, -30.0, 3e38, -3e38, 1e-38, float("nan")])
    got = fused.gelu(x)
    assert torch.equal(got[[0, 1, 2, 4]], x[[0, 1, 2, 4]])
    assert got[3].abs() < 1e-30
    assert got[5].abs() < 10
    assert got[6] == pytest.approx(0.5e-38, rel=1e-6)
    assert got[7].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("shape", HEADS)
def test_norm_rope_is_exact_up_to_its_roundings(
    isa: str,
    shape: tuple[int, int, int, int, int, bool],
    normed: bool,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    batch, tokens, heads, dim, rope, neighbours = shape
    x = random((batch, tokens, heads, dim), dtype, generator)
    weight = random((dim,), dtype, generator) if normed else None
    cos, sin = angles(batch, tokens, rope, dtype, generator)
    got = fused.norm_rope(x, weight, cos, sin, EPS, neighbours)
    wide = None if weight is None else weight.double()
    arguments = (x.double(), wide, cos.double(), sin.double(), EPS, neighbours)
    exact = fused_reference.norm_rope(*arguments)
    # |x cos| + |y sin| bounds what each of up to five roundings is relative to.
    size = (
        fused_reference.norm_rope(
            *(None if t is None else t.abs() for t in arguments[:4]), EPS, neighbours
        ).abs()
        + fused_reference.norm_rope(
            x.double().abs(),
            None if wide is None else wide.abs(),
            cos.double().abs(),
            -sin.double().abs(),
            EPS,
            neighbours,
        ).abs()
    )
    assert got.shape == (batch, heads, tokens, dim)
    assert got.is_contiguous()
    assert ((got.double() - exact).abs() <= 5 * UNIT[dtype] * size + 1e-30).all()


@pytest.mark.parametrize("width", [64, 256, 2560])
def test_bfloat16_results_are_those_of_the_separate_torch_ops(
    isa: str, width: int, generator: torch.Generator
) -> None:
    """Only the order of the variance's sum differs: nearly all equal, none more than two units away."""
    x, weight = random((64, width), torch.bfloat16, generator), random((width,), torch.bfloat16, generator)
    got, wanted = fused.rms_norm(x, weight, EPS), fused_reference.rms_norm(x, weight, EPS)
    assert units_apart(got, wanted) <= 2
    assert (got == wanted).float().mean() > 0.99
    gate, up = random((64, width), torch.bfloat16, generator), x
    got, wanted = fused.swiglu(gate, up), fused_reference.swiglu(gate, up)
    assert units_apart(got, wanted) <= 2
    assert (got == wanted).float().mean() > 0.99


@pytest.mark.parametrize("shape", HEADS)
def test_rotation_alone_has_the_bits_of_the_separate_torch_ops(
    isa: str, shape: tuple[int, int, int, int, int, bool], generator: torch.Generator
) -> None:
    batch, tokens, heads, dim, rope, neighbours = shape
    x = random((batch, tokens, heads, dim), torch.bfloat16, generator)
    cos, sin = angles(1, tokens, rope, torch.bfloat16, generator)
    got = fused.norm_rope(x, None, cos, sin, EPS, neighbours)
    assert torch.equal(got, fused_reference.norm_rope(x, None, cos, sin, EPS, neighbours))


@pytest.mark.parametrize("shape", HEADS)
def test_float32_angles_turn_bfloat16_heads_with_one_rounding(
    isa: str, shape: tuple[int, int, int, int, int, bool], generator: torch.Generator
) -> None:
    """As the vision tower of Qwen3-VL does: products and their sum in float32."""
    batch, tokens, heads, dim, rope, neighbours = shape
    x = random((batch, tokens, heads, dim), torch.bfloat16, generator)
    cos, sin = angles(1, tokens, rope, torch.float32, generator)
    got = fused.norm_rope(x, None, cos, sin, EPS, neighbours)
    wide = fused_reference.norm_rope(x.float(), None, cos, sin, EPS, neighbours)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, wide.bfloat16())


def test_threads_and_repeats_do_not_change_a_bit(isa: str, generator: torch.Generator) -> None:
    x = random((70, 1000), torch.bfloat16, generator)
    weight = random((1000,), torch.bfloat16, generator)
    heads = x.view(1, 70, 10, 100)
    cos, sin = angles(1, 70, 60, torch.bfloat16, generator)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 1, 2):
        torch.set_num_threads(threads)
        total, normed = fused.add_rms_norm(x, x.flip(0), weight, EPS)
        turned = fused.norm_rope(heads, weight[:100].clone(), cos, sin, EPS)
        results.append((total, normed, turned, fused.swiglu(x, total), fused.gelu(x)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_halves_of_one_tensor_are_read_in_place(isa: str, generator: torch.Generator) -> None:
    both = random((2, 7, 96), torch.bfloat16, generator)
    gate, up = both.chunk(2, -1)
    assert torch.equal(fused.swiglu(gate, up), fused.swiglu(gate.contiguous(), up.contiguous()))
    assert torch.equal(fused.gelu(up), fused.gelu(up.contiguous()))
    weight = random((48,), torch.bfloat16, generator)
    assert torch.equal(fused.rms_norm(gate, weight, EPS), fused.rms_norm(gate.contiguous(), weight, EPS))
    cos, sin = angles(1, 7, 48, torch.bfloat16, generator)
    assert torch.equal(
        fused.norm_rope(up.unsqueeze(2), None, cos, sin, EPS, True),
        fused.norm_rope(up.unsqueeze(2).contiguous(), None, cos, sin, EPS, True),
    )


def test_empty_input_gives_empty_output(isa: str) -> None:
    assert fused.rms_norm(torch.empty(0, 8), torch.ones(8), EPS).shape == (0, 8)
    assert fused.swiglu(torch.empty(0, 8), torch.empty(0, 8)).shape == (0, 8)
    assert fused.gelu(torch.empty(0, 8)).shape == (0, 8)


def test_a_wrong_dtype_is_named() -> None:
    x = torch.zeros(2, 8, dtype=torch.float16)
    with pytest.raises(TypeError, match="rms_norm: x must be float32 or bfloat16, got torch.float16"):
        fused.rms_norm(x, torch.ones(8), EPS)
    with pytest.raises(TypeError, match="gelu: x must be float32 or bfloat16, got torch.float16"):
        fused.gelu(x)
    with pytest.raises(TypeError, match="rms_norm: weight must be torch.float32, got torch.bfloat16"):
        fused.rms_norm(torch.zeros(2, 8), torch.ones(8, dtype=torch.bfloat16), EPS)


def test_wrong_shapes_and_strides_are_named() -> None:
    with pytest.raises(ValueError, match=r"rms_norm: weight must have shape \(8\), got \(7,\)"):
        fused.rms_norm(torch.zeros(2, 8), torch.ones(7), EPS)
    with pytest.raises(ValueError, match=r"add_rms_norm: residual must have shape \(2, 8\), got \(3, 8\)"):
        fused.add_rms_norm(torch.zeros(2, 8), torch.zeros(3, 8), torch.ones(8), EPS)
    with pytest.raises(ValueError, match=r"swiglu: gate must have dense, evenly spaced rows.*\.contiguous"):
        fused.swiglu(torch.zeros(8, 2).T, torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"evenly spaced"):
        fused.rms_norm(torch.zeros(3, 4, 8)[:, :2], torch.ones(8), EPS)
    with pytest.raises(ValueError, match=r"swiglu: up must have shape \(2, 8\), got \(2, 9\)"):
        fused.swiglu(torch.zeros(2, 8), torch.zeros(2, 9))


def test_wrong_heads_are_named() -> None:
    x, angle = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 8)
    with pytest.raises(
        ValueError, match=r"norm_rope: x must be \[batch, tokens, heads, d\], got shape \(2, 8\)"
    ):
        fused.norm_rope(torch.zeros(2, 8), None, angle, angle, EPS)
    with pytest.raises(ValueError, match="norm_rope: cos must have batch 1 or 1, got shape"):
        fused.norm_rope(x, None, torch.zeros(2, 2, 8), angle, EPS)
    with pytest.raises(ValueError, match=r"norm_rope: sin must have shape \(1, 2, 8\), got \(1, 3, 8\)"):
        fused.norm_rope(x, None, angle, torch.zeros(1, 3, 8), EPS)
    with pytest.raises(ValueError, match="the rotated part must be even and within the head, got 9"):
        fused.norm_rope(x, None, torch.zeros(1, 2, 9), torch.zeros(1, 2, 9), EPS)
    with pytest.raises(ValueError, match="a head must have 1 to 1024 values, got 1025"):
        fused.norm_rope(torch.zeros(1, 2, 1, 1025), None, angle, angle, EPS)
    with pytest.raises(TypeError, match="norm_rope: sin must be torch.float32, got torch.bfloat16"):
        fused.norm_rope(x.bfloat16(), None, angle, angle.bfloat16(), EPS)
    with pytest.raises(TypeError, match="norm_rope: cos must be torch.float32, got torch.bfloat16"):
        fused.norm_rope(x, None, angle.bfloat16(), angle.bfloat16(), EPS)
    with pytest.raises(ValueError, match="the heads of x must be dense"):
        fused.norm_rope(x.transpose(1, 2), None, torch.zeros(1, 3, 8), torch.zeros(1, 3, 8), EPS)


def test_torch_sees_correct_operators(generator: torch.Generator) -> None:
    x, weight = random((2, 3, 16), torch.float32, generator), random((16,), torch.float32, generator)
    cos, sin = angles(2, 3, 8, torch.float32, generator)
    heads = random((2, 3, 4, 16), torch.float32, generator)
    torch.library.opcheck(torch.ops.pio.rms_norm.default, (x, weight, EPS))
    torch.library.opcheck(torch.ops.pio.add_rms_norm.default, (x, x.clone(), weight, EPS))
    torch.library.opcheck(torch.ops.pio.norm_rope.default, (heads, weight, cos, sin, EPS, False))
    torch.library.opcheck(torch.ops.pio.swiglu.default, (x, x.clone()))
    torch.library.opcheck(torch.ops.pio.gelu.default, (x,))


def test_a_gradient_is_refused_in_words() -> None:
    x = torch.ones(2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        fused.swiglu(x, x).sum().backward()
