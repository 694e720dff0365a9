"""NF4 weights in bitsandbytes' own layouts, multiplied by its CPU kernels."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch.library import custom_op
from torch.nn import functional

from optimizations.weights.formats import Parts, WeightFormat

_PANEL = 32  # rows that bitsandbytes' fused kernel interleaves
_CHUNK = 4096  # rows packed at a time: the copies on the way stay small beside the matrix
_PIECE = 1 << 18  # weights quantized at a time: 1 MiB of float32
_NESTED_BLOCK = 256


# The 16 levels of NF4 and the 256 that second-level quantization rounds scales to, float32, once bitsandbytes is loaded.
_TABLES: dict[str, torch.Tensor] = {}


def _bitsandbytes() -> Any:
    """bitsandbytes.functional, imported on first use: the import takes a second and looks for devices."""
    import bitsandbytes.functional as bnb

    if not _TABLES:
        with _defaults():
            _TABLES["nf4"] = bnb.get_4bit_type("nf4", device="cpu")
            _TABLES["nested"] = bnb.create_dynamic_map()
    return bnb


@contextlib.contextmanager
def _defaults() -> Iterator[None]:
    """torch's usual defaults. transformers builds models with the meta device and bfloat16 as defaults, and
    bitsandbytes would make its tables (which it caches) so."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


@dataclasses.dataclass(frozen=True)
class Nf4Format(WeightFormat):
    """NormalFloat 4-bit with one scale per `block_size` weights of a row.

    Three layouts: `fused` for bitsandbytes' AVX512-BF16 kernel (bf16 scales, 4 + 16 / block_size bits), plain
    (float32 scales), and plain with scales quantized to 8 bits (`double_quant`, 4.13 bits at block 64). The plain
    ones are dequantized to the activations' dtype at every call.
    """

    block_size: int
    double_quant: bool

    def fused(self, rows: int, cols: int) -> bool:
        """Whether bitsandbytes' fused kernel multiplies a matrix of this size on this machine."""
        fits = rows % _PANEL == 0 and cols % self.block_size == 0
        return fits and not self.double_quant and bool(_bitsandbytes().has_avx512bf16())

    def unfit(self, rows: int, cols: int) -> str | None:
        return f"NF4 stores pairs of columns and the matrix has {cols}" if cols % 2 else None

    def layout(
        self, rows: int, cols: int, stacked: int = 1
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        if self.fused(rows, cols):
            scales = (cols // self.block_size, rows)
            return {"codes": ((rows, cols // 2), torch.uint8), "absmax": (scales, torch.bfloat16)}
        codes, blocks = (rows * cols // 2, 1), -(-rows * cols // self.block_size)
        if not self.double_quant:
            return {"codes": (codes, torch.uint8), "absmax": ((blocks,), torch.float32)}
        return {
            "codes": (codes, torch.uint8),
            "absmax": ((blocks,), torch.uint8),
            "nested_absmax": ((-(-blocks // _NESTED_BLOCK),), torch.float32),
            "offset": ((1,), torch.float32),
        }

    def encode(self, weight: torch.Tensor, out: Parts, stacked: int = 1) -> None:
        if _is_fused(out):
            for start in range(0, weight.shape[0], _CHUNK):
                self._encode_fused(weight[start : start + _CHUNK], out, start)
            return
        codes, state = self._quantize(weight)
        out["codes"].copy_(codes)
        out["absmax"].copy_(state.absmax)
        if self.double_quant:
            out["nested_absmax"].copy_(state.state2.absmax)
            out["offset"].copy_(state.offset)

    def piece_rows(self, rows: int, cols: int) -> int | None:
        return _PANEL if self.fused(rows, cols) else None

    def encode_piece(self, weight: torch.Tensor, out: Parts, start: int, rows: int) -> None:
        for first in range(0, weight.shape[0], _CHUNK):
            self._encode_fused(weight[first : first + _CHUNK], out, start + first)

    def _quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
        with _defaults():
            return _bitsandbytes().quantize_4bit(
                weight, blocksize=self.block_size, compress_statistics=self.double_quant, quant_type="nf4"
            )

    def _encode_fused(self, weight: torch.Tensor, out: Parts, start: int) -> None:
        rows, cols = weight.shape
        codes, absmax = nearest_levels(weight.reshape(-1, self.block_size))
        panels = codes.view(-1, _PANEL, cols // 2, 2).transpose(1, 2)  # [panel, pair of columns, row, column]
        packed = panels[:, :, : _PANEL // 2] | (panels[:, :, _PANEL // 2 :] << 4)
        out["codes"][start : start + rows].copy_(packed.reshape(rows, cols // 2))
        out["absmax"][:, start : start + rows].copy_(absmax.view(rows, -1).T)

    def decode(
        self,
        parts: Parts,
        rows: int,
        cols: int,
        dtype: torch.dtype,
        stacked: int = 1,
        indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not _is_fused(parts):
            dense = self._dense(parts, rows, cols, dtype)
            return dense if indices is None else dense[indices]
        if indices is not None:
            return self._fused_rows(parts, indices, cols, dtype)
        pieces = torch.arange(rows).split(_CHUNK)
        return torch.cat([self._fused_rows(parts, piece, cols, dtype) for piece in pieces])

    def _dense(self, parts: Parts, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        scales = parts["absmax"]
        if self.double_quant:
            scales = torch.ops.bitsandbytes.dequantize_blockwise(
                scales, parts["nested_absmax"], _TABLES["nested"], _NESTED_BLOCK, torch.float32
            )
            scales = scales + parts["offset"]
        return torch.ops.bitsandbytes.dequantize_4bit(
            parts["codes"], scales, self.block_size, "nf4", [rows, cols], dtype
        )

    def _fused_rows(self, parts: Parts, indices: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the interleaved layout: panels of 32 rows, byte = row r (low half) and row r + 16 (high)."""
        panels = parts["codes"].view(-1, cols // 2, _PANEL // 2, 2)
        place = indices % _PANEL
        pairs = panels[indices // _PANEL, :, place % (_PANEL // 2)]  # [n, cols / 2, 2]
        codes = torch.where((place < _PANEL // 2)[:, None, None], pairs & 15, pairs >> 4)
        scales = parts["absmax"][:, indices].T.float().repeat_interleave(self.block_size, dim=1)
        return (_TABLES["nf4"][codes.reshape(-1, cols).int()] * scales).to(dtype)

    def linear(self, x: torch.Tensor, parts: Parts, rows: int, bias: torch.Tensor | None) -> torch.Tensor:
        cols = x.shape[-1]
        if not _is_fused(parts):
            return functional.linear(x, self._dense(parts, rows, cols, x.dtype), bias)
        y = torch.ops.bitsandbytes.gemv_4bit(
            x.contiguous(), parts["codes"], [rows, cols], parts["absmax"], _TABLES["nf4"], self.block_size
        )
        return y if bias is None else y + bias

    def experts(
        self,
        x: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        gate_up: Parts,
        down: Parts,
        inner: int,
    ) -> torch.Tensor:
        names = list(gate_up)
        first, second = [gate_up[name] for name in names], [down[name] for name in down]
        return _experts(x, index, weights, first, second, inner, self.block_size, self.double_quant)


def nearest_levels(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The NF4 codes (uint8) of `blocks` [n, block_size] and their scales (float32 [n]), as bitsandbytes assigns them.

    It searches the midpoints between levels for each value; counting those below it, in pieces that stay in the
    cache, gives the same number four times faster (a 4096 x 4096 matrix on one busy core: 1.1 s against 4.8 s).
    """
    levels = _TABLES["nf4"]
    midpoints = ((levels[:-1] + levels[1:]) / 2).tolist()
    codes = torch.empty(blocks.shape, dtype=torch.uint8)
    scales = torch.empty(blocks.shape[0], dtype=torch.float32)
    step = max(1, _PIECE // blocks.shape[1])
    for start in range(0, blocks.shape[0], step):
        piece = blocks[start : start + step].float()
        absmax = piece.abs().amax(-1)
        scales[start : start + step] = absmax
        piece = (piece * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
        count = codes[start : start + step].zero_()
        for midpoint in midpoints:
            count += piece > midpoint
    return codes, scales


def _is_fused(parts: Parts) -> bool:
    return parts["absmax"].dim() == 2


@custom_op("pio::nf4_experts", mutates_args=(), device_types="cpu")
def _experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    inner: int,
    block_size: int,
    double_quant: bool,
) -> torch.Tensor:
    """Expert by expert over those that have tokens; one operator, so that it compiles."""
    fmt = Nf4Format(block_size, double_quant)
    up_names, down_names = fmt.layout(2 * inner, x.shape[1]), fmt.layout(x.shape[1], inner)
    out = torch.zeros(x.shape, dtype=torch.float32)
    for expert in index.unique().tolist():
        token, choice = (index == expert).nonzero(as_tuple=True)
        first = {name: part[expert] for name, part in zip(up_names, gate_up, strict=True)}
        second = {name: part[expert] for name, part in zip(down_names, down, strict=True)}
        gate, up = fmt.linear(x[token], first, 2 * inner, None).chunk(2, dim=-1)
        y = fmt.linear(functional.silu(gate) * up, second, x.shape[1], None)
        out.index_add_(0, token, y.float() * weights[token, choice, None].float())
    return out.to(x.dtype)


@_experts.register_fake
def _(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    inner: int,
    block_size: int,
    double_quant: bool,
) -> torch.Tensor:
    return torch.empty_like(x)
