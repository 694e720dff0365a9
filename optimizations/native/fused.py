"""Residual addition + RMSNorm, per-head RMSNorm + rotary embedding, SwiGLU, GELU: one call each.

Each rounds to the element type where the separate torch ops round, and accumulates in float32, so against transformers'
own modules only the order of one sum differs: nearly all outputs are equal, none is more than two units in the last place away. Against exact
arithmetic the relative error is at most 2^-8 per rounding step in bfloat16. Source of the fusions: SGLang's CPU
backend (fused QK-norm + RoPE), Liger Kernel (SwiGLU, RMSNorm).

Tensors are float32 or bfloat16 in host memory. Under torch.compile, and when a gradient is wanted, the calls go
through `torch.ops.pio.*`; these have no gradient, and backward() says so. Plain torch: `fused_reference`.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from optimizations.native.checks import DTYPE_CODES, dtype_code, require_cpu, require_dtype, require_shape
from optimizations.native.loader import native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / rms(x) over the last dimension; x [..., n] with evenly spaced rows, weight [n] -> [..., n] dense.

    Raises:
        TypeError: x is neither float32 nor bfloat16, or weight has another dtype.
        ValueError: shapes or strides do not fit, or a tensor is not in host memory.
        NativeModuleMissing: the kernels are not built.
    """
    if _through_torch(x):
        return torch.ops.pio.rms_norm(x, weight, eps)
    return _rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(h, weight * h / rms(h)) with h = x + residual, all of x's shape [..., n]; residual must be dense.

    Raises: as `rms_norm`.
    """
    if _through_torch(x):
        return torch.ops.pio.add_rms_norm(x, residual, weight, eps)
    return _add_rms_norm(x, residual, weight, eps)


def norm_rope(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, neighbours: bool = False
) -> Tensor:
    """Heads normalized (when there is a weight), their last values rotated, laid out head-major.

    x [batch, tokens, heads, d]; weight [d] or None; cos, sin [1 or batch, tokens, r] in x's dtype, or in float32 (then
    products are not rounded before their sum), with even r <= d <= 1024: the last r values of each head are rotated
    -> [batch, heads, tokens, d] dense. Plain: value i turns with i + r/2. With `neighbours`, 2i turns with 2i + 1 and
    the result is left de-interleaved, as GLM and DeepSeek do. M-RoPE is mixed into cos and sin by the model's rotary
    module.

    Raises: as `rms_norm`.
    """
    if _through_torch(x):
        return torch.ops.pio.norm_rope(x, weight, cos, sin, eps, neighbours)
    return _norm_rope(x, weight, cos, sin, eps, neighbours)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; both [..., n] with evenly spaced rows (halves of one tensor are fine) -> [..., n] dense.

    Raises: as `rms_norm`.
    """
    if _through_torch(gate):
        return torch.ops.pio.swiglu(gate, up)
    return _swiglu(gate, up)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form (arXiv 1606.08415, eq. 2); x [..., n] with evenly spaced rows -> [..., n] dense.

    Rounded once, as torch.nn.functional.gelu(approximate="tanh") does: 1.65 ms for 784 x 4,096 values in bfloat16
    on two cores with AVX-512, where torch takes 6.1; 12.8 MB through a memory of 15 GB/s are 0.85.

    Raises: as `rms_norm`.
    """
    if _through_torch(x):
        return torch.ops.pio.gelu(x)
    return _gelu(x)


def _through_torch(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled())


def _dense_like(x: Tensor, *_: object) -> Tensor:
    # 1.6 us, where torch.empty(shape, dtype=...) takes 4 to read its arguments.
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def row_stride(kernel: str, name: str, x: Tensor) -> int:
    """Elements between the rows of x [..., n]. ValueError when the rows are not evenly spaced or not dense."""
    if x.is_contiguous():
        return x.shape[-1]
    rows = [(size, step) for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    even = all(outer == size * inner for (_, outer), (size, inner) in itertools.pairwise(rows))
    if x.stride(-1) != 1 or not even or (rows and rows[-1][1] < x.shape[-1]):
        raise ValueError(
            f"{kernel}: {name} must have dense, evenly spaced rows, it has shape {tuple(x.shape)} and strides "
            f"{x.stride()}; call .contiguous() first"
        )
    return rows[-1][1] if rows else x.shape[-1]


def _check_pair(kernel: str, x: Tensor, name: str, other: Tensor, shape: tuple[int, ...]) -> None:
    """The other tensor must have x's dtype, this shape, and be dense in host memory."""
    if other.dtype == x.dtype and other.shape == shape and other.is_cpu and other.is_contiguous():
        return
    require_cpu(kernel, name, other)
    require_dtype(kernel, name, other, x.dtype)
    require_shape(kernel, name, other, shape)
    raise ValueError(f"{kernel}: {name} must be contiguous, it has strides {other.stride()}")


def _code(kernel: str, name: str, x: Tensor) -> int:
    code = DTYPE_CODES.get(x.dtype)
    if code is None or not x.is_cpu:
        dtype_code(kernel, name, x)
        require_cpu(kernel, name, x)
        raise AssertionError("unreachable: one of the two raises")
    return code


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    code, width = _code("rms_norm", "x", x), x.shape[-1]
    _check_pair("rms_norm", x, "weight", weight, (width,))
    out = _dense_like(x)
    native().rms_norm(
        x.data_ptr(),
        0,
        weight.data_ptr(),
        0,
        out.data_ptr(),
        x.numel() // width,
        width,
        row_stride("rms_norm", "x", x),
        eps,
        code,
        torch.get_num_threads(),
    )
    return out


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    code, width = _code("add_rms_norm", "x", x), x.shape[-1]
    _check_pair("add_rms_norm", x, "residual", residual, tuple(x.shape))
    _check_pair("add_rms_norm", x, "weight", weight, (width,))
    total = _dense_like(x)
    out = _dense_like(x)
    native().rms_norm(
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        total.data_ptr(),
        out.data_ptr(),
        x.numel() // width,
        width,
        row_stride("add_rms_norm", "x", x),
        eps,
        code,
        torch.get_num_threads(),
    )
    return total, out


def _norm_rope(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, neighbours: bool
) -> Tensor:
    code = _code("norm_rope", "x", x)
    if x.dim() != 4:
        raise ValueError(f"norm_rope: x must be [batch, tokens, heads, d], got shape {tuple(x.shape)}")
    batch, tokens, heads, dim = x.shape
    if x.stride(3) != 1 or (heads > 1 and x.stride(2) != dim):
        raise ValueError(f"norm_rope: the heads of x must be dense, it has strides {x.stride()}")
    shape = (cos.shape[0], tokens, cos.shape[-1])
    if cos.shape[0] not in (1, batch):
        raise ValueError(f"norm_rope: cos must have batch 1 or {batch}, got shape {tuple(cos.shape)}")
    like = cos if cos.dtype == torch.float32 else x
    _check_pair("norm_rope", like, "cos", cos, shape)
    _check_pair("norm_rope", like, "sin", sin, shape)
    if weight is not None:
        _check_pair("norm_rope", x, "weight", weight, (dim,))
    out = torch.empty(batch, heads, tokens, dim, dtype=x.dtype)
    native().norm_rope(
        x.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        out.data_ptr(),
        batch,
        tokens,
        heads,
        dim,
        shape[2],
        x.stride(0),
        x.stride(1),
        0 if shape[0] == 1 else tokens * shape[2],
        neighbours,
        eps,
        code,
        DTYPE_CODES[cos.dtype],
        torch.get_num_threads(),
    )
    return out


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    code, width = _code("swiglu", "gate", gate), gate.shape[-1]
    if up.shape != gate.shape or up.dtype != gate.dtype or not up.is_cpu:
        require_cpu("swiglu", "up", up)
        require_dtype("swiglu", "up", up, gate.dtype)
        require_shape("swiglu", "up", up, tuple(gate.shape))
    out = _dense_like(gate)
    native().swiglu(
        gate.data_ptr(),
        up.data_ptr(),
        out.data_ptr(),
        gate.numel() // width,
        width,
        row_stride("swiglu", "gate", gate),
        row_stride("swiglu", "up", up),
        code,
        torch.get_num_threads(),
    )
    return out


def _gelu(x: Tensor) -> Tensor:
    code, width = _code("gelu", "x", x), x.shape[-1]
    out = _dense_like(x)
    native().gelu(
        x.data_ptr(),
        out.data_ptr(),
        x.numel() // width,
        width,
        row_stride("gelu", "x", x),
        code,
        torch.get_num_threads(),
    )
    return out


@torch.library.custom_op("pio::rms_norm", mutates_args=(), device_types="cpu")
def _rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _rms_norm(x, weight, eps)


@torch.library.custom_op("pio::add_rms_norm", mutates_args=(), device_types="cpu")
def _add_rms_norm_op(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _add_rms_norm(x, residual, weight, eps)


@torch.library.custom_op("pio::norm_rope", mutates_args=(), device_types="cpu")
def _norm_rope_op(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, neighbours: bool
) -> Tensor:
    return _norm_rope(x, weight, cos, sin, eps, neighbours)


@torch.library.custom_op("pio::swiglu", mutates_args=(), device_types="cpu")
def _swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    return _swiglu(gate, up)


@torch.library.custom_op("pio::gelu", mutates_args=(), device_types="cpu")
def _gelu_op(x: Tensor) -> Tensor:
    return _gelu(x)


_rms_norm_op.register_fake(_dense_like)
_gelu_op.register_fake(_dense_like)
_swiglu_op.register_fake(_dense_like)
_add_rms_norm_op.register_fake(lambda x, *_: (_dense_like(x), _dense_like(x)))
_norm_rope_op.register_fake(
    lambda x, *_: x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])),
)
