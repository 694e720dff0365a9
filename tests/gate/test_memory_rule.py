"""The rules for memory and energy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from gate_records import SAME_ISA, elsewhere, judged, only, ratio, record, stored, verdict_about

from pytest_inferencepio.comparison import compare
from pytest_inferencepio.record import Metric, Record, metric, not_measured
from pytest_inferencepio.verdict import Outcome, Status


class TestMemory:
    @staticmethod
    def peak(value: float) -> dict[str, Metric]:
        return {"peak_memory": metric("peak_memory", value)}

    @pytest.mark.parametrize(
        ("before", "after", "status"),
        [
            (1e9, 1.015e9, Status.PASSED),  # within 2 %
            (10e6, 11.5e6, Status.PASSED),  # 15 %, but below the floor of 2 MB
            (10e6, 12.5e6, Status.REGRESSION),
            (1e9, 1.03e9, Status.REGRESSION),
        ],
    )
    def test_relative_and_absolute_must_both_be_exceeded(
        self, tmp_path: Path, before: float, after: float, status: Status
    ) -> None:
        assert verdict_about(tmp_path, self.peak(before), self.peak(after)).status is status

    def test_spread_of_the_sessions_is_added_to_the_floor(self, tmp_path: Path) -> None:
        found = stored(tmp_path, record(self.peak(20e6)))
        again = stored(tmp_path, record(self.peak(23e6)))
        now = record(self.peak(26e6))
        assert judged(found, now).status is Status.REGRESSION
        entry = found.entry(now)
        assert entry is not None
        two = dataclasses.replace(
            entry.metrics["peak_memory"],
            values=(*entry.metrics["peak_memory"].values, *again.entry(now).metrics["peak_memory"].values),  # type: ignore[union-attr]
        )
        both = dataclasses.replace(entry, metrics={"peak_memory": two})
        assert compare(now, both).status is Status.PASSED

    def test_less_is_an_improvement(self, tmp_path: Path) -> None:
        verdict = verdict_about(tmp_path, self.peak(1e9), self.peak(0.5e9))
        assert (verdict.status, len(verdict.of(Outcome.IMPROVED))) == (Status.PASSED, 1)

    def test_from_another_machine_only_the_ratio_counts(self, tmp_path: Path) -> None:
        def both(peak: float, share: float) -> Record:
            return record({**self.peak(peak), "memory_ratio": metric("memory_ratio", share)})

        found = stored(tmp_path, both(100e6, 0.5))
        assert judged(found, elsewhere(both(200e6, 0.5), SAME_ISA)).status is Status.PASSED
        verdict = judged(found, elsewhere(both(200e6, 0.9), SAME_ISA))
        assert [finding.metric for finding in verdict.of(Outcome.REGRESSION)] == ["memory_ratio"]
        # here the peak itself is compared, and a reference that shrank is no regression of the optimization
        assert judged(found, both(100e6, 0.9)).status is Status.PASSED

    def test_the_floor_holds_for_the_ratio_too(self, tmp_path: Path) -> None:
        found = stored(tmp_path, record({"memory_ratio": metric("memory_ratio", 0.5)}))
        small = {**self.peak(6e6), "memory_ratio": metric("memory_ratio", 0.7)}
        assert judged(found, elsewhere(record(small), SAME_ISA)).status is Status.PASSED


JOULES = {"energy_per_token": metric("energy_per_token", 1.0)}
MORE = {"energy_per_token": metric("energy_per_token", 1.2)}
NONE = {"energy_per_token": not_measured("energy_per_token", "no counter is readable")}


class TestEnergy:
    def test_gates_where_both_sides_measured_on_one_machine(self, tmp_path: Path) -> None:
        assert verdict_about(tmp_path, JOULES, MORE).status is Status.REGRESSION
        found = stored(tmp_path, record(JOULES))
        assert judged(found, elsewhere(record(MORE), SAME_ISA)).status is Status.PASSED

    def test_not_measurable_now_is_a_note(self, tmp_path: Path) -> None:
        verdict = verdict_about(tmp_path, JOULES, NONE)
        assert verdict.status is Status.PASSED
        assert "no counter is readable" in only(verdict, Outcome.NOTE)

    def test_not_measured_is_never_stored(self, tmp_path: Path) -> None:
        found = stored(tmp_path, record({**NONE, **ratio(2.0)}))
        entry = found.entry(record({}))
        assert entry is not None
        assert set(entry.metrics) == {"decode_speedup"}
