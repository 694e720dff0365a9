"""The int8 cache and its attention in plain torch: what the kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from optimizations.native.attention import BLOCK, Store


def quantize(x: Tensor, channel: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [..., d] -> (int8 codes [..., d], float32 scales [...]), symmetric per row of x / channel."""
    wide = x.float() if channel is None else x.float() / channel
    scales = wide.abs().amax(-1) / 127
    inverse = torch.where(scales > 0, 1 / scales, torch.zeros_like(scales))
    return (wide * inverse.unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8), scales


def append(store: Store, x: Tensor, start: int) -> None:
    """As `attention.append`."""
    codes, scales = quantize(x, store.channel)
    positions = torch.arange(start, start + x.shape[2])
    batch, heads, tokens, dim = codes.shape
    bytes_ = (codes.to(torch.int16) + 128).to(torch.uint8).view(batch, heads, tokens, dim // 4, 4)
    store.codes[:, :, positions // BLOCK, :, positions % BLOCK] = bytes_.permute(2, 0, 1, 3, 4)
    store.scales[:, :, positions] = scales


def dequantize(store: Store, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The first `length` tokens as [batch, heads, length, d]."""
    batch, heads, blocks, quads, _, _ = store.codes.shape
    codes = store.codes.permute(0, 1, 2, 4, 3, 5).reshape(batch, heads, blocks * BLOCK, quads * 4)
    values = (codes[:, :, :length].to(dtype) - 128) * store.scales[:, :, :length, None].to(dtype)
    return values if store.channel is None else values * store.channel.to(dtype)


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention in q's dtype over dense keys and values [batch, kv heads, length, d] -> [batch, queries, heads, d]."""
    group = q.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = q @ keys.transpose(-1, -2) * scaling
    queries, length = scores.shape[-2:]
    seen = torch.ones((queries, length), dtype=torch.bool)
    if causal:
        seen = seen.tril(length - queries)
    if mask is not None:
        mask = mask[..., :length]
        seen = seen & (mask if mask.dtype == torch.bool else mask > -1e30)
        scores = scores if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    scores = scores.masked_fill(~seen, float("-inf"))
    weights = torch.softmax(scores, -1).nan_to_num(0.0)  # a row that sees nothing
    return (weights @ values).transpose(1, 2)
