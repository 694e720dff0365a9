"""Qwen3-VL's vision tower with fewer passes over memory; the products stay those of its linear layers.

Of 2.3 s for a 448-pixel image (784 patches, 24 blocks, bf16, two cores with AMX) transformers spends 0.65 in a
convolution that is a product, 0.19 in rotating queries and keys by a dozen float32 operations, and 0.17 in GELU; on
Zen 4, of 5 s, 0.5 in attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from optimizations.forwards import attention_interface
from optimizations.native.dense_attention import attend_dense
from optimizations.native.fused import gelu, norm_rope
from optimizations.native.loader import native


def embed_patches(module: Any, hidden_states: Tensor) -> Tensor:
    """The patch embedding by one product: pixels [patches, channels * frames * side * side] -> [patches, hidden].

    Each patch is a whole input of the convolution and as large as its kernel, so it is a product of rows. oneDNN's
    convolution takes 0.65 to 0.78 s for the 784 patches of a 448-pixel image (Qwen3-VL-2B, two cores with AMX), the
    product 6 ms. Sums are in another order.
    """
    kernel = module.proj
    weight = kernel.weight.reshape(kernel.out_channels, -1)
    pixels = hidden_states.reshape(-1, weight.shape[1]).to(weight.dtype)
    return functional.linear(pixels, weight, kernel.bias)


def attend(
    attention: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    max_seqlen: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention of each image's patches [patches, hidden] among themselves; queries and keys turned in one pass each.

    `cu_seqlens` says where images (frames of a video) begin and the last one ends. The rotation has transformers'
    bits: products and sums in float32, rounded once.
    """
    patches = hidden_states.shape[0]
    packed = attention.qkv(hidden_states).view(1, patches, 3, attention.num_heads, -1)
    cos, sin = (angles.float().unsqueeze(0).contiguous() for angles in position_embeddings)
    q = norm_rope(packed[:, :, 0], None, cos, sin, 0.0)
    k = norm_rope(packed[:, :, 1], None, cos, sin, 0.0)
    v = packed[:, :, 2].transpose(1, 2)
    images = zip(*(tensor.split(cu_seqlens.diff().tolist(), dim=2) for tensor in (q, k, v)), strict=True)
    attended = [_among_themselves(attention, q, k, v, kwargs) for q, k, v in images]
    return attention.proj(torch.cat(attended, dim=1).reshape(patches, -1))


def _among_themselves(attention: Any, q: Tensor, k: Tensor, v: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """q, k, v [1, heads, patches, d] of one image -> [1, patches, heads, d].

    In place of torch's SDPA the native kernel, on AVX-512: 16 heads of 64 over 784 patches take 13 ms where torch takes
    18 (bf16, two cores, Zen 4; 1.35x [1.32, 1.46]). On AVX2 it took 28 to 22; on AMX torch multiplies tiles too.
    """
    dropout = attention.attention_dropout if attention.training else 0.0
    if attention.config._attn_implementation == "sdpa" and dropout == 0.0 and native().isa() == "avx512":
        return attend_dense(q, k, v, k.shape[2], attention.scaling)
    out, _ = attention_interface(attention)(
        attention, q, k, v, None, scaling=attention.scaling, dropout=dropout, is_causal=False, **kwargs
    )
    return out


def _gelu(module: Any, input: Tensor) -> Tensor:
    return gelu(input)


# Class name of a transformers module -> what runs in its place.
TOWER: Mapping[str, Callable[..., Any]] = {
    "Qwen3VLVisionPatchEmbed": embed_patches,
    "Qwen3VLVisionAttention": attend,
    "GELUTanh": _gelu,
}
