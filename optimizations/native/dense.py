"""Linear layers over weights as torch stores them: bfloat16 or float32, row-major, accumulated in float32.

A row's result has the same bits alone and in any batch, and for any number of threads; torch's own bfloat16 linear
promises neither and, at one row, reads memory at less than half of what the machine gives. Several weights may share
one x, as q, k and v do: the threads are started once.
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
