"""Measured ceilings: real readings, their counts, and that reading is not free."""

from __future__ import annotations

import itertools

import pytest

from pytest_inferencepio.measure import rates

MIB = 1 << 20


def test_bandwidth_of_each_size_with_its_count() -> None:
    found = rates.read_bandwidth(sizes=(MIB, 4 * MIB))
    assert found.keys() == {MIB, 4 * MIB}
    for rate in found.values():
        assert rate.n >= rates.LEAST_TRIES
        assert 0 < rate.value < 1e13  # no memory reads 10 TB/s


def test_arithmetic_of_three_data_types() -> None:
    found = rates.arithmetic(n=128)
    assert found.keys() == {"float32", "bfloat16", "int8"}
    assert all(0 < rate.value < 1e15 and rate.n >= rates.LEAST_TRIES for rate in found.values())


def test_the_best_of_the_tries_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.cycle([0.5, 0.1, 0.2])
    pause = itertools.count()

    def fake_timed(work: object, device: str) -> tuple[None, float]:
        next(pause)
        return None, next(seconds)

    monkeypatch.setattr(rates, "timed", fake_timed)
    monkeypatch.setattr(rates, "TRY_SECONDS", 0.0)
    assert rates.best_rate(lambda: None, 10.0) == rates.Rate(100.0, 3)
