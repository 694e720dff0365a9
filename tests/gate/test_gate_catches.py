"""How often the gate is right, on records with the noise of real machines: seeded trials, rates asserted.

Noise per pair: jitter of both sides, spikes (exponential, mean 40 %) on a share of the samples. Noise per session:
a bias of the whole process (placement of code and data) that no pairing removes. `calm` is a machine to oneself,
`shared` a small virtual one. Five stored sessions of as many pairs as the suite takes at tiny scale; what is compared
gets more of them while it looks slower, as there.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from gate_records import judged, ratio_metric, record, store

from pytest_inferencepio import baselines
from pytest_inferencepio.baselines import Baselines, Entry
from pytest_inferencepio.comparison import compare, looks_slower
from pytest_inferencepio.gate_rules import Thresholds
from pytest_inferencepio.gate_run import Selection, compare_run
from pytest_inferencepio.measure.budget import budget_for
from pytest_inferencepio.measure.timing import Paired, pairs_wanted
from pytest_inferencepio.record import Metric, Record, metric
from pytest_inferencepio.verdict import Status

PLAN = budget_for("tiny")
SESSIONS = 5
RATIOS = ("speedup", "prefill_speedup", "decode_speedup")


@dataclasses.dataclass(frozen=True)
class Noise:
    """Standard deviations of ln(time); `spikes` is the share of samples that one hits."""

    jitter: float
    spikes: float
    session: float


CALM = Noise(jitter=0.01, spikes=0.02, session=0.005)
SHARED = Noise(jitter=0.02, spikes=0.05, session=0.015)


class Machine:
    """Draws what the suite would measure."""

    def __init__(self, noise: Noise, seed: int) -> None:
        self.noise = noise
        self.draw = random.Random(seed)

    def speedup(self, true: float, slowdown: float = 0.0, against: Entry | None = None) -> list[float]:
        """Paired ratios of one session when the optimized side is `slowdown` slower than it was, compared with `against`."""
        middle = true * math.exp(self.draw.gauss(0, self.noise.session)) / (1 + slowdown)

        def pairs(count: int) -> list[float]:
            return [middle * math.exp(self._sample() - self._sample()) for _ in range(count)]

        def suspicious(paired: Paired[float]) -> bool:
            now = record({"decode_speedup": ratio_metric("decode_speedup", paired.before_seconds)})
            return against is not None and looks_slower(now, against, Thresholds())

        ratios = pairs(PLAN.pairs)
        while more := pairs_wanted(
            Paired([], ratios, ratios, [1.0] * len(ratios)),
            PLAN.most_pairs if against else PLAN.suspect_pairs,  # sessions to be stored are measured longer
            PLAN.suspect_pairs,
            suspicious,
        ):
            ratios += pairs(more)
        return ratios

    def _sample(self) -> float:
        spike = self.draw.expovariate(1 / 0.4) if self.draw.random() < self.noise.spikes else 0.0
        return self.draw.gauss(0, self.noise.jitter) + spike

    def metrics(self, true: float, slowdown: float = 0.0) -> dict[str, Metric]:
        """The speed ratios of one cell; a session's bias is common to them."""
        return {name: ratio_metric(name, self.speedup(true, slowdown)) for name in RATIOS}

    def memory(self, peak: float) -> Metric:
        """A peak with the noise of allocators and libraries."""
        return metric("peak_memory", peak + abs(self.draw.gauss(0, 0.5e6)))


def baseline_of(tmp_path: Path, machine: Machine, cells: int) -> Baselines:
    """Five sessions of `cells` cells, with the answers and the memory that go with them."""
    found = baselines.read(tmp_path / "baselines")
    for day in range(1, SESSIONS + 1):
        measured = [(one, compare(one, found.entry(one))) for one in run_of(machine, cells)]
        baselines.update(found, measured, session=f"2026-01-0{day}T00:00:00Z")
        found = baselines.read(found.directory)
    return found


def run_of(machine: Machine, cells: int) -> list[Record]:
    """One unchanged run."""
    return [one_cell(machine, number) for number in range(cells)]


def one_cell(
    machine: Machine, number: int, *, slowdown: float = 0.0, memory: float = 1.0, weight: float = 0.0
) -> Record:
    """Cell `number` with what is wrong with it: slower, `memory` times the peak, a perturbed weight's answers."""
    metrics = {
        **machine.metrics(1.0 + number / 10, slowdown),
        "peak_memory": machine.memory(memory * (30e6 + 1e6 * number)),
        "weight_memory": metric("weight_memory", 1_000_000 + number),
        "perplexity": metric("perplexity", 9.0 * (1 + weight)),
        "kl_divergence": metric("kl_divergence", 0.002 * (1 + 10 * weight)),
    }
    return record(metrics, optimization=f"technique_{number}")


def rate(found: Baselines, machine: Machine, slowdown: float, trials: int) -> float:
    """Share of trials in which the cell fails."""
    one = record({})
    entry = found.entry(one)
    failed = 0
    for _ in range(trials):
        now = {"decode_speedup": ratio_metric("decode_speedup", machine.speedup(2.0, slowdown, entry))}
        failed += compare(record(now), entry).failed
    return failed / trials


def stored_speedups(tmp_path: Path, machine: Machine) -> Baselines:
    found = baselines.read(tmp_path / "baselines")
    for day in range(1, SESSIONS + 1):
        now = {"decode_speedup": ratio_metric("decode_speedup", machine.speedup(2.0))}
        found = store(found, record(now), f"2026-01-0{day}T00:00:00Z")
    return found


class TestRates:
    """2,000 unchanged trials and 300 of each slow-down per machine, spread over ten baselines."""

    def rates(self, tmp_path: Path, noise: Noise) -> Iterator[tuple[float, float]]:
        machine = Machine(noise, seed=7)
        found = [stored_speedups(tmp_path / str(number), machine) for number in range(10)]
        for slowdown, trials in ((0.0, 200), (0.05, 30), (0.10, 30), (0.20, 30)):
            yield slowdown, sum(rate(one, machine, slowdown, trials) for one in found) / len(found)

    def test_a_calm_machine(self, tmp_path: Path) -> None:
        rates = dict(self.rates(tmp_path, CALM))
        assert rates[0.0] <= 0.0005
        assert rates[0.10] >= 0.95
        assert rates[0.20] >= 0.98

    def test_a_shared_machine(self, tmp_path: Path) -> None:
        rates = dict(self.rates(tmp_path, SHARED))
        assert rates[0.0] <= 0.001
        assert rates[0.10] >= 0.75
        assert rates[0.20] >= 0.98


@pytest.mark.parametrize("noise", [CALM, SHARED], ids=["calm", "shared"])
def test_an_unchanged_tree_passes_ten_times_in_a_row(tmp_path: Path, noise: Noise) -> None:
    machine = Machine(noise, seed=11)
    found = baseline_of(tmp_path, machine, cells=44)
    for _ in range(10):
        measured = [(one, judged(found, one)) for one in run_of(machine, 44)]
        verdict = compare_run(measured, found, Selection())
        assert not verdict.failed, "\n".join(cell.message for cell in verdict.verdicts if cell.failed)


@pytest.mark.parametrize(
    ("fault", "metrics"),
    [
        ({"slowdown": 0.10}, {"speedup", "prefill_speedup", "decode_speedup"}),
        ({"memory": 2.0}, {"peak_memory"}),
        ({"weight": 0.02}, {"perplexity", "kl_divergence"}),
    ],
    ids=["a tenth slower", "doubled memory", "perturbed weight"],
)
def test_a_fault_fails_its_own_cell_and_no_other(
    tmp_path: Path, fault: dict[str, float], metrics: set[str]
) -> None:
    machine = Machine(CALM, seed=3)
    found = baseline_of(tmp_path, machine, cells=8)
    for guilty in range(8):
        run = [one_cell(machine, number, **(fault if number == guilty else {})) for number in range(8)]
        verdicts = [judged(found, one) for one in run]
        assert [verdict.cell.optimization for verdict in verdicts if verdict.failed] == [
            f"technique_{guilty}"
        ]
        named = {finding.metric for finding in verdicts[guilty].findings if finding.failing}
        assert named <= metrics
        assert named
        assert f"technique_{guilty}, inference_speed: " in verdicts[guilty].message


def test_a_run_noisier_than_the_stored_sessions_raises_no_alarm(tmp_path: Path) -> None:
    """The usual way of false alarms: baselines from a quiet hour, a gate run in a busy one."""
    found = stored_speedups(tmp_path, Machine(CALM, seed=1))
    for jitter in (0.04, 0.08, 0.16):
        busy = Machine(Noise(jitter=jitter, spikes=0.1, session=0.005), seed=2)
        assert rate(found, busy, 0.0, trials=300) <= 1 / 300


def test_what_is_not_seen_is_not_called_passed_when_the_noise_hides_it(tmp_path: Path) -> None:
    """15 % slower on a machine too noisy to tell: inconclusive, not a pass that nobody looks at."""
    found = stored_speedups(tmp_path, Machine(CALM, seed=1))
    wild = Machine(Noise(jitter=0.3, spikes=0.3, session=0.0), seed=2)
    statuses = []
    for _ in range(100):
        now = {"decode_speedup": ratio_metric("decode_speedup", wild.speedup(2.0, slowdown=0.15))}
        statuses.append(judged(found, record(now)).status)
    assert statuses.count(Status.INCONCLUSIVE) > 80
    assert statuses.count(Status.PASSED) <= 5  # the bound that excludes a slow-down holds in 95 % of runs
