"""Attention over a cache in the element type itself, bfloat16 or float32.

The history is walked once with an online softmax in float32, all query heads of a KV head together, threads over KV
heads, queries and stretches of history. Nothing is rounded between the products and the output, where torch's eager
attention rounds scores and probabilities to bfloat16; on AMX a probability before its product with bfloat16 values is
within 2^-17 of itself. Results have the same bits for any number of threads. Sources:
FlashAttention (arXiv 2205.14135) for the online softmax, Flash-Decoding for the split history, DeepSeek-V2
(arXiv 2405.04434) for keys of two parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimizations.native.checks import DTYPE_CODES, dtype_code, require_cpu, require_dtype
from optimizations.native.loader import native
from optimizations.native.masks import mask_numbers, readable_mask


def attend_dense(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = False,
    q_second: Tensor | None = None,
    second: Tensor | None = None,
) -> Tensor:
    """softmax(scaling * q . keys + mask) values over the first `length` tokens of a cache.

    q [batch, heads, queries, d]; keys [batch, kv heads, capacity, d] and values [batch, kv heads, capacity, d'] with any
    strides as long as a head's values are dense; heads a multiple of kv heads (neighbouring query heads share one).
    `q_second` and `second` add a second part to every key: the rotary part beside MLA's latent, whose values are the
    latents again; its kv heads may be 1 (shared). All float32 or all bfloat16.
    mask [1 or batch, 1 or heads, queries, >= length]: bool (True = seen) or float (added); `causal`: query i sees the
    first length - queries + i + 1 tokens. -> [batch, queries, heads, d'] in q's dtype. A query that sees nothing gives
    zeros. No gradient.

    Raises:
        TypeError, ValueError: dtypes, shapes or strides do not fit.
        NativeModuleMissing: the kernels are not built.
    """
    code = DTYPE_CODES.get(q.dtype)
    if code is None or not q.is_cpu:
        code = dtype_code("kv_attention", "q", q)
        require_cpu("kv_attention", "q", q)
    batch, kv_heads = keys.shape[:2]
    heads, queries = q.shape[1], q.shape[2]
    first = _key_part("q", q, "keys", keys, kv_heads, length)
    other = []
    if q_second is not None and second is not None:
        other = _key_part("q_second", q_second, "second", second, kv_heads, length)
        require_dtype("kv_attention", "q_second", q_second, q.dtype)
    _check_cache("values", values, q.dtype, batch, kv_heads, length)
    wanted = None if mask is None else readable_mask("kv_attention", mask)
    described = [] if wanted is None else mask_numbers("kv_attention", wanted, batch, heads, queries, length)
    out = torch.empty((batch, queries, heads, values.shape[3]), dtype=q.dtype)
    native().kv_attention(
        first,
        other,
        [values.data_ptr(), *_strides(values), values.shape[3]],
        described,
        batch,
        kv_heads,
        heads // kv_heads,
        queries,
        length,
        scaling,
        causal,
        out.data_ptr(),
        code,
        torch.get_num_threads(),
    )
    return out


def _strides(cache: Tensor) -> tuple[int, int, int]:
    batch, head, token, _ = cache.stride()
    return batch, 0 if cache.shape[1] == 1 else head, token


def _key_part(q_name: str, q: Tensor, name: str, keys: Tensor, kv_heads: int, length: int) -> list[int]:
    batch, dim = keys.shape[0], keys.shape[3]
    if q.dim() != 4 or q.shape[0] != batch or q.shape[1] % kv_heads or q.shape[3] != dim:
        raise ValueError(
            f"kv_attention: {q_name} must have shape ({batch}, a multiple of {kv_heads}, any, {dim}), "
            f"got {tuple(q.shape)}"
        )
    if q.stride(3) != 1:
        raise ValueError(
            f"kv_attention: the values of a head of {q_name} must be dense, strides are {q.stride()}"
        )
    _check_cache(name, keys, q.dtype, batch, kv_heads, length)
    return [q.data_ptr(), *q.stride()[:3], keys.data_ptr(), *_strides(keys), dim]


def _check_cache(
    name: str, cache: Tensor, dtype: torch.dtype, batch: int, kv_heads: int, length: int
) -> None:
    require_cpu("kv_attention", name, cache)
    require_dtype("kv_attention", name, cache, dtype)
    shape = tuple(cache.shape)
    if len(shape) != 4 or shape[0] != batch or shape[1] not in (1, kv_heads) or shape[2] < length:
        raise ValueError(
            f"kv_attention: {name} must have shape ({batch}, {kv_heads}, at least {length}, any), got {shape}"
        )
    if cache.stride(3) != 1:
        raise ValueError(
            f"kv_attention: the values of a head of {name} must be dense, strides are {cache.stride()}"
        )
