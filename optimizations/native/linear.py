"""Linear layers and mixtures of experts over packed weights.

Activations are quantized to int8, one scale per row and group of columns, once per call and shared by all weights
of the call; products are exact integers inside a group and float32 sums over groups. What that costs beyond the weights' own
error: the rounding step is max|x| / 127 of a group of 32, a relative error of the output near 0.5 % of its standard deviation on
normal activations, where int4 weights cost 8 % and int8 weights 0.5 %. A row's result has the same bits alone and in any
batch, and for any number of threads. Source of the scheme: ggml's Q4_0 x Q8_0 products with repacked weights; the free zero
point is oneDNN's compensation trick.

One exception: 32 bfloat16 rows and more on AMX and AVX-512 (of an expert: 32 of its own), which have the same bits in any batch of
that kind. Beside int4 weights both become int8 with one scale per row and 512 columns: 1.0 % of an output's standard deviation on
normal activations, where a single row costs 0.5 %, and for the weights at most 3 % of the error that int4 has. Values far above the
others of the 512 keep 15 bits: on AMX with their whole row, on AVX-512 alone (`reference_wide.py`). Beside int8 weights, on AMX
alone, activations are left as they are and the weights' values rounded to bfloat16, 0.2 % of the output's standard deviation.

`moe` is a whole mixture-of-experts layer in one call, after the fused expert kernels of ik_llama.cpp: tokens sorted by
expert, gate and up multiplied together with SwiGLU applied in float32 to their sums, the experts' outputs added per token in float32 in
the order of the experts' numbers. No gathered copy of expert weights, no Python loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from optimizations.native import ops
from optimizations.native.calls import run_linear, run_moe
from optimizations.native.experts import PackedExperts
from optimizations.native.packing import Packed


def linear(x: torch.Tensor, weight: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., cols] @ weight^T + bias -> [..., rows], in the dtype of x (float32 or bfloat16).

    Under torch.compile, and when a gradient for x is wanted, this is `torch.ops.pio.linear_int4` or `_int8`; otherwise the
    kernel is called directly.

    Raises:
        TypeError: x or bias has another dtype.
        ValueError: shapes do not fit, or x is not dense in host memory.
        NativeModuleMissing: the kernels are not built.
    """
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        return ops.linear_op(weight.bits)(x, weight.data, weight.scales, bias, weight.rows)
    out = x.new_empty((*x.shape[:-1], weight.rows))
    run_linear(x, (weight,), (bias,), (out,))
    return out


def linears(
    x: torch.Tensor, weights: Sequence[Packed], biases: Sequence[torch.Tensor | None] | None = None
) -> list[torch.Tensor]:
    """Several weights over one x, as q, k and v: x is quantized once and all threads are started once.

    All weights must have the same cols, bits and group_size. See `linear` for dtypes and errors.
    """
    chosen = tuple(biases) if biases is not None else (None,) * len(weights)
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        return [linear(x, weight, bias) for weight, bias in zip(weights, chosen, strict=True)]
    outs = tuple(x.new_empty((*x.shape[:-1], weight.rows)) for weight in weights)
    run_linear(x, tuple(weights), chosen, outs)
    return list(outs)


def moe(x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, packed: PackedExperts) -> torch.Tensor:
    """y[t] = sum over j of weights[t, j] * down(silu(gate x[t]) * up x[t]) with expert experts[t, j].

    x [tokens, hidden] float32 or bfloat16; experts [tokens, k] int64; weights [tokens, k] float32 or bfloat16; -> [tokens,
    hidden] in the dtype of x. Not differentiable: where a gradient is wanted, backward() says so.

    Raises:
        TypeError, ValueError: dtypes, shapes or strides do not fit, or an expert's number does not exist.
        NativeModuleMissing: the kernels are not built.
    """
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        return ops.moe_op(packed.bits)(
            x,
            experts,
            weights,
            packed.gate_up_data,
            packed.gate_up_scales,
            packed.down_data,
            packed.down_scales,
            packed.inner,
        )
    return run_moe(x, experts, weights, packed)
