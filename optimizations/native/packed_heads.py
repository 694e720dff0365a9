"""A packed weight's rows as a weight for each head: the two products of absorbed MLA over kv_b_proj as it is packed."""

from __future__ import annotations

import torch
from torch import Tensor

from optimizations.native.checks import dtype_code, require_cpu, require_shape
from optimizations.native.loader import native
from optimizations.native.packing import Packed

# Rows of a head must be whole panels, and no more than the kernel's sums hold.
HEAD_PANEL, HEAD_ROWS = 16, 512


def packed_head_linear(
    x: Tensor, weight: Packed, heads: int, first: int, rows: int, transposed: bool = False
) -> Tensor:
    """`dense.head_linear` with W[h] = rows [h * n + first, + rows) of `weight`, n = weight.rows / heads, for few rows of x.

    x [batch, heads, tokens, cols] -> [batch, heads, tokens, rows], x rounded to int8 in groups as by `linear`; or
    transposed [batch, heads, tokens, rows] -> [batch, heads, tokens, cols], x times scales rounded to 15 bits. In the
    dtype of x, float32 or bfloat16; any strides as long as the last dimension is dense. No gradient.

    Raises:
        TypeError: another dtype.
        ValueError: shapes or strides do not fit, x is not in host memory, or rows, first and n are not multiples of 16.
        NativeModuleMissing: the kernels are not built.
    """
    code = dtype_code("packed_head_linear", "x", x)
    require_cpu("packed_head_linear", "x", x)
    require_shape("packed_head_linear", "x", x, (-1, heads, -1, rows if transposed else weight.cols))
    if x.stride(-1) != 1:
        raise ValueError(f"packed_head_linear: the rows of x must be dense, it has strides {x.stride()}")
    if weight.rows % heads:
        raise ValueError(f"packed_head_linear: {weight.rows} rows cannot be shared by {heads} heads")
    out = x.new_empty((*x.shape[:3], weight.cols if transposed else rows))
    described = [weight.cols, weight.bits, weight.group_size, first, weight.rows // heads, rows]
    native().packed_head_linear(
        [x.data_ptr(), *x.stride()[:3]],
        [weight.data.data_ptr(), weight.scales.data_ptr(), *described],
        [out.data_ptr(), *out.stride()[:3]],
        x.shape[0],
        heads,
        x.shape[2],
        transposed,
        code,
        torch.get_num_threads(),
    )
    return out
