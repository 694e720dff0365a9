"""The kernels over dense bf16 against the bandwidth and torch's own; a part of `python -m optimizations.native.bench`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from optimizations.native.bench_tools import Candidate, Limits, copies, show
from optimizations.native.dense import dense_linear, dense_moe, head_linear
from optimizations.native.dense_attention import attend_dense
from optimizations.native.lossless import lossless_linear, pack_lossless
from optimizations.native.packed_heads import packed_head_linear
from optimizations.native.packing import pack


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16) * 0.02


def bench_linears(rows: int, cols: int, batches: Sequence[int], rounds: int, limits: Limits) -> None:
    many = [normal(rows, cols) for _ in range(copies(2 * rows * cols))]
    packed = [pack_lossless(weight) for weight in many]
    for m in batches:
        x = normal(m, cols)
        candidates = [
            Candidate(name, weights[0].nbytes, lambda i, f=call, w=weights, x=x: f(x, w[i % len(w)]))  # type: ignore[misc]
            for name, call, weights in (
                ("dense bf16", dense_linear, many),
                ("bf16 in 12 bits", lossless_linear, packed),
                ("torch bf16", functional.linear, many),
            )
        ]
        show(f"dense linear {rows} x {cols}, {m} rows", candidates, 2.0 * m * rows * cols, rounds, limits)


def bench_attention(kv_heads: int, group: int, dim: int, rounds: int, limits: Limits) -> None:
    """One token against a long history, and a prompt against itself."""
    for length, queries in ((4096, 1), (16384, 1), (1024, 1024)):
        size = 2 * kv_heads * length * dim
        caches = [(normal(1, kv_heads, length, dim), normal(1, kv_heads, length, dim))]
        caches += [(k.clone(), v.clone()) for k, v in caches * (copies(2 * size) - 1)]
        q = normal(1, kv_heads * group, queries, dim)

        def own(i: int, q: Tensor = q, caches: list = caches, length: int = length) -> Tensor:
            keys, values = caches[i % len(caches)]
            return attend_dense(q, keys, values, length, dim**-0.5, causal=True)

        def torchs(i: int, q: Tensor = q, caches: list = caches, causal: bool = queries > 1) -> Tensor:
            keys, values = caches[i % len(caches)]
            return functional.scaled_dot_product_attention(q, keys, values, is_causal=causal, enable_gqa=True)

        seen = queries * length - queries * (queries - 1) // 2
        show(
            f"attention {kv_heads} x {group} heads of {dim}, {queries} queries, {length} tokens",
            [Candidate("kv attention", 2 * size, own), Candidate("torch sdpa", 2 * size, torchs)],
            4.0 * kv_heads * group * dim * seen,
            rounds,
            limits,
        )


def bench_heads(
    heads: int, nope: int, v: int, rank: int, tokens: Sequence[int], rounds: int, limits: Limits
) -> None:
    """The halves of GLM-4.7-Flash's kv_b_proj, dense and packed: queries into latents, gathered latents into values."""
    many = [normal(heads * (nope + v), rank) for _ in range(copies(2 * heads * (nope + v) * rank))]
    packed = [pack(weight, bits=4) for weight in many * 4]
    for transposed, first, rows in ((True, 0, nope), (False, nope, v)):
        dense = [weight.view(heads, nope + v, rank)[:, first : first + rows] for weight in many]
        share = rows / (nope + v)
        for count in tokens:
            x = normal(1, heads, count, rows if transposed else rank)

            def own(i: int, x: Tensor = x, dense: list = dense, transposed: bool = transposed) -> Tensor:
                return head_linear(x, dense[i % len(dense)], transposed)

            def int4(
                i: int, x: Tensor = x, first: int = first, rows: int = rows, transposed: bool = transposed
            ) -> Tensor:
                return packed_head_linear(x, packed[i % len(packed)], heads, first, rows, transposed)

            def torchs(i: int, x: Tensor = x, dense: list = dense, transposed: bool = transposed) -> Tensor:
                weight = dense[i % len(dense)]
                return x @ (weight if transposed else weight.transpose(1, 2))

            show(
                f"head linear {heads} x {rows} x {rank}{', transposed' * transposed}, {count} tokens",
                [
                    Candidate("head bf16", int(many[0].nbytes * share), own),
                    Candidate("head int4 g32", int(packed[0].nbytes * share), int4),
                    Candidate("torch matmul", int(many[0].nbytes * share), torchs),
                ],
                2.0 * count * heads * rows * rank,
                rounds,
                limits,
            )


def bench_experts(hidden: int, inner: int, experts: int, k: int, rounds: int, limits: Limits) -> None:
    gate_up, down = normal(experts, 2 * inner, hidden), normal(experts, hidden, inner)
    for tokens in (1, 16, 128):
        x = normal(tokens, hidden)
        routes = [torch.rand(tokens, experts).topk(k) for _ in range(8)]
        used = sum(len(route.indices.unique()) for route in routes) / len(routes) / experts

        def own(i: int, x: Tensor = x, routes: list = routes) -> Tensor:
            route = routes[i % len(routes)]
            return dense_moe(x, route.indices, route.values, gate_up, down)

        candidate = Candidate("dense moe", int((gate_up.nbytes + down.nbytes) * used), own)
        title = f"dense moe {k} of {experts} experts {hidden} x {inner}, {tokens} tokens"
        show(title, [candidate], 6.0 * tokens * k * hidden * inner, rounds, limits)


def bench_dense(rows: int, cols: int, batches: Sequence[int], rounds: int, limits: Limits) -> None:
    """All of them; the limit is the bandwidth alone, as the integer arithmetic of `limits` says nothing about bf16."""
    reading = dataclasses.replace(limits, arithmetic=None)
    bench_linears(rows, cols, batches, rounds, reading)
    bench_attention(8, 4, 128, rounds, reading)
    bench_heads(20, 192, 256, 512, (1, 4, 8, 16), rounds, reading)
    bench_experts(2048, 768, 32, 8, rounds, reading)
