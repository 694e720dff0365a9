"""The place of the largest value of each row, over whole vocabularies."""

from __future__ import annotations

import torch
from torch import Tensor

from optimizations.native.checks import dtype_code, require_cpu
from optimizations.native.loader import native


def argmax(x: Tensor) -> Tensor:
    """int64 [rows]: the first of the largest values of each row of x [rows, n], as torch.argmax finds it; a NaN is largest.

    Args:
        x: float32 or bfloat16 in host memory, rows dense.

    Raises:
        TypeError: another dtype.
        ValueError: another shape or stride, or x is not in host memory.
        NativeModuleMissing: the kernels are not built.
    """
    code = dtype_code("argmax", "x", x)
    require_cpu("argmax", "x", x)
    rows, width = x.shape if x.dim() == 2 else (0, 0)
    stride = x.stride(0) if rows > 1 else width
    if not width or x.stride(1) != 1 or stride < width:
        raise ValueError(
            f"argmax: x must be [rows, n] with dense rows, has shape {tuple(x.shape)} and strides {x.stride()}"
        )
    out = torch.empty(rows, dtype=torch.int64)
    native().argmax(
        x.data_ptr(),
        out.data_ptr(),
        rows,
        width,
        stride,
        code,
        torch.get_num_threads(),
    )
    return out
