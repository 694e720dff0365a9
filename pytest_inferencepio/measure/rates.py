"""How fast this machine reads and computes: the ceilings of every figure.

The best of several readers and several tries, since a ceiling that is too low would refuse true figures.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from optimizations.errors import NativeModuleMissing
from optimizations.native.linear import linear
from optimizations.native.loader import native
from optimizations.native.packing import pack
from pytest_inferencepio.machine import Rate
from pytest_inferencepio.measure.timing import timed

MIB = 1 << 20
# From a second-level cache to well past the largest third-level one of common machines (a GPU's: 50 MiB).
CPU_SIZES = (MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
CUDA_SIZES = (16 * MIB, 256 * MIB, 1024 * MIB)
TRY_SECONDS = 0.06
LEAST_TRIES = 3
MATRIX = 1024
# Some milliseconds a call, so that waking the threads does not count.
DOT_ROUNDS, TILE_ROUNDS = 200_000, 100_000

Work = Callable[[], object]


def device_name(device: str) -> str:
    """`cpu`, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def read_bandwidth(device: str = "cpu", sizes: tuple[int, ...] | None = None) -> dict[int, Rate]:
    """Bytes/s of reading a buffer of each size (bytes) over and over, with torch's threads."""
    sizes = sizes or (CUDA_SIZES if torch.device(device).type == "cuda" else CPU_SIZES)
    buffer = torch.ones(max(sizes) // 4, dtype=torch.float32, device=device)
    return {size: _best_reader(buffer[: size // 4], size, device) for size in sizes}


def arithmetic(device: str = "cpu", n: int | None = None) -> dict[str, Rate]:
    """Operations/s in float32, bfloat16 and int8: of square matrix products (torch's, the kernels'), and where the
    kernels are compiled of dot and tile products on registers alone, which nothing exceeds."""
    on_gpu = torch.device(device).type == "cuda"
    n = n or (8 * MATRIX if on_gpu else MATRIX)
    products = {
        dtype: [(_product(n, dtype, device), 2.0 * n**3)] for dtype in ("float32", "bfloat16", "int8")
    }
    if not on_gpu:
        products["int8"] += [(work, 2.0 * n**3) for work in _native_products(n)]
        for dtype, works in _native_limits().items():
            products[dtype] += works
    return {
        dtype: max((best_rate(work, amount, device) for work, amount in works), key=lambda rate: rate.value)
        for dtype, works in products.items()
    }


def best_rate(work: Work, amount: float, device: str = "cpu") -> Rate:
    """`amount` / the shortest time of `work`, warmed up, tried for `TRY_SECONDS` and at least three times."""
    work()
    best, tries, start = float("inf"), 0, time.perf_counter()
    while tries < LEAST_TRIES or time.perf_counter() - start < TRY_SECONDS:
        _, seconds = timed(work, device)
        best, tries = min(best, seconds), tries + 1
    return Rate(amount / best, tries)


def _best(works: list[Work], amount: float, device: str) -> Rate:
    return max((best_rate(work, amount, device) for work in works), key=lambda rate: rate.value)


def _best_reader(view: torch.Tensor, size: int, device: str) -> Rate:
    readers: list[Work] = [view.sum, view.amax]
    if torch.device(device).type == "cpu":
        readers += _native_readers(view, size)
    return _best(readers, size, device)


def _native_readers(view: torch.Tensor, size: int) -> list[Work]:
    """The compiled streaming reader, where there is one: on all threads, and on one, which needs no other core
    to be free at the same moment."""
    try:
        module = native()
    except NativeModuleMissing:
        return []
    counts = {1, torch.get_num_threads()}
    return [functools.partial(module.stream_read, view.data_ptr(), size, threads) for threads in counts]


def _native_products(n: int) -> list[Work]:
    """int4 and int8 weights times rows quantized to int8, where the kernels are compiled."""
    x = torch.ones(n, n)
    try:
        weights = [pack(x, bits=bits) for bits in (4, 8)]
    except NativeModuleMissing:
        return []
    return [functools.partial(linear, x, weight) for weight in weights]


def _native_limits() -> dict[str, list[tuple[Work, float]]]:
    """Dot and tile products on all threads and the operations of one call, where there are such."""
    try:
        module = native()
    except NativeModuleMissing:
        return {}
    memory, threads = torch.ones(1024, dtype=torch.uint8), torch.get_num_threads()

    def dots() -> int:
        done: int = module.dot_products(memory.data_ptr(), DOT_ROUNDS, threads)
        return done

    def tiles(bf16: bool) -> int:
        done: int = module.tile_products(memory.data_ptr(), TILE_ROUNDS, bf16, threads)
        return done

    found: dict[str, list[tuple[Work, float]]] = {"int8": [(dots, 2.0 * threads * dots())]}
    for dtype, bf16 in (("bfloat16", True), ("int8", False)):
        if done := tiles(bf16):
            found.setdefault(dtype, []).append((functools.partial(tiles, bf16), 2.0 * threads * done))
    return found


def _product(n: int, dtype: str, device: str) -> Work:
    a = torch.ones(n, n, dtype=getattr(torch, dtype), device=device)
    return (lambda: torch._int_mm(a, a)) if dtype == "int8" else (lambda: a @ a)
