"""--pio-list: everything there is, and nothing is run."""

from __future__ import annotations

from inner_pytest import Project

from optimizations.registry import techniques
from pytest_inferencepio.catalog.entries import ENTRIES
from pytest_inferencepio.naming import CATEGORIES, EXTRA_CATEGORIES


def test_prints_everything_and_runs_nothing(project: Project) -> None:
    result = project.run("--pio-list")
    assert result.ret == 0
    text = result.stdout.str()
    assert "collected" not in text
    listed = (*ENTRIES, "small", *techniques(), "wide_arithmetic", "tiny", "full")
    for name in (*listed, *CATEGORIES, *EXTRA_CATEGORIES):
        assert f"\n  {name} " in text, name
    flat = " ".join(text.split())
    assert "fidelity: rounding; source: this test" in flat
    assert "refuses glm_4_7_flash: glm4_moe_lite is not for it" in flat
    assert "also called glm_4_7, GLM-4.7-Flash-Flash" in flat
    assert "read_bandwidth 1 MiB" in flat
    assert "arithmetic bfloat16" in flat


def test_wins_over_a_run(project: Project) -> None:
    result = project.run("--pio-list", "--pio-model=small")
    assert result.ret == 0
    assert "collected" not in result.stdout.str()


def test_lists_for_the_device_and_type_that_are_asked_about(project: Project) -> None:
    text = project.run("--pio-list", "--pio-dtype=float32").stdout.str()
    assert "optimizations (on cpu, float32)" in text


def test_needs_no_pytest_benchmark(project: Project) -> None:
    assert project.run("--pio-list", "-p", "no:benchmark").ret == 0
