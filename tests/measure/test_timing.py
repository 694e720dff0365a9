"""Interleaving: order, pairing, warm-up, what is switched off, and pytest-benchmark's own samples."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pytest_inferencepio.measure.timing import (
    Interleaver,
    Paired,
    interleave,
    pairs_wanted,
    precise,
    quiet_rounds,
    timed,
)


class Sides:
    """Two sides that write down when they run."""

    def __init__(self) -> None:
        self.log = ""

    def before(self) -> int:
        self.log += "B"
        return len(self.log)

    def after(self) -> int:
        self.log += "A"
        return len(self.log)


@pytest.fixture
def sides() -> Sides:
    return Sides()


@pytest.mark.parametrize("seed", range(6))
def test_rounds_alternate_which_side_goes_first(sides: Sides, seed: int) -> None:
    interleave(sides.before, sides.after, 4, warmup=0, seed=seed)
    assert sides.log in ("BAABBAAB", "ABBAABBA")


def test_the_seed_decides_which_side_opens() -> None:
    opened = set()
    for seed in range(8):
        sides = Sides()
        interleave(sides.before, sides.after, 1, warmup=0, seed=seed)
        opened.add(sides.log)
    assert opened == {"AB", "BA"}


def test_pairs_are_neighbours_in_time_and_warm_up_is_not_recorded(sides: Sides) -> None:
    paired = interleave(sides.before, sides.after, 5, warmup=2)
    assert len(sides.log) == 14 and len(paired) == 5
    assert all(abs(b - a) == 1 for b, a in zip(paired.before, paired.after, strict=True))
    assert min(paired.before + paired.after) == 5  # the first four runs were warm-up
    assert all(seconds >= 0 for seconds in paired.before_seconds + paired.after_seconds)


def test_without_a_reference_only_the_other_side_runs(sides: Sides) -> None:
    paired = interleave(None, sides.after, 3, warmup=1)
    assert sides.log == "AAAA" and paired.before == [] and len(paired.after) == 3


@pytest.mark.parametrize("pairs", [0, -1])
def test_no_pairs_are_refused(sides: Sides, pairs: int) -> None:
    with pytest.raises(ValueError, match=f"at least one pair has to be measured, got {pairs}"):
        interleave(sides.before, sides.after, pairs)


def test_no_garbage_is_collected_inside_and_threads_are_held() -> None:
    threads = torch.get_num_threads()
    seen = []

    def look() -> None:
        seen.append((gc.isenabled(), torch.get_num_threads()))

    interleave(look, look, 1, warmup=0, threads=threads + 1)
    assert set(seen) == {(False, threads + 1)}
    assert gc.isenabled() and torch.get_num_threads() == threads


def test_a_failing_side_leaves_collector_and_threads_as_they_were() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), quiet_rounds(threads + 1):
        _ = 1 / 0
    assert gc.isenabled() and torch.get_num_threads() == threads


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with quiet_rounds():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_timed_returns_result_and_positive_seconds() -> None:
    result, seconds = timed(lambda: sum(range(1000)))
    assert result == 499500 and seconds > 0


def test_pytest_benchmark_stores_the_real_samples_of_the_after_side(sides: Sides, benchmark: Any) -> None:
    paired = Interleaver(sides.before, sides.after, warmup=1).benchmark(benchmark, pairs=6)
    stored = benchmark.stats.stats.data
    assert len(stored) == len(paired.after_seconds) == len(paired.before_seconds) == 6
    # Its clock runs around ours, round by round.
    assert all(outer >= inner for outer, inner in zip(stored, paired.after_seconds, strict=True))
    assert sides.log in ("BAABBAABBAABBA", "ABBAABBAABBAAB")


def test_what_runs_beside_a_round_is_in_nobodys_time(sides: Sides, benchmark: Any) -> None:
    times_known: list[int] = []

    def beside() -> None:
        sides.log += "."
        times_known.append(len(rounds.paired.after_seconds) + len(rounds.paired.before_seconds))

    rounds = Interleaver(sides.before, sides.after, warmup=1, beside=beside)
    rounds.benchmark(benchmark, pairs=4)
    assert [sorted(pair) for pair in sides.log.split(".")] == [["A", "B"]] * 5 + [[]]
    assert times_known == [0, 2, 4, 6, 8]  # both clocks have stopped before it runs


def test_pairs_are_added_until_no_more_are_wanted(sides: Sides, benchmark: Any) -> None:
    looks: list[int] = []

    def six_more_twice(paired: Paired[int]) -> int:
        looks.append(len(paired))
        return 6 if len(looks) < 3 else 0

    paired = Interleaver(sides.before, sides.after, warmup=1).benchmark(
        benchmark, pairs=5, further=six_more_twice
    )
    assert looks == [5, 11, 17]
    assert len(paired.before) == len(paired.after) == len(benchmark.stats.stats.data) == 17
    assert benchmark.stats.stats.rounds == 17  # what pytest-benchmark stores and prints
    assert sides.log[2:] in (
        ("ABBA" * 9)[:34],
        ("BAAB" * 9)[:34],
    )  # after the warm-up's pair, in unbroken order


STEADY = Paired([1] * 9, [1] * 9, [1.0] * 9, [2.0 + 0.001 * n for n in range(9)])
NOISY = Paired([1] * 9, [1] * 9, [1.0] * 9, [2.0 + 0.1 * n for n in range(9)])


@pytest.mark.parametrize(
    ("paired", "most", "suspect", "suspicious", "wanted"),
    [
        (NOISY, 30, 30, False, 6),  # not precise
        (NOISY, 12, 12, False, 3),  # as many as are left
        (NOISY, 9, 30, False, 0),
        (NOISY, 9, 30, True, 6),
        (STEADY, 30, 30, False, 0),
        (STEADY, 30, 30, True, 6),
        (STEADY, 9, 11, True, 2),
        (STEADY, 30, 9, True, 0),
    ],
)
def test_noise_and_suspicion_ask_for_more_pairs(
    paired: Paired[int], most: int, suspect: int, suspicious: bool, wanted: int
) -> None:
    assert pairs_wanted(paired, most, suspect, lambda _: suspicious) == wanted


def test_precise_looks_at_the_interval_and_not_at_the_value() -> None:
    assert precise(STEADY)
    assert not precise(NOISY)
    assert precise(Paired([], [1], [], [1.0]))  # without a reference there is no ratio


def test_a_disabled_pytest_benchmark_still_runs_one_pair(sides: Sides, benchmark: Any) -> None:
    benchmark.disabled = True
    paired = Interleaver(sides.before, sides.after, warmup=3).benchmark(benchmark, pairs=6)
    assert sorted(sides.log) == ["A", "B"]
    assert len(paired.before) == len(paired.after) == 1
    assert gc.isenabled()


def test_a_failing_after_side_ends_the_benchmark_and_restores_the_collector(benchmark: Any) -> None:
    def fail() -> None:
        raise RuntimeError("broken kernel")

    work: Callable[[], None] = fail
    with pytest.raises(RuntimeError, match="broken kernel"):
        Interleaver(None, work).benchmark(benchmark, pairs=2)
    assert gc.isenabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_work_is_timed_to_its_end() -> None:
    """A kernel's launch returns at once; the time must hold that between two marks on the device around the kernels."""
    x = torch.randn(4096, 4096, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def many() -> None:
        begin.record()
        for _ in range(50):
            x @ x
        end.record()

    _, seconds = timed(many, "cuda")
    assert end.query()
    assert seconds >= begin.elapsed_time(end) / 1e3 > 0
