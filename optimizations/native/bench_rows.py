"""The kernels that pass over rows, and the int8 cache, against the bandwidth; a part of `python -m optimizations.native.bench`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from optimizations.native import attention, fused, fused_reference
from optimizations.native.argmax import argmax
from optimizations.native.bench_tools import Candidate, Limits, copies, show

EPS = 1e-6


def spread(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


def compare(
    title: str,
    inputs: Callable[[], tuple[Tensor, ...]],
    ways: dict[str, Callable[..., object]],
    written: int,
    rounds: int,
    limits: Limits,
) -> None:
    """`ways` over the same inputs, of which there are enough copies to exceed the caches; bytes are read and written ones."""
    one = inputs()
    nbytes = sum(tensor.nbytes for tensor in one)
    many = [one, *(tuple(t.clone() for t in one) for _ in range(copies(nbytes) - 1))]
    candidates = [
        Candidate(name, nbytes + written, lambda i, f=f: f(*many[i % len(many)]))  # type: ignore[misc]
        for name, f in ways.items()
    ]
    show(title, candidates, 0.0, rounds, limits)


def bench_fused(tokens: int, rounds: int, limits: Limits) -> None:
    """Rows of Qwen3-4B, and GELU's of Qwen3-VL-2B's vision tower."""
    hidden, heads, dim, inner = 2560, 32, 128, 9728
    weight, narrow = spread(hidden), spread(dim)
    cos, sin = (spread(1, tokens, dim) for _ in range(2))
    row = 2 * tokens * hidden
    compare(
        f"add + RMSNorm {tokens} x {hidden}",
        lambda: (spread(tokens, hidden), spread(tokens, hidden)),
        {
            "add_rms_norm": lambda x, r: fused.add_rms_norm(x, r, weight, EPS),
            "torch ops": lambda x, r: fused_reference.add_rms_norm(x, r, weight, EPS),
        },
        2 * row,
        rounds,
        limits,
    )
    compare(
        f"QK-norm + RoPE {tokens} x {heads} heads of {dim}",
        lambda: (spread(1, tokens, heads, dim),),
        {
            "norm_rope": lambda x: fused.norm_rope(x, narrow, cos, sin, EPS),
            "torch ops": lambda x: fused_reference.norm_rope(x, narrow, cos, sin, EPS),
        },
        2 * tokens * heads * dim,
        rounds,
        limits,
    )
    compare(
        f"SwiGLU {tokens} x {inner}",
        lambda: (spread(tokens, inner), spread(tokens, inner)),
        {"swiglu": fused.swiglu, "torch ops": fused_reference.swiglu},
        2 * tokens * inner,
        rounds,
        limits,
    )
    compare(
        f"GELU (tanh) {tokens} x 4096",
        lambda: (spread(tokens, 4096),),
        {"gelu": fused.gelu, "torch gelu": lambda x: functional.gelu(x, approximate="tanh")},
        2 * tokens * 4096,
        rounds,
        limits,
    )


def bench_argmax(vocabulary: int, rounds: int, limits: Limits) -> None:
    compare(
        f"argmax over {vocabulary} logits",
        lambda: (spread(1, vocabulary),),
        {"argmax": argmax, "torch argmax": lambda x: torch.argmax(x, dim=-1)},
        0,
        rounds,
        limits,
    )


def bench_int8_cache(kv_heads: int, group: int, dim: int, rounds: int, limits: Limits) -> None:
    """One token against a long history, a prompt against itself, and the writing of that prompt's keys."""
    for length, queries in ((16384, 1), (1024, 1024)):
        store = attention.new_store(1, kv_heads, length, dim)
        attention.append(store, spread(1, kv_heads, length, dim), 0)
        size = 2 * (store.codes.nbytes + store.scales.nbytes)
        stores = [store, *(_copy(store) for _ in range(2 * copies(size) - 1))]
        dense = [spread(1, kv_heads, length, dim) for _ in range(2 * copies(4 * kv_heads * length * dim))]
        q = spread(1, kv_heads * group, queries, dim)

        def own(i: int, q: Tensor = q, stores: list = stores, length: int = length) -> Tensor:
            keys, values = stores[2 * i % len(stores)], stores[(2 * i + 1) % len(stores)]
            return attention.attend(q, keys, values, length, dim**-0.5, causal=True)

        def torchs(i: int, q: Tensor = q, dense: list = dense, causal: bool = queries > 1) -> Tensor:
            keys, values = dense[2 * i % len(dense)], dense[(2 * i + 1) % len(dense)]
            return functional.scaled_dot_product_attention(q, keys, values, is_causal=causal, enable_gqa=True)

        seen = queries * length - queries * (queries - 1) // 2
        show(
            f"int8 attention {kv_heads} x {group} heads of {dim}, {queries} queries, {length} tokens",
            [
                Candidate("int8 attention", size, own),
                Candidate("torch sdpa bf16", 2 * dense[0].nbytes, torchs),
            ],
            4.0 * kv_heads * group * dim * seen,
            rounds,
            limits,
        )
    target = attention.new_store(1, kv_heads, 1024, dim)
    compare(
        f"int8 append {kv_heads} heads of {dim}, 1024 tokens",
        lambda: (spread(1, kv_heads, 1024, dim),),
        {"int8 append": lambda x: attention.append(target, x, 0), "torch copy": torch.clone},
        target.codes.nbytes + target.scales.nbytes,
        rounds,
        limits,
    )


def _copy(store: attention.Store) -> attention.Store:
    return attention.Store(store.codes.clone(), store.scales.clone(), None)


def bench_rows(rounds: int, limits: Limits) -> None:
    """All of them; the limit is the bandwidth alone."""
    reading = dataclasses.replace(limits, arithmetic=None)
    for tokens in (1, 1024):
        bench_fused(tokens, rounds, reading)
    bench_argmax(151_936, rounds, reading)
    bench_int8_cache(8, 4, 128, rounds, reading)
