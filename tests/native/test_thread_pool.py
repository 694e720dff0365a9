"""The pool: all the work done, once, by the asked number of threads; usable after fork and from several threads."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from optimizations.native.linear import linear
from optimizations.native.loader import native
from optimizations.native.packing import pack


def word_sum(words: torch.Tensor) -> int:
    return int(words.sum(dtype=torch.int64)) % 2**32


def stream_read(words: torch.Tensor, threads: int) -> int:
    return int(native().stream_read(words.data_ptr(), words.nbytes, threads))


@pytest.fixture
def words(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (1 << 20,), dtype=torch.int32, generator=generator)


@pytest.fixture(params=["own", "torch"])
def source(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the kernels take their threads from during the test; from torch afterwards."""
    native().set_thread_source(request.param)
    yield request.param
    native().set_thread_source("torch")


@pytest.mark.parametrize("pool_threads", [1, 2, 3, 5])
def test_every_piece_is_done_once(source: str, isa: str, words: torch.Tensor, pool_threads: int) -> None:
    wanted = word_sum(words)
    assert [stream_read(words, pool_threads) for _ in range(50)] == [wanted] * 50


@pytest.mark.parametrize("pool_threads", [2, 3, 5])
def test_a_job_of_any_size_is_shared_out_whole(source: str, words: torch.Tensor, pool_threads: int) -> None:
    """Threads begin at stretches of their own, which do not divide the pieces evenly."""
    for count in (64, 192, 4096 * 64 + 64, 4097 * 128, 11111 * 64, len(words) - 64):
        assert stream_read(words[:count], pool_threads) == word_sum(words[:count])


OWN_POOL = """
import ctypes, os
import optimizations._native as n
x = (ctypes.c_int32 * (1 << 20))(*range(1000))
def read(threads): return n.stream_read(ctypes.addressof(x), ctypes.sizeof(x), threads)
"""


def run(code: str) -> list[str]:
    command = [sys.executable, "-c", OWN_POOL + code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split()


def test_own_pool_has_one_worker_less_than_threads() -> None:
    out = run("for t in (1, 3, 2): read(t); print(n.pool_workers())\nprint(n.thread_source())")
    assert out == ["0", "2", "2", "own"]


def test_threads_are_torchs_once_it_is_loaded() -> None:
    """Two pools on the same cores take them from each other, so there is one."""
    out = run("import torch\nprint(n.thread_source(), read(2) == read(1), n.pool_workers())")
    assert out == ["torch", "True", "0"]


@pytest.mark.parametrize("source", ["own", "torch"])
def test_child_of_a_fork_works_with_threads_of_its_own(source: str) -> None:
    code = (
        f"import torch\nn.set_thread_source({source!r})\n"
        "before = read(2)\nchild = os.fork()\nafter = read(2)\n"
        "if child == 0: os._exit(0 if (after, n.thread_source(), n.pool_workers()) == (before, 'own', 1) else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), after == before, n.thread_source())"
    )
    assert run(code) == ["0", "True", source]


def test_thread_source_refuses_in_words() -> None:
    with pytest.raises(ValueError, match="set_thread_source: 'torch' or 'own', got 'tbb'"):
        native().set_thread_source("tbb")
    out = run("try: n.set_thread_source('torch')\nexcept ValueError as error: print(error)")
    assert " ".join(out) == "set_thread_source: no OpenMP runtime of torch is loaded to borrow threads from"


def test_calls_from_several_threads_do_not_mix(source: str, generator: torch.Generator) -> None:
    inputs = [torch.randn(5, 1024, generator=generator) for _ in range(4)]
    weight = pack(torch.randn(600, 1024, generator=generator), bits=4)  # large enough for threads
    wanted = [linear(x, weight) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(60):
            if not torch.equal(linear(inputs[index], weight), wanted[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_refuses_sizes_and_addresses_in_words(words: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="bytes must be a multiple of 256, got 100"):
        native().stream_read(words.data_ptr(), 100, 1)
    with pytest.raises(ValueError, match="data has no memory"):
        native().stream_read(0, 256, 1)
    with pytest.raises(ValueError, match="it starts at 2 bytes past one"):
        native().stream_read(words.data_ptr() + 2, 256, 1)
