"""The category `hardware`: ceilings, least times and shares in the record and in every report; never gated."""

from __future__ import annotations

import json

import pytest
from inner_pytest import CONFTEST, Project

FEW = """

def pytest_pio_workloads():
    return {"pairs": 2, "warmup": 1, "prompt_tokens": 16, "new_tokens": 3}
"""
RUN = ("--pio-model=small", "--pio-category=hardware", "--benchmark-json=bench.json")


@pytest.fixture
def quick(project: Project) -> Project:
    project.pytester.makeconftest(CONFTEST + FEW)
    return project


def test_the_record_has_ceilings_least_times_and_shares(quick: Project) -> None:
    result = quick.run(*RUN, "--pio-optimization=none,wide_arithmetic", "--pio-report=out")
    assert result.ret == 0, result.stdout.str()
    records = quick.stored()
    assert [record["optimization"] for record in records] == ["none", "wide_arithmetic"]
    for record in records:
        metrics = record["metrics"]
        assert {"read_bandwidth[1MiB]", "arithmetic_peak[float32]", "arithmetic_peak[int8]"} <= metrics.keys()
        assert metrics["threads"]["value"] == record["fingerprint"]["threads"]
        peak = record["fingerprint"]["arithmetic"]["bfloat16"]["value"]
        assert metrics["arithmetic_peak[bfloat16]"]["value"] == peak
        least, took = (
            metrics[name]["value"] for name in ("least_time_per_output_token", "time_per_output_token")
        )
        assert metrics["decode_roofline_share"]["value"] == pytest.approx(least / took)
        assert 0 < metrics["decode_roofline_share"]["high"] <= 1
        assert 0 < metrics["prefill_roofline_share"]["value"] <= 1
        assert record["verdict"] == "passed"
        assert record["workload"]["prompt_tokens"] == 16
    text = " ".join(result.stdout.str().split())
    assert "this machine reads" in text and "computes" in text
    report = (quick.path / "out" / "report.md").read_text()
    assert "## Hardware" in report and "| small tiny | wide_arithmetic |" in report


def test_reading_is_measured_again_beside_every_sample(project: Project) -> None:
    counting = """
from pytest_inferencepio import machine

reread = machine.reread

def counted(device):
    with open("reread.txt", "a") as file:
        file.write(".")
    reread(device)

machine.reread = counted
"""
    project.pytester.makeconftest(CONFTEST + FEW + counting)
    assert project.run(*RUN, "--pio-optimization=none").ret == 0
    rounds = json.loads((project.path / "bench.json").read_text())["benchmarks"][0]["stats"]["rounds"]
    assert (project.path / "reread.txt").read_text() == "." * (rounds + 1)  # and the warm-up


def test_wider_weights_take_longer_to_read(quick: Project) -> None:
    assert quick.run(*RUN, "--pio-optimization=none,wide_arithmetic").ret == 0
    narrow, wide = (record["metrics"]["bytes_read_per_token"]["value"] for record in quick.stored())
    assert wide == pytest.approx(2 * narrow, rel=0.05)


def test_nothing_is_missing_nothing_gates_and_nothing_is_stored(quick: Project) -> None:
    gate = ("--benchmark-compare", "--pio-require-baseline", "--pio-baseline-dir=stored")
    measured = ("test_mine.py", "-k", "test_prefill", "--pio-model=small", "--pio-optimization=none")
    assert quick.run(*measured, "--pio-update-baseline", "--pio-baseline-dir=stored").ret == 0
    result = quick.run(*RUN, "--pio-optimization=none", *gate, "--pio-report=out")
    assert result.ret == 0, result.stdout.str()
    counts = json.loads((quick.path / "out" / "coverage.json").read_text())["counts"]
    assert counts == {"ran": 1, "refused": 0, "missing": 0, "only_in_baseline": 0}
    assert "no baseline" not in result.stdout.str()
    before = (quick.path / "stored" / "small-tiny.json").read_text()
    update = ("--pio-update-baseline", "--pio-baseline-dir=stored")
    result = quick.run(*RUN, "--pio-optimization=none", *update)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*only hardware* measured; *are not stored*"])
    assert (quick.path / "stored" / "small-tiny.json").read_text() == before


def test_a_figure_above_its_ceiling_fails_in_words(quick: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_inferencepio.measure import memory

    monkeypatch.setattr(memory, "bytes_read_per_step", lambda runner: 1e18)
    result = quick.run(*RUN, "--pio-optimization=none")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*ImpossibleFigure: decode_tokens_per_second of * exceeds *"])
