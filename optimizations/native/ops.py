"""The kernels as torch operators, so that torch.compile keeps them in its graph and gradients are defined.

`pio::linear_int4`, `pio::linear_int8`: (x, data, scales, bias, rows) -> y, differentiable in x and bias.
`pio::moe_int4`, `pio::moe_int8`: (x, experts, weights, gate_up_data, gate_up_scales, down_data, down_scales, inner) -> y.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.library import custom_op

from optimizations.native.calls import run_linear, run_moe
from optimizations.native.experts import PackedExperts
from optimizations.native.packing import LANES, Packed, dequantize


def _define_linear(bits: int) -> CustomOpDef:
    def linear(x: Tensor, data: Tensor, scales: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        weight = Packed.wrap(data, scales, rows, x.shape[-1], bits)
        out = x.new_empty((*x.shape[:-1], rows))
        run_linear(x, (weight,), (bias,), (out,))
        return out

    def fake(x: Tensor, data: Tensor, scales: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        return x.new_empty((*x.shape[:-1], rows))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, data, scales, bias, rows = inputs
        ctx.save_for_backward(data, scales)
        ctx.rows, ctx.cols, ctx.has_bias = rows, x.shape[-1], bias is not None

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        data, scales = ctx.saved_tensors
        weight = dequantize(Packed.wrap(data, scales, ctx.rows, ctx.cols, bits), dtype=grad.dtype)
        grad_bias = grad.reshape(-1, ctx.rows).sum(0) if ctx.has_bias else None
        return grad @ weight, None, None, grad_bias, None

    op = custom_op(f"pio::linear_int{bits}", linear, mutates_args=(), device_types="cpu")
    op.register_fake(fake)
    op.register_autograd(backward, setup_context=setup)
    return op


def _define_moe(bits: int) -> CustomOpDef:
    def moe(
        x: Tensor,
        experts: Tensor,
        weights: Tensor,
        gate_up_data: Tensor,
        gate_up_scales: Tensor,
        down_data: Tensor,
        down_scales: Tensor,
        inner: int,
    ) -> Tensor:
        group_size = gate_up_data.shape[-1] * 8 // (LANES * bits)
        tensors = (gate_up_data, gate_up_scales, down_data, down_scales)
        packed = PackedExperts.wrap(*tensors, x.shape[-1], inner, bits, group_size)
        return run_moe(x, experts, weights, packed)

    op = custom_op(f"pio::moe_int{bits}", moe, mutates_args=(), device_types="cpu")
    op.register_fake(lambda x, *_: torch.empty_like(x))
    return op


_LINEAR = {bits: _define_linear(bits) for bits in (4, 8)}
_MOE = {bits: _define_moe(bits) for bits in (4, 8)}


def linear_op(bits: int) -> CustomOpDef:
    """`torch.ops.pio.linear_int4` or `linear_int8`."""
    return _LINEAR[bits]


def moe_op(bits: int) -> CustomOpDef:
    """`torch.ops.pio.moe_int4` or `moe_int8`."""
    return _MOE[bits]
