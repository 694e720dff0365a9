"""From checked tensors to the kernels: what both the direct calls and the torch ops end in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from optimizations.native.checks import (
    DTYPE_CODES,
    dtype_code,
    require_contiguous,
    require_cpu,
    require_tensor,
)
from optimizations.native.experts import PackedExperts
from optimizations.native.loader import native
from optimizations.native.packing import Packed


def run_linear(
    x: torch.Tensor,
    weights: Sequence[Packed],
    biases: Sequence[torch.Tensor | None],
    outs: Sequence[torch.Tensor],
) -> None:
    """outs[i] = x @ weights[i]^T + biases[i], without regard to compilation and gradients; see `linear.linears`."""
    first = weights[0]
    code = DTYPE_CODES.get(x.dtype)
    if code is None or not x.is_cpu or not x.is_contiguous() or x.shape[-1] != first.cols:
        _refuse_x(x, first)
    targets: list[int] = []
    for weight, bias, out in zip(weights, biases, outs, strict=True):
        if weight is not first and _kind(weight) != _kind(first):
            raise ValueError(
                f"linear: weights of one call must agree in cols, bits and group_size, got {_kind(first)} and {_kind(weight)}"
            )
        address = 0
        if bias is not None:
            _check_bias(bias, x, weight)
            address = bias.data_ptr()
        targets += (weight.data.data_ptr(), weight.scales.data_ptr(), address, out.data_ptr(), weight.rows)
    native().linear(
        x.data_ptr(),
        x.numel() // first.cols,
        first.cols,
        code,
        first.bits,
        first.group_size,
        targets,
        torch.get_num_threads(),
    )


def _kind(weight: Packed) -> tuple[int, int, int]:
    return weight.cols, weight.bits, weight.group_size


def _refuse_x(x: torch.Tensor, weight: Packed) -> None:
    dtype_code("linear", "x", x)
    require_cpu("linear", "x", x)
    if x.dim() == 0 or x.shape[-1] != weight.cols:
        raise ValueError(
            f"linear: the last dimension of x must be {weight.cols}, x has shape {tuple(x.shape)}"
        )
    require_contiguous("linear", "x", x)


def _check_bias(bias: torch.Tensor, x: torch.Tensor, weight: Packed) -> None:
    if bias.dtype != x.dtype:
        raise TypeError(f"linear: bias must have the dtype of x, {x.dtype}, got {bias.dtype}")
    if tuple(bias.shape) != (weight.rows,):
        raise ValueError(f"linear: bias must have shape ({weight.rows},), got {tuple(bias.shape)}")
    require_cpu("linear", "bias", bias)
    require_contiguous("linear", "bias", bias)


def run_moe(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    packed: PackedExperts,
    shared: Sequence[Packed] = (),
) -> torch.Tensor:
    """The kernel itself, without regard to compilation and gradients; see `linear.moe`.

    shared: gate, up and down of one more expert of the same sizes, bits and group, whose output every token gains; for at
    most 8 tokens.
    """
    code = dtype_code("moe", "x", x)
    require_tensor("moe", "x", x, x.dtype, (-1, packed.hidden))
    require_tensor("moe", "experts", experts, torch.int64, (x.shape[0], -1))
    dtype_code("moe", "weights", weights)
    require_tensor("moe", "weights", weights, weights.dtype, tuple(experts.shape))
    weights = weights.float()
    out = torch.empty_like(x)
    native().moe(
        x.data_ptr(),
        x.shape[0],
        packed.hidden,
        packed.inner,
        code,
        experts.data_ptr(),
        weights.data_ptr(),
        experts.shape[1],
        packed.experts,
        packed.gate_up_data.data_ptr(),
        packed.gate_up_scales.data_ptr(),
        packed.down_data.data_ptr(),
        packed.down_scales.data_ptr(),
        packed.bits,
        packed.group_size,
        [address for one in shared for address in (one.data.data_ptr(), one.scales.data_ptr())],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
