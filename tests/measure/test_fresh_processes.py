"""Fresh processes: what they return, how they fail, and that their peak is theirs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pytest_inferencepio.errors import MeasurementFailed
from pytest_inferencepio.measure import zygote
from pytest_inferencepio.measure.processes import FreshProcesses

MB = 1_000_000


def allocate(megabytes: int) -> int:
    """Touch every page of that much memory and let it go."""
    return len(bytearray(os.urandom(1)) * (megabytes * MB)) // MB


def pid_and_threads() -> list[int]:
    import torch

    return [os.getpid(), torch.get_num_threads()]


def fail() -> None:
    print("about to fail")
    raise ArithmeticError("no such number")


def loop() -> None:
    while True:
        pass


def die() -> None:
    os.kill(os.getpid(), 9)


def not_json() -> object:
    return object()


@pytest.fixture(scope="module")
def processes() -> Iterator[FreshProcesses]:
    with FreshProcesses(preload=("torch",), threads=2) as started:
        yield started


def test_every_piece_of_work_has_a_process_of_its_own_with_the_given_threads(
    processes: FreshProcesses,
) -> None:
    runs = [processes.run(f"{__name__}:pid_and_threads", {}).result for _ in range(2)]
    assert runs[0][0] != runs[1][0] and os.getpid() not in (runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1] == 2


def test_the_peak_is_that_of_the_work_even_after_it_let_go(processes: FreshProcesses) -> None:
    small = processes.run(f"{__name__}:allocate", {"megabytes": 1})
    large = processes.run(f"{__name__}:allocate", {"megabytes": 101})
    assert small.result == 1 and large.result == 101
    assert large.peak - small.peak == pytest.approx(100 * MB, rel=0.02)
    again = processes.run(f"{__name__}:allocate", {"megabytes": 1})
    assert again.peak - small.peak < 3 * MB  # the process in between left nothing behind
    assert large.seconds > 0


def test_an_error_comes_back_with_its_traceback_and_output(processes: FreshProcesses) -> None:
    with pytest.raises(MeasurementFailed) as failure:
        processes.run(f"{__name__}:fail", {})
    message = str(failure.value)
    assert f"{__name__}:fail in a fresh process failed (status 1)" in message
    assert "about to fail" in message and "ArithmeticError: no such number" in message


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ("die", r"was killed by SIGKILL \(out of memory\?\)"),
        ("not_json", "Object of type object is not JSON serializable"),
        ("missing", "has no attribute 'missing'"),
    ],
)
def test_other_ends_are_named(processes: FreshProcesses, work: str, message: str) -> None:
    with pytest.raises(MeasurementFailed, match=message):
        processes.run(f"{__name__}:{work}", {})


def test_work_that_takes_too_long_is_killed_and_the_next_piece_runs(processes: FreshProcesses) -> None:
    with pytest.raises(MeasurementFailed, match=r"ran longer than 0.5 s and was killed"):
        processes.run(f"{__name__}:loop", {}, timeout=0.5)
    assert processes.run(f"{__name__}:allocate", {"megabytes": 2}).result == 2


def test_a_preloaded_module_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(
        MeasurementFailed, match=r"the process that starts fresh processes ended \(status 1\)"
    ):
        FreshProcesses(preload=("no_such_module_anywhere",))


def test_after_closing_nothing_runs() -> None:
    started = FreshProcesses(preload=("json",))
    started.close()
    started.close()
    with pytest.raises(MeasurementFailed, match="has ended"):
        started.run(f"{__name__}:allocate", {"megabytes": 1})


def test_resident_memory_and_peak_are_read_in_bytes() -> None:
    assert 1 << 20 < zygote.resident_bytes() <= zygote.peak_bytes()


def test_a_system_that_cannot_reset_the_peak_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(zygote, "CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    assert zygote.reset_peak() is False


def threads_that_allocate(megabytes: int) -> int:
    """Blocks of many sizes that threads take and give back in any order, as loading a model does."""
    import torch

    sizes = [(1 << 14) * (1 + i % 40) for i in range(megabytes)]
    with ThreadPoolExecutor(4) as pool:
        return sum(pool.map(lambda n: int(torch.ones(n, dtype=torch.uint8)[-1]), sizes))


def test_equal_processes_peak_at_the_same_height(processes: FreshProcesses) -> None:
    """What the gate's floor of 2 MB rests on: the heap neither grows nor keeps memory by the order of threads."""
    peaks = [processes.run(f"{__name__}:threads_that_allocate", {"megabytes": 400}).peak for _ in range(6)]
    assert max(peaks) - min(peaks) < 1.5 * MB
