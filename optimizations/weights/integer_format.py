"""Groupwise int4 and int8 weights in the layout of the project's kernels."""

from __future__ import annotations

import dataclasses

import torch
from torch.library import custom_op

from optimizations.native.experts import PackedExperts as NativeExperts
from optimizations.native.linear import linear, moe
from optimizations.native.packing import LANES, Packed, dequantize, dequantize_rows, pack_into, packed_shapes
from optimizations.weights.formats import Parts, WeightFormat


@dataclasses.dataclass(frozen=True)
class IntegerFormat(WeightFormat):
    """Symmetric integers of `bits` (4 or 8) with one bf16 scale per row and `group_size` columns.

    Bits per weight: `bits` + 16 / `group_size`. Rows are padded to 16, columns to the group.
    """

    bits: int
    group_size: int

    def layout(
        self, rows: int, cols: int, stacked: int = 1
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        padded = stacked * (-(-(rows // stacked) // LANES) * LANES)
        data, scales = packed_shapes(padded, cols, self.bits, self.group_size)
        return {"data": (data, torch.uint8), "scales": (scales, torch.bfloat16)}

    def encode(self, weight: torch.Tensor, out: Parts, stacked: int = 1) -> None:
        rows = weight.shape[0] // stacked
        for block, part in enumerate(self._blocks(out, rows, weight.shape[1], stacked)):
            pack_into(weight[block * rows : (block + 1) * rows], part)

    def piece_rows(self, rows: int, cols: int) -> int | None:
        return LANES

    def encode_piece(self, weight: torch.Tensor, out: Parts, start: int, rows: int) -> None:
        panels = slice(start // LANES, -(-(start + weight.shape[0]) // LANES))
        part = self._packed(out["data"][panels], out["scales"][panels], *weight.shape)
        pack_into(weight, part)

    def decode(
        self,
        parts: Parts,
        rows: int,
        cols: int,
        dtype: torch.dtype,
        stacked: int = 1,
        indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if indices is not None:
            # Only where torch has to see it: its dispatch costs 0.1 ms a token.
            look_up = _rows_op if torch.compiler.is_compiling() else _rows
            return look_up(parts["data"], parts["scales"], indices, rows, cols, self.bits, dtype)
        blocks = self._blocks(parts, rows // stacked, cols, stacked)
        return torch.cat([dequantize(block, dtype=dtype) for block in blocks])

    def linear(self, x: torch.Tensor, parts: Parts, rows: int, bias: torch.Tensor | None) -> torch.Tensor:
        packed = self._packed(parts["data"], parts["scales"], rows, x.shape[-1])
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return linear(x.contiguous(), packed, bias)

    def experts(
        self,
        x: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        gate_up: Parts,
        down: Parts,
        inner: int,
    ) -> torch.Tensor:
        packed = NativeExperts(
            gate_up["data"],
            gate_up["scales"],
            down["data"],
            down["scales"],
            x.shape[-1],
            inner,
            self.bits,
            self.group_size,
        )
        return moe(x.contiguous(), index.contiguous(), weights.contiguous(), packed)

    def _packed(self, data: torch.Tensor, scales: torch.Tensor, rows: int, cols: int) -> Packed:
        return Packed(data, scales, rows, cols, self.bits, self.group_size)

    def _blocks(self, parts: Parts, rows: int, cols: int, stacked: int) -> list[Packed]:
        panels = parts["data"].shape[0] // stacked
        cuts = [slice(block * panels, (block + 1) * panels) for block in range(stacked)]
        return [self._packed(parts["data"][cut], parts["scales"][cut], rows, cols) for cut in cuts]


def _rows(
    data: torch.Tensor,
    scales: torch.Tensor,
    indices: torch.Tensor,
    rows: int,
    cols: int,
    bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows `indices` (int64 [n]) of a packed weight [rows, cols], dequantized."""
    return dequantize_rows(Packed.wrap(data, scales, rows, cols, bits), indices.contiguous(), dtype=dtype)


_rows_op = custom_op("pio::packed_rows", _rows, mutates_args=(), device_types="cpu")


@_rows_op.register_fake
def _(
    data: torch.Tensor,
    scales: torch.Tensor,
    indices: torch.Tensor,
    rows: int,
    cols: int,
    bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return data.new_empty((indices.shape[0], cols), dtype=dtype)
