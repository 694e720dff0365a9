"""Int8 caches of keys and values, and attention that reads them directly.

A store holds int8 codes with one float32 scale per token and head: scale = max |x| / 127, error at most scale / 2 per
value. A `channel` vector may divide every token first (and multiply the other side of the product afterwards), which
takes per-channel outliers out of the maximum. Layout: `kernels/src/int8_kv_append.cc`.

`attend` walks the history once with an online softmax, all query heads of a KV head together, threads over KV heads,
queries and stretches of history. Queries and probabilities are 15-bit integers inside, relative error 2^-14 of a row's
largest element; the rest is exact integer arithmetic and float32. Sources: KIVI (arXiv 2402.02750) for what to scale
by, Flash-Decoding for the split history. Results have the same bits for any number of threads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optimizations.native.checks import DTYPE_CODES, dtype_code, require_cpu, require_tensor
from optimizations.native.loader import native
from optimizations.native.masks import mask_numbers, readable_mask

BLOCK = 16  # tokens whose bytes lie together


class Store(NamedTuple):
    """An int8 cache of one layer's keys, values or latents.

    codes uint8 [batch, heads, capacity / 16, d / 4, 16, 4], code + 128; scales float32 [batch, heads, capacity];
    channel float32 [d] or None.
    """

    codes: Tensor
    scales: Tensor
    channel: Tensor | None = None

    @property
    def capacity(self) -> int:
        return self.scales.shape[2]

    @property
    def dim(self) -> int:
        return self.codes.shape[3] * 4


def new_store(batch: int, heads: int, capacity: int, dim: int, channel: Tensor | None = None) -> Store:
    """An empty store. ValueError unless d is a multiple of 4, at most 1024, and capacity a multiple of 16."""
    if dim % 4 or not 0 < dim <= 1024:
        raise ValueError(f"an int8 cache needs heads of a multiple of 4 values, at most 1024, got {dim}")
    if capacity % BLOCK or capacity <= 0:
        raise ValueError(
            f"the capacity of an int8 cache must be a positive multiple of {BLOCK}, got {capacity}"
        )
    codes = torch.empty((batch, heads, capacity // BLOCK, dim // 4, BLOCK, 4), dtype=torch.uint8)
    # Zeros, because a block's unused scales are multiplied before they are masked.
    return Store(codes, torch.zeros((batch, heads, capacity)), channel)


def append(store: Store, x: Tensor, start: int) -> None:
    """Quantizes x [batch, heads, tokens, d], float32 or bfloat16, into tokens [start, start + tokens) of the store.

    Raises:
        TypeError, ValueError: dtype, shape or strides do not fit, or the tokens do not fit into the capacity.
    """
    code = DTYPE_CODES.get(x.dtype)
    batch, heads, capacity = store.scales.shape
    if code is None or not x.is_cpu:
        code = dtype_code("int8_kv_append", "x", x)
        require_cpu("int8_kv_append", "x", x)
    if x.dim() != 4 or x.shape[0] != batch or x.shape[1] != heads or x.shape[3] != store.dim:
        raise ValueError(
            f"int8_kv_append: x must have shape ({batch}, {heads}, any, {store.dim}), got {tuple(x.shape)}"
        )
    if x.stride(3) != 1:
        raise ValueError(f"int8_kv_append: the values of a head must be dense, strides are {x.stride()}")
    native().int8_kv_append(
        x.data_ptr(),
        0 if store.channel is None else store.channel.data_ptr(),
        store.codes.data_ptr(),
        store.scales.data_ptr(),
        batch,
        heads,
        x.shape[2],
        store.dim,
        capacity,
        start,
        x.stride(0),
        x.stride(1),
        x.stride(2),
        code,
        torch.get_num_threads(),
    )


def attend(
    q: Tensor,
    keys: Store,
    values: Store,
    length: int,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = False,
    q_second: Tensor | None = None,
    second: Store | None = None,
) -> Tensor:
    """softmax(scaling * q . keys + mask) values over the first `length` tokens of the stores.

    q [batch, heads, queries, d] float32 or bfloat16, heads a multiple of the stores' heads (neighbouring query heads
    share one). `q_second` and `second` add a second part to every key: the rotary part beside MLA's latent.
    mask [1 or batch, 1 or heads, queries, >= length]: bool (True = seen) or float (added); `causal`: query i sees the
    first length - queries + i + 1 tokens. -> [batch, queries, heads, d of values] in q's dtype. A query that sees
    nothing gives zeros.

    Raises:
        TypeError, ValueError: dtypes, shapes or strides do not fit.
        NativeModuleMissing: the kernels are not built.
    """
    if torch.compiler.is_compiling() or (q.requires_grad and torch.is_grad_enabled()):
        parts = (q_second, *(second or (None, None, None)))
        return torch.ops.pio.int8_kv_attention(q, *keys, *parts, *values, mask, length, scaling, causal)
    return _attend(q, keys, values, length, scaling, mask, causal, q_second, second)


def _attend(
    q: Tensor,
    keys: Store,
    values: Store,
    length: int,
    scaling: float,
    mask: Tensor | None,
    causal: bool,
    q_second: Tensor | None,
    second: Store | None,
) -> Tensor:
    code = DTYPE_CODES.get(q.dtype)
    if code is None or not q.is_cpu:
        code = dtype_code("int8_kv_attention", "q", q)
        require_cpu("int8_kv_attention", "q", q)
    batch, kv_heads, capacity = keys.scales.shape
    heads, queries = q.shape[1], q.shape[2]
    first = _key_part(q, keys, batch, kv_heads)
    other: list[int] = []
    if q_second is not None and second is not None:
        require_tensor(
            "int8_kv_attention", "second scales", second.scales, torch.float32, (batch, kv_heads, capacity)
        )
        other = _key_part(q_second.to(q.dtype), second, batch, kv_heads)
    require_tensor(
        "int8_kv_attention", "value scales", values.scales, torch.float32, (batch, kv_heads, capacity)
    )
    wanted = None if mask is None else readable_mask("int8_kv_attention", mask)
    described = (
        [] if wanted is None else mask_numbers("int8_kv_attention", wanted, batch, heads, queries, length)
    )
    out = torch.empty((batch, queries, heads, values.dim), dtype=q.dtype)
    native().int8_kv_attention(
        first,
        other,
        [*_addresses(values), values.dim],
        described,
        batch,
        kv_heads,
        heads // kv_heads,
        queries,
        length,
        capacity,
        scaling,
        causal,
        out.data_ptr(),
        code,
        torch.get_num_threads(),
    )
    return out


def _addresses(store: Store) -> tuple[int, int, int]:
    channel = 0 if store.channel is None else store.channel.data_ptr()
    return store.codes.data_ptr(), store.scales.data_ptr(), channel


def _key_part(q: Tensor, store: Store, batch: int, kv_heads: int) -> list[int]:
    if q.dim() != 4 or q.shape[0] != batch or q.shape[1] % kv_heads or q.shape[3] != store.dim:
        raise ValueError(
            f"int8_kv_attention: q must have shape ({batch}, a multiple of {kv_heads}, any, {store.dim}), "
            f"got {tuple(q.shape)}"
        )
    if q.stride(3) != 1:
        raise ValueError(f"int8_kv_attention: the values of a query must be dense, strides are {q.stride()}")
    codes, scales, channel = _addresses(store)
    return [q.data_ptr(), channel, codes, scales, store.dim, q.stride(0), q.stride(1), q.stride(2)]


@torch.library.custom_op("pio::int8_kv_attention", mutates_args=(), device_types="cpu")
def _attention_op(
    q: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    key_channel: Tensor | None,
    q_second: Tensor | None,
    second_codes: Tensor | None,
    second_scales: Tensor | None,
    second_channel: Tensor | None,
    value_codes: Tensor,
    value_scales: Tensor,
    value_channel: Tensor | None,
    mask: Tensor | None,
    length: int,
    scaling: float,
    causal: bool,
) -> Tensor:
    second = None
    if second_codes is not None and second_scales is not None:
        second = Store(second_codes, second_scales, second_channel)
    keys = Store(key_codes, key_scales, key_channel)
    values = Store(value_codes, value_scales, value_channel)
    return _attend(q, keys, values, length, scaling, mask, causal, q_second, second)


def _attention_fake(q: Tensor, *others: Tensor) -> Tensor:
    value_codes = others[7]
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], value_codes.shape[3] * 4))


def _no_gradient(ctx: object, grad: Tensor) -> None:
    raise RuntimeError(
        "kv_int8 has no gradient: keys and values were rounded to int8. Pass use_cache=False where a gradient is wanted."
    )


_attention_op.register_fake(_attention_fake)
_attention_op.register_autograd(_no_gradient)


@torch.library.custom_op("pio::int8_kv_append", mutates_args=("codes", "scales"), device_types="cpu")
def _append_op(x: Tensor, codes: Tensor, scales: Tensor, channel: Tensor | None, start: int) -> None:
    append(Store(codes, scales, channel), x, start)
