"""bfloat16 weights in 12 bits, every bit of them, in the layout of the project's kernels."""

from __future__ import annotations

import dataclasses

import torch
from torch.library import custom_op
from torch.nn import functional

from optimizations.errors import Refusal
from optimizations.native.lossless import (
    Lossless,
    TooManyExponents,
    expand_lossless,
    lossless_linear,
    lossless_moe,
    lossless_shapes,
    pack_lossless_into,
)
from optimizations.weights.formats import DoesNotFit, Parts, WeightFormat


@dataclasses.dataclass(frozen=True)
class LosslessFormat(WeightFormat):
    """Sign and mantissa of a bfloat16 as they are, the exponent as one of sixteen that eight rows have most often.

    12 bits a value, 0.2 % more for what is looked up and listed, and room for one value in 256 with an exponent of its own.
    Rows are padded to 8, columns to 128.
    """

    def layout(
        self, rows: int, cols: int, stacked: int = 1
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        data, index = lossless_shapes(rows, cols)
        return {"data": (data, torch.uint8), "index": (index, torch.uint8)}

    def encode(self, weight: torch.Tensor, out: Parts, stacked: int = 1) -> None:
        if weight.dtype != torch.bfloat16:
            raise Refusal(f"12 bits hold bfloat16 weights without loss; this matrix is {weight.dtype}")
        try:
            pack_lossless_into(weight, Lossless(out["data"], out["index"], *weight.shape))
        except TooManyExponents as reason:
            raise DoesNotFit(str(reason)) from reason

    def decode(
        self,
        parts: Parts,
        rows: int,
        cols: int,
        dtype: torch.dtype,
        stacked: int = 1,
        indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if indices is not None and torch.compiler.is_compiling():
            return _rows_op(parts["data"], parts["index"], indices, rows, cols).to(dtype)
        return expand_lossless(Lossless(parts["data"], parts["index"], rows, cols), _contiguous(indices)).to(
            dtype
        )

    def linear(self, x: torch.Tensor, parts: Parts, rows: int, bias: torch.Tensor | None) -> torch.Tensor:
        data, index = parts["data"], parts["index"]
        if x.requires_grad and torch.is_grad_enabled():
            return functional.linear(x, self.decode(parts, rows, x.shape[-1], x.dtype), bias)
        call = _linear_op if torch.compiler.is_compiling() else _linear
        return call(x, data, index, bias, rows)

    def experts(
        self,
        x: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        gate_up: Parts,
        down: Parts,
        inner: int,
    ) -> torch.Tensor:
        tensors = (gate_up["data"], gate_up["index"], down["data"], down["index"])
        call = _experts_op if torch.compiler.is_compiling() else _experts
        return call(x, index, weights, *tensors, inner)


def _contiguous(indices: torch.Tensor | None) -> torch.Tensor | None:
    return None if indices is None else indices.contiguous()


def _linear(
    x: torch.Tensor, data: torch.Tensor, index: torch.Tensor, bias: torch.Tensor | None, rows: int
) -> torch.Tensor:
    return lossless_linear(x.contiguous(), Lossless(data, index, rows, x.shape[-1]), bias)


def _rows(
    data: torch.Tensor, index: torch.Tensor, indices: torch.Tensor, rows: int, cols: int
) -> torch.Tensor:
    return expand_lossless(Lossless(data, index, rows, cols), indices.contiguous())


def _experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up_data: torch.Tensor,
    gate_up_index: torch.Tensor,
    down_data: torch.Tensor,
    down_index: torch.Tensor,
    inner: int,
) -> torch.Tensor:
    gate_up, down = (gate_up_data, gate_up_index), (down_data, down_index)
    return lossless_moe(x.contiguous(), index.contiguous(), weights.contiguous(), gate_up, down, inner)


# Only where torch has to see them: its dispatch costs 0.1 ms a token.
_linear_op = custom_op("pio::lossless_linear", _linear, mutates_args=(), device_types="cpu")
_rows_op = custom_op("pio::lossless_rows", _rows, mutates_args=(), device_types="cpu")
_experts_op = custom_op("pio::lossless_experts", _experts, mutates_args=(), device_types="cpu")
_linear_op.register_fake(lambda x, data, index, bias, rows: x.new_empty((*x.shape[:-1], rows)))
_rows_op.register_fake(
    lambda data, index, indices, rows, cols: data.new_empty((*indices.shape, cols), dtype=torch.bfloat16)
)
_experts_op.register_fake(lambda x, *_: torch.empty_like(x))
