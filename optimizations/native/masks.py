"""Attention masks as the kernels take them."""

from __future__ import annotations

import torch
from torch import Tensor


def readable_mask(kernel: str, mask: Tensor) -> Tensor:
    """bool or float32 with dense rows; the caller keeps it alive for the call.

    Raises:
        TypeError: it is neither bool nor floating point.
    """
    if mask.dtype not in (torch.bool, torch.float32):
        if not mask.is_floating_point():
            raise TypeError(f"{kernel}: mask must be bool or floating point, got {mask.dtype}")
        mask = mask.float()
    return mask if mask.stride(-1) == 1 else mask.contiguous()


def mask_numbers(kernel: str, mask: Tensor, batch: int, heads: int, queries: int, length: int) -> list[int]:
    """{bool address, float32 address, batch, head, query strides} of a readable mask; a size of 1 has stride 0.

    Raises:
        ValueError: the mask is not [1 or batch, 1 or heads, 1 or queries, at least length].
    """
    shape = tuple(mask.shape)
    fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2] in (1, queries)
    if not fits or shape[3] < length:
        raise ValueError(
            f"{kernel}: mask must have shape (1 or {batch}, 1 or {heads}, {queries}, at least {length}), got {shape}"
        )
    strides = [0 if size == 1 else step for size, step in zip(shape[:3], mask.stride()[:3], strict=True)]
    seen = mask.dtype == torch.bool
    return [mask.data_ptr() if seen else 0, 0 if seen else mask.data_ptr(), *strides]
