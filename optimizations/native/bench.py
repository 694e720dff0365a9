"""The kernels against their limits and against torch's own, in one run: `python -m optimizations.native.bench`.

Candidates of a row take turns (forwards, then backwards), over copies of the weights that together exceed the caches, so what
they share of the machine's hours they share alike; the shortest of the rounds counts, as the one least disturbed. Limits are measured
in the same run: read bandwidth (`stream_read`) and integer arithmetic on registers (`dot_products`, on AMX
`tile_products` too).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch.nn import functional

from optimizations.native.bench_dense import bench_dense
from optimizations.native.bench_rows import bench_rows
from optimizations.native.bench_tools import Candidate, Limits, copies, measure_limits, shortest, show
from optimizations.native.experts import PackedExperts, pack_experts
from optimizations.native.linear import linear, moe
from optimizations.native.loader import native
from optimizations.native.packing import pack


def own_linear(x: torch.Tensor, weight: torch.Tensor, bits: int, group_size: int) -> Candidate:
    packed = pack(weight, bits=bits, group_size=group_size)
    many = [
        dataclasses.replace(packed, data=packed.data.clone(), scales=packed.scales.clone())
        for _ in range(copies(packed.nbytes))
    ]
    return Candidate(f"int{bits} g{group_size}", packed.nbytes, lambda i: linear(x, many[i % len(many)]))


def own_moe(
    name: str, x: torch.Tensor, routes: Sequence[torch.return_types.topk], packed: PackedExperts
) -> Candidate:
    """Routes take turns; the bytes are those of the experts that a route uses, on average."""
    used = sum(len(route.indices.unique()) for route in routes) / len(routes) / packed.experts

    def call(i: int) -> torch.Tensor:
        route = routes[i % len(routes)]
        return moe(x, route.indices, route.values, packed)

    return Candidate(name, int(packed.nbytes * used), call)


def torch_int4(x: torch.Tensor, rows: int, cols: int) -> Candidate:
    levels = torch.randint(0, 16, (rows, cols), dtype=torch.int32)
    one = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
    scales = torch.rand(cols // 32, rows, 2, dtype=torch.bfloat16)
    many = [(one.clone(), scales.clone()) for _ in range(copies(one.nbytes))]

    def call(i: int) -> torch.Tensor:
        weight, scale = many[i % len(many)]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, 32, scale)

    return Candidate("torch int4 g32", one.nbytes + scales.nbytes, call)


def torch_int8(x: torch.Tensor, rows: int, cols: int) -> Candidate:
    one = torch.randint(-127, 127, (rows, cols), dtype=torch.int8)
    scales = torch.rand(rows, dtype=torch.bfloat16)
    many = [one.clone() for _ in range(copies(one.nbytes))]
    return Candidate(
        "torch int8", one.nbytes, lambda i: torch._weight_int8pack_mm(x, many[i % len(many)], scales)
    )


def torch_bf16(x: torch.Tensor, weight: torch.Tensor) -> Candidate:
    many = [weight.clone() for _ in range(copies(weight.nbytes))]
    return Candidate("torch bf16", weight.nbytes, lambda i: functional.linear(x, many[i % len(many)]))


def bench_linear(rows: int, cols: int, batches: Sequence[int], rounds: int, limits: Limits) -> None:
    weight = torch.randn(rows, cols, dtype=torch.bfloat16) * 0.02
    for m in batches:
        x = torch.randn(m, cols, dtype=torch.bfloat16)
        candidates = [
            own_linear(x, weight, 4, 32),
            own_linear(x, weight, 4, 128),
            own_linear(x, weight, 8, 32),
            torch_int4(x, rows, cols),
            torch_int8(x, rows, cols),
            torch_bf16(x, weight),
        ]
        show(f"linear {rows} x {cols}, {m} rows", candidates, 2.0 * m * rows * cols, rounds, limits)


def bench_moe(hidden: int, inner: int, experts: int, k: int, rounds: int, limits: Limits) -> None:
    gate_up = torch.randn(experts, 2 * inner, hidden) * 0.02
    down = torch.randn(experts, hidden, inner) * 0.02
    packed = {bits: pack_experts(gate_up, down, bits=bits) for bits in (4, 8)}
    for tokens in (1, 16, 128):
        x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
        routes = [torch.rand(tokens, experts).topk(k) for _ in range(8)]
        candidates = [own_moe(f"moe int{bits}", x, routes, packed[bits]) for bits in packed]
        flops = 6.0 * tokens * k * hidden * inner
        show(
            f"moe {k} of {experts} experts {hidden} x {inner}, {tokens} tokens",
            candidates,
            flops,
            rounds,
            limits,
        )


def bench_pack(rows: int, cols: int) -> None:
    weight = torch.randn(rows, cols, dtype=torch.bfloat16)
    print()
    for bits in (4, 8):
        seconds = shortest(functools.partial(pack, weight, bits=bits), 5)
        print(f"pack int{bits} g32  {rows * cols / seconds / 1e6:7.0f} million weights/s")


def bench_overhead() -> None:
    x, weight = torch.randn(1, 32), pack(torch.randn(16, 32), bits=4)
    calls = 100
    mine = shortest(lambda: [linear(x, weight) for _ in range(calls)], 50) / calls
    dense = torch.randn(16, 32)
    torchs = shortest(lambda: [functional.linear(x, dense) for _ in range(calls)], 50) / calls
    print(f"overhead of a call  {mine * 1e6:.1f} us (functional.linear {torchs * 1e6:.1f} us)")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m optimizations.native.bench", description=__doc__)
    parser.add_argument(
        "--rows", type=int, default=9728, help="rows of the weight (default: Qwen3-4B up_proj)"
    )
    parser.add_argument("--cols", type=int, default=2560, help="columns of the weight")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 128], help="rows of x")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls per candidate")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", default="auto", help="instruction set of the own kernels")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    native().set_isa(chosen.isa)
    limits = measure_limits(chosen.threads)
    print(f"{native().isa()}, {chosen.threads} threads ({native().thread_source()})")
    arithmetic = (limits.arithmetic or 0.0) / 1e9
    print(f"limits: read {limits.read / 1e9:.1f} GB/s, int8 arithmetic {arithmetic:.0f} GFLOP/s")
    with torch.inference_mode():
        bench_linear(chosen.rows, chosen.cols, chosen.batches, chosen.rounds, limits)
        bench_moe(2048, 768, 32, 8, chosen.rounds, limits)
        bench_dense(chosen.rows, chosen.cols, chosen.batches, chosen.rounds, limits)
        bench_rows(chosen.rounds, limits)
        bench_pack(chosen.rows, chosen.cols)
        bench_overhead()


if __name__ == "__main__":
    main()
