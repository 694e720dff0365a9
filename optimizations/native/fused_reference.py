"""The fused operations in plain torch, rounding where the kernels round: what tests and other devices use.

Called with float64 tensors they are the exact reference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / rms(x), the variance in at least float32; shapes as `fused.rms_norm`."""
    wide = x.to(_accumulator(x.dtype))
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normal.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(h, rms_norm(h)) with h = x + residual."""
    total = x + residual
    return total, rms_norm(total, weight, eps)


def norm_rope(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, neighbours: bool = False
) -> Tensor:
    """Shapes and meaning as `fused.norm_rope`."""
    heads = (rms_norm(x, weight, eps) if weight is not None else x).transpose(1, 2)
    rope = cos.shape[-1]
    plain, turned = heads[..., : heads.shape[-1] - rope], heads[..., heads.shape[-1] - rope :]
    half, c, s = rope // 2, cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = (
        (turned[..., 0::2], turned[..., 1::2]) if neighbours else (turned[..., :half], turned[..., half:])
    )
    c2, s2 = (c[..., :half], s[..., :half]) if neighbours else (c[..., half:], s[..., half:])
    rotated = (first * c[..., :half] - second * s[..., :half], second * c2 + first * s2)
    return torch.cat((plain, *(part.to(x.dtype) for part in rotated)), dim=-1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return functional.silu(gate) * up


def gelu(x: Tensor) -> Tensor:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))"""
    return functional.gelu(x, approximate="tanh")
