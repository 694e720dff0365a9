"""The kernels' results in plain torch: what tests compare with, and what to read to know what a kernel computes.

`exact_*` use the packed weight's values and unquantized activations, in float64. `quantized_*` also round activations as
the kernels do, so that they differ from them by the order of float32 sums only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from optimizations.native.experts import PackedExperts
from optimizations.native.packing import LANES, Packed


def levels(packed: Packed) -> tuple[Tensor, Tensor]:
    """A packed weight's integers int64 [rows, groups, group] and scales float64 [rows, groups], decoded here from the bytes
    (layout 1); rows and columns with what pads them."""
    panels, groups, _ = packed.data.shape
    blocks = packed.data.reshape(panels, groups, -1, LANES, 4).to(torch.int64)
    if packed.bits == 4:
        q = torch.stack((blocks & 15, blocks >> 4), dim=3) - 8  # panel, group, block, half, lane, byte
    else:
        q = blocks.unsqueeze(3) - 128
    q = q.permute(0, 4, 1, 2, 3, 5).reshape(panels * LANES, groups, packed.group_size)
    return q, packed.scales.double().transpose(1, 2).reshape(panels * LANES, groups)


def unpack(packed: Packed) -> Tensor:
    """The values of a packed weight, float64 [rows, cols]."""
    q, scales = levels(packed)
    return (q.double() * scales.unsqueeze(-1)).flatten(1)[: packed.rows, : packed.cols]


def round_activations(x: Tensor, group_size: int) -> Tensor:
    """x [..., cols] as the kernels see it: int8 with one scale per group of columns, in float64."""
    cols = x.shape[-1]
    padded = functional.pad(x.float(), (0, -cols % group_size))
    grouped = padded.unflatten(-1, (-1, group_size))
    most = grouped.abs().amax(-1, keepdim=True)
    # A true division, as in the kernel: `127 / tensor` would be 127 * reciprocal, which rounds twice.
    inverse = torch.where(most > 0, torch.full_like(most, 127.0) / most, torch.zeros_like(most))
    q = torch.round(grouped * inverse)
    return (q.double() * (most / 127.0).double()).flatten(-2)[..., :cols]


def exact_linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """x [..., cols] @ weight^T + bias in float64."""
    y = x.double() @ unpack(weight).T
    return y if bias is None else y + bias.double()


def quantized_linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """The same with rounded activations: what `pio::linear_int4` and `linear_int8` compute, before float32 rounding."""
    return exact_linear(round_activations(x, weight.group_size), weight, bias)


def exact_moe(x: Tensor, experts: Tensor, weights: Tensor, packed: PackedExperts) -> Tensor:
    """y [tokens, hidden] in float64: see `linear.moe`."""
    return _moe(x.double(), experts, weights, packed, lambda rows: rows)


def quantized_moe(x: Tensor, experts: Tensor, weights: Tensor, packed: PackedExperts) -> Tensor:
    """The same with activations rounded before both products: what `pio::moe_int4` and `moe_int8` compute."""
    return _moe(x, experts, weights, packed, lambda rows: round_activations(rows, packed.group_size))


def _moe(
    x: Tensor, experts: Tensor, weights: Tensor, packed: PackedExperts, seen: Callable[[Tensor], Tensor]
) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for e in experts.unique().tolist():
        token, choice = (experts == e).nonzero(as_tuple=True)
        rows = seen(x[token])
        gate, up = rows @ unpack(packed.gate(e)).T, rows @ unpack(packed.up(e)).T
        hidden = seen(functional.silu(gate) * up).double()
        out.index_add_(0, token, hidden @ unpack(packed.down(e)).T * weights[token, choice].double()[:, None])
    return out
