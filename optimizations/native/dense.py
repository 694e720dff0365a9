"""Linear layers and mixtures of experts over weights as torch stores them: bfloat16 or float32, accumulated in float32.

A row's result has the same bits alone and in any batch, and for any number of threads; torch's own bfloat16 linear
promises neither and, at one row, reads memory at less than half of what the machine gives. Several weights may share
one x, as q, k and v do: the threads are started once. `head_linear` is the pair of products of absorbed multi-head latent
attention (DeepSeek-V2, arXiv 2405.04434), straight from the halves of kv_b_proj.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from optimizations.native.checks import (
    DTYPE_CODES,
    dtype_code,
    require_contiguous,
    require_cpu,
    require_dtype,
    require_shape,
    require_tensor,
)
from optimizations.native.loader import native


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., cols] @ weight [rows, cols]^T + bias [rows] -> [..., rows], all float32 or all bfloat16, dense.

    Under torch.compile, and where a gradient is wanted, this is torch's own linear.

    Raises:
        TypeError: a dtype is neither, or they differ.
        ValueError: shapes do not fit, or a tensor is not dense in host memory.
        NativeModuleMissing: the kernels are not built.
    """
    return dense_linears(x, (weight,), (bias,))[0]


def dense_linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """Several weights over one x; see `dense_linear`."""
    chosen = tuple(biases) if biases is not None else (None,) * len(weights)
    if torch.compiler.is_compiling() or _wants_gradient(x, *weights, *chosen):
        return [functional.linear(x, w, b) for w, b in zip(weights, chosen, strict=True)]
    code = _check_x(x)
    cols = x.shape[-1]
    outs: list[Tensor] = []
    targets: list[int] = []
    for weight, bias in zip(weights, chosen, strict=True):
        require_tensor("dense_linear", "weight", weight, x.dtype, (-1, cols))
        if bias is not None:
            require_tensor("dense_linear", "bias", bias, x.dtype, (weight.shape[0],))
        outs.append(x.new_empty((*x.shape[:-1], weight.shape[0])))
        address = 0 if bias is None else bias.data_ptr()
        targets += (weight.data_ptr(), address, outs[-1].data_ptr(), weight.shape[0])
    native().dense_linear(x.data_ptr(), x.numel() // cols, cols, code, targets, torch.get_num_threads())
    return outs


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check_x(x: Tensor) -> int:
    code = DTYPE_CODES.get(x.dtype)
    if code is None:
        code = dtype_code("dense_linear", "x", x)
    require_cpu("dense_linear", "x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"dense_linear: x must have columns, it has shape {tuple(x.shape)}")
    require_contiguous("dense_linear", "x", x)
    return code


def head_linear(x: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
    """A weight for each head: x [batch, heads, tokens, cols] @ weight [heads, rows, cols]^T -> [batch, heads, tokens, rows].

    `transposed`: x [batch, heads, tokens, rows] @ weight -> [batch, heads, tokens, cols]. Both float32 or both bfloat16;
    any strides as long as the last dimension is dense, so halves of one weight are fine. No gradient.

    Raises: as `dense_linear`.
    """
    code = DTYPE_CODES.get(x.dtype)
    if code is None:
        code = dtype_code("head_linear", "x", x)
    for name, tensor in (("x", x), ("weight", weight)):
        require_cpu("head_linear", name, tensor)
        require_dtype("head_linear", name, tensor, x.dtype)
        if tensor.dim() and tensor.stride(-1) != 1:
            raise ValueError(
                f"head_linear: the rows of {name} must be dense, it has strides {tensor.stride()}"
            )
    require_shape("head_linear", "weight", weight, (-1, -1, -1))
    heads, rows, cols = weight.shape
    require_shape("head_linear", "x", x, (-1, heads, -1, rows if transposed else cols))
    out = x.new_empty((*x.shape[:3], cols if transposed else rows))
    native().head_linear(
        [x.data_ptr(), *x.stride()[:3]],
        [weight.data_ptr(), *weight.stride()[:2], rows, cols],
        [out.data_ptr(), *out.stride()[:3]],
        x.shape[0],
        heads,
        x.shape[2],
        transposed,
        code,
        torch.get_num_threads(),
    )
    return out


def dense_moe(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """y[t] = sum over j of weights[t, j] * down(silu(gate x[t]) * up x[t]) with expert experts[t, j].

    x [tokens, hidden]; experts [tokens, k] int64; weights [tokens, k] float32 or bfloat16; gate_up [experts, 2 * inner,
    hidden], gate first, and down [experts, hidden, inner] as transformers fuses them, in x's dtype; -> [tokens, hidden] in
    x's dtype. Gate, up and their product are rounded to the dtype as transformers' modules do; the sum over experts is
    float32. No gradient.

    Raises: as `dense_linear`, and ValueError when an expert's number does not exist.
    """
    code = dtype_code("dense_moe", "x", x)
    require_tensor("dense_moe", "gate_up", gate_up, x.dtype, (-1, -1, -1))
    count, twice, hidden = gate_up.shape
    require_tensor("dense_moe", "down", down, x.dtype, (count, hidden, twice // 2))
    require_shape("dense_moe", "gate_up", gate_up, (count, 2 * down.shape[2], hidden))
    require_tensor("dense_moe", "x", x, x.dtype, (-1, hidden))
    require_tensor("dense_moe", "experts", experts, torch.int64, (x.shape[0], -1))
    dtype_code("dense_moe", "weights", weights)
    require_tensor("dense_moe", "weights", weights, weights.dtype, tuple(experts.shape))
    weights = weights.float()
    out = torch.empty_like(x)
    native().dense_moe(
        x.data_ptr(),
        x.shape[0],
        hidden,
        down.shape[2],
        code,
        experts.data_ptr(),
        weights.data_ptr(),
        experts.shape[1],
        count,
        gate_up.data_ptr(),
        down.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
