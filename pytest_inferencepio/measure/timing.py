"""Paired, interleaved timing: before and after share every drift of the machine.

Rounds run in ABBA order (before, after, after, before, ...), so a linear drift cancels within two pairs
(duet benchmarking, Bulej et al. 2020; randomised multiple interleaved trials, Abedi & Brecht 2017).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from tqdm import tqdm

from pytest_inferencepio.sessions import interval_variance
from pytest_inferencepio.stats import log_ratios, ratio_estimate

Sample = TypeVar("Sample")

# Standard error of ln(ratio) at which more pairs would add little: sessions differ by 1.2 % for other reasons.
PRECISION = 0.01
_MORE_PAIRS = 6  # between two looks: the interval of fewer new samples would not change


@dataclasses.dataclass
class Paired(Generic[Sample]):
    """Results of both sides, pair by pair in order of measurement, and the wall time of each in seconds."""

    before: list[Sample] = dataclasses.field(default_factory=list)
    after: list[Sample] = dataclasses.field(default_factory=list)
    before_seconds: list[float] = dataclasses.field(default_factory=list)
    after_seconds: list[float] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.after)


def synchronize(device: str | torch.device) -> None:
    """Wait until the device has done what was asked of it; nothing to wait for on a CPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Sample], device: str | torch.device = "cpu") -> tuple[Sample, float]:
    """Result of `work` and its seconds: the performance counter, or CUDA events on a GPU."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        result = work()
        return result, time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    result = work()
    end.record()
    torch.cuda.synchronize(device)
    return result, begin.elapsed_time(end) / 1e3


@contextlib.contextmanager
def quiet_rounds(threads: int | None = None) -> Iterator[None]:
    """No garbage collection inside, and torch's number of threads held at `threads` (or as it is)."""
    was_enabled, was_threads = gc.isenabled(), torch.get_num_threads()
    gc.collect()
    gc.disable()
    try:
        if threads is not None and threads != was_threads:
            torch.set_num_threads(threads)
        yield
    finally:
        if torch.get_num_threads() != was_threads:
            torch.set_num_threads(was_threads)
        if was_enabled:
            gc.enable()


def interleave(
    before: Callable[[], Sample] | None,
    after: Callable[[], Sample],
    pairs: int,
    *,
    warmup: int = 1,
    seed: int = 0,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    describe: str = "pairs",
) -> Paired[Sample]:
    """Run both sides `pairs` times in ABBA order after `warmup` unrecorded runs of each.

    Raises:
        ValueError: fewer than one pair.
    """
    interleaver = Interleaver(before, after, warmup=warmup, seed=seed, device=device)
    _check_pairs(pairs)
    with quiet_rounds(threads):
        for _ in progress(range(warmup + pairs), describe):
            interleaver.setup()
            interleaver.run_after()
            interleaver.teardown()
    return interleaver.paired


class Interleaver(Generic[Sample]):
    """Both sides of a pair around somebody else's timer of the `after` side.

    pytest-benchmark times `run_after`; `setup` and `teardown`, which it does not time, run `before` on
    alternating sides of it. Both sides are also timed here with one clock, because a ratio of two different
    clocks' readings would be biased. Without `before` (it does not fit into memory) only `after` is measured.
    `beside` runs after every round, in nobody's time: what has to be seen in the same minutes.
    """

    def __init__(
        self,
        before: Callable[[], Sample] | None,
        after: Callable[[], Sample],
        *,
        warmup: int = 1,
        seed: int = 0,
        device: str | torch.device = "cpu",
        beside: Callable[[], object] = lambda: None,
    ) -> None:
        self.before, self.after, self.beside = before, after, beside
        self.warmup, self.device = warmup, device
        self.paired: Paired[Sample] = Paired()
        self._round = 0
        # ABBA or BAAB: which side opens the run is the seed's choice.
        self._first = random.Random(seed).randrange(2)

    def setup(self) -> None:
        """Before the timed side: the other side too, when this round opens with it."""
        if self._opens_with_before():
            self._run_before()
        synchronize(self.device)

    def run_after(self) -> Sample:
        """The side that pytest-benchmark times."""
        result, seconds = timed(self.after, self.device)
        if self._round >= self.warmup:
            self.paired.after.append(result)
            self.paired.after_seconds.append(seconds)
        return result

    def teardown(self) -> None:
        """After the timed side: the other side, when this round did not open with it."""
        if not self._opens_with_before():
            self._run_before()
        self.beside()
        self._round += 1

    def benchmark(
        self,
        fixture: Any,
        pairs: int,
        threads: int | None = None,
        *,
        further: Callable[[Paired[Sample]], int] | None = None,
    ) -> Paired[Sample]:
        """Run through pytest-benchmark's fixture, whose stored samples are then the `after` side's.

        After `pairs` as many more as `further` says, until it says 0. With `--benchmark-disable` the fixture times
        nothing; one pair still runs.
        """
        _check_pairs(pairs)
        with quiet_rounds(threads):
            if fixture.disabled:
                self.warmup = 0
                fixture.pedantic(self.run_after, setup=self.setup)
                self.teardown()
                return self.paired
            fixture.pedantic(
                self.run_after,
                setup=self.setup,
                teardown=self.teardown,
                rounds=pairs,
                warmup_rounds=self.warmup,
            )
            while further is not None and (more := further(self.paired)) > 0:
                for _ in range(more):
                    self._one_more(fixture)
        return self.paired

    def _one_more(self, fixture: Any) -> None:
        """One round beyond those of `pedantic`, added to the samples it stored."""
        self.setup()
        self.run_after()
        fixture.stats.update(self.paired.after_seconds[-1])
        self.teardown()

    def _opens_with_before(self) -> bool:
        return (self._round + self._first) % 2 == 0

    def _run_before(self) -> None:
        if self.before is None:
            return
        result, seconds = timed(self.before, self.device)
        if self._round >= self.warmup:
            self.paired.before.append(result)
            self.paired.before_seconds.append(seconds)


def precise(paired: Paired[Any]) -> bool:
    """Whether the ratio of both sides' total times is known to `PRECISION`; true without a reference.

    Decided by the width of the interval alone, so that stopping favours no direction.
    """
    if not paired.before_seconds:
        return True
    found = ratio_estimate(log_ratios(paired.before_seconds, paired.after_seconds))
    return interval_variance(found.low, found.high) <= PRECISION**2


def pairs_wanted(
    paired: Paired[Sample], most: int, suspect: int, suspicious: Callable[[Paired[Sample]], bool]
) -> int:
    """How many pairs to add now: up to `most` while the ratio is not precise, up to `suspect` while it is suspicious.

    What looks like a regression is measured on until it either does not any more or is proven, so time goes where it
    decides; most cells never need it.
    """
    done = len(paired)
    if done < most and not precise(paired):
        return min(_MORE_PAIRS, most - done)
    return min(_MORE_PAIRS, suspect - done) if done < suspect and suspicious(paired) else 0


def progress(rounds: Any, describe: str) -> Any:
    """`rounds` with a progress bar on standard error, when that is a terminal."""
    return tqdm(rounds, desc=describe, leave=False, disable=not sys.stderr.isatty())


def _check_pairs(pairs: int) -> None:
    if pairs < 1:
        raise ValueError(f"at least one pair has to be measured, got {pairs}")
