"""Linear layers over torch's own int4 CPU kernel, and a model's layers replaced by them."""

from __future__ import annotations

import torch
from torch import nn

GROUP = 32
ROWS = 16  # the kernel takes output widths that are a multiple of this
LEVELS = 15


class Int4Linear(nn.Module):
    """`aten._weight_int4pack_mm_for_cpu`: asymmetric int4 in groups of `GROUP`, scales and zeros in the input's type.

    Args:
        linear: its weight [rows, cols] is quantized (min-max per group), its bias kept.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        levels, scales, zeros = quantized(linear.weight.detach())
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
        self.scales_and_zeros = torch.stack([scales.T, zeros.T], dim=-1).to(linear.weight.dtype).contiguous()
        self.bias = linear.bias
        self.rows = linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., rows] of x [..., cols]."""
        flat = x.reshape(-1, x.shape[-1])
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, GROUP, self.scales_and_zeros)
        y = y.reshape(*x.shape[:-1], self.rows)
        return y if self.bias is None else y + self.bias


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels 0..15 (int32 [rows, cols]) and per group scale and zero, so that weight = (level - 8) * scale + zero."""
    rows, cols = weight.shape
    groups = weight.float().reshape(rows, cols // GROUP, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / LEVELS).clamp(min=1e-6)
    levels = ((groups - low[..., None]) / scales[..., None]).round().clamp(0, LEVELS)
    return levels.to(torch.int32).reshape(rows, cols), scales, low + 8 * scales


def replace_linears(model: nn.Module) -> list[str]:
    """Put `Int4Linear` in the place of every linear layer of the text model; names of those the kernel cannot take.

    One layer at a time, so that the model never exists twice. The vision tower stays as it is.
    """
    kept: list[str] = []
    places = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, linear in places:
        if ".visual." in f".{name}":
            continue
        if linear.in_features % GROUP or linear.out_features % ROWS:
            kept.append(name)
            continue
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, Int4Linear(linear))
    return kept
