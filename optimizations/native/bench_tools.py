"""What the benches share: limits of the machine, candidates that take turns, the table."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import torch

from optimizations.native.loader import native

COLD = (
    96 << 20
)  # bytes that one candidate's copies of its weight span, three times the largest L3 slice of interest


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to do the work: call(round) does it once and reads nbytes of weights."""

    name: str
    nbytes: int
    call: Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the machine gives: bytes/s read, multiply-adds (two operations each) per second or None where not measured."""

    read: float
    arithmetic: float | None


def shortest(call: Callable[[], object], rounds: int) -> float:
    """Seconds of the shortest of `rounds` calls."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_limits(threads: int) -> Limits:
    """Read bandwidth over 256 MiB and int8 multiply-adds, with the threads and instruction set in use.

    On AMX tiles take part: a core multiplies 14 times as much in them as by dot products.
    """
    memory = torch.ones(256 << 20, dtype=torch.uint8)
    address, rounds = memory.data_ptr(), 20_000
    read = shortest(lambda: native().stream_read(address, memory.nbytes, threads), 9)
    ways = (
        lambda count: native().dot_products(address, count, threads),
        lambda count: native().tile_products(address, count, False, threads),  # 0 without tiles
    )
    rates = [2.0 * threads * way(rounds) / shortest(functools.partial(way, rounds), 9) for way in ways]
    return Limits(memory.nbytes / read, max(rates))


def interleaved(candidates: Sequence[Candidate], rounds: int) -> dict[str, float]:
    """Shortest seconds of each candidate; the order turns round every round. One untimed call comes first."""
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for i in range(rounds + 1):
        for candidate in candidates if i % 2 else reversed(candidates):
            start = time.perf_counter()
            candidate.call(i)
            if i:
                times[candidate.name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def copies(nbytes: int) -> int:
    """How many copies of a weight exceed the caches."""
    return max(1, -(-COLD // nbytes))


def show(title: str, candidates: Sequence[Candidate], flops: float, rounds: int, limits: Limits) -> None:
    """One table: time, bandwidth and arithmetic with their share of the limit, speed against torch's int4 and bf16."""
    print(f"\n{title}")
    times = interleaved(candidates, rounds)
    for candidate in candidates:
        seconds = times[candidate.name]
        read, rate = candidate.nbytes / seconds, flops / seconds
        against = [f"{times[other] / seconds:5.2f}x {other}" for other in times if other.startswith("torch")]
        share = f" ({rate / limits.arithmetic:4.0%})" if limits.arithmetic else ""
        arithmetic = f"{rate / 1e9:7.1f} GFLOP/s{share}  " if flops else ""
        print(
            f"  {candidate.name:15s} {seconds * 1e3:9.3f} ms  {read / 1e9:6.1f} GB/s ({read / limits.read:4.0%})  "
            f"{arithmetic}{'  '.join(against)}"
        )
