"""--pio-update-baseline and --pio-baseline-dir: what passes becomes the baseline, a failing run never does."""

from __future__ import annotations

import json
from typing import Any

import pytest
from inner_pytest import BENCHMARK, Project

HERE = ("--pio-optimization=none", "--pio-baseline-dir=stored")
GROWN = BENCHMARK.replace("weight_memory(pio_measure.after.model))", "1e6 * grown())") + (
    "\n\ndef grown():\n    import os\n    return float(os.environ['GROWN'])\n"
)


def stored(project: Project) -> Any:
    return json.loads((project.path / "stored" / "small-tiny.json").read_text())


def test_stores_what_was_measured_and_the_next_run_compares(project: Project) -> None:
    result = project.measure(*HERE, "--pio-update-baseline")
    assert result.ret == 0
    assert "speedup" in json.dumps(stored(project))
    result = project.measure(*HERE, "--benchmark-compare", "--pio-require-baseline")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["pio: gate, baselines *stored (1 cells)"])


def test_the_ini_names_the_directory(project: Project) -> None:
    project.pytester.makeini("[pytest]\npio_baseline_dir = stored\n")
    assert project.measure("--pio-optimization=none", "--pio-update-baseline").ret == 0
    assert stored(project)["model"] == "small"


def test_a_regression_fails_the_gate_with_its_message_until_it_is_accepted(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.pytester.makepyfile(test_mine=GROWN)
    monkeypatch.setenv("GROWN", "1")
    assert project.measure(*HERE, "--pio-update-baseline").ret == 0
    monkeypatch.setenv("GROWN", "2")
    result = project.measure(*HERE, "--benchmark-compare")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*regression: small tiny, none, prefill: weight_memory; 1.00 MB → 2.00 MB*"])
    result.stdout.fnmatch_lines(["*to accept it: run again with --pio-update-baseline*"])
    assert project.measure(*HERE).ret == 0  # without the gate it is shown and fails nothing
    assert project.measure(*HERE, "--pio-update-baseline", "--benchmark-compare").ret == 0
    assert project.measure(*HERE, "--benchmark-compare").ret == 0


def test_a_failing_run_never_becomes_the_baseline(project: Project) -> None:
    assert project.measure(*HERE, "--pio-update-baseline").ret == 0
    before = stored(project)
    project.pytester.makepyfile(test_mine=BENCHMARK + "\n\ndef test_prefill_too():\n    raise ValueError\n")
    result = project.measure(*HERE, "--pio-update-baseline")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["baselines were not updated: a failing run never becomes a baseline*"])
    assert stored(project) == before


def test_an_interrupted_run_never_becomes_the_baseline(project: Project) -> None:
    later = "\n\ndef test_prefill_later():\n    raise KeyboardInterrupt\n"
    project.pytester.makepyfile(test_mine=BENCHMARK + later)
    result = project.measure(*HERE, "--pio-update-baseline")
    result.stdout.fnmatch_lines(["baselines were not updated: the run was interrupted*"])
    assert not (project.path / "stored").exists()


def test_the_installed_package_is_never_written_into(project: Project) -> None:
    message = project.refused("--pio-model=small", "--pio-update-baseline")
    assert "--pio-update-baseline: this project says nowhere where its baselines are kept" in message
    assert "add --pio-baseline-dir=DIR" in message


def test_a_corrupt_baseline_is_said_before_any_work(project: Project) -> None:
    project.pytester.mkdir("stored").joinpath("small-tiny.json").write_text('{"schema": 1, "cells": [')
    message = project.refused("--pio-model=small", *HERE)
    assert "small-tiny.json" in message
