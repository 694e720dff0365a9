"""--benchmark-compare with --pio-model: the gate against our own baselines, and the path it may swallow."""

from __future__ import annotations

import pytest
from inner_pytest import Project

from pytest_inferencepio.guards import is_path

# Warnings are errors, but for what an editable install makes pytest say about its finder.
STRICT = ("-W", "error", "-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning")
HERE = ("--pio-optimization=none", "--pio-baseline-dir=stored")


def test_the_first_run_has_nothing_stored_and_does_not_crash(project: Project) -> None:
    result = project.measure(*HERE, "--benchmark-compare", *STRICT)
    assert result.ret == 0
    assert "Can't compare" not in result.stdout.str() + result.stderr.str()
    result.stdout.fnmatch_lines(["pio: gate, baselines *stored (0 cells)", "no baseline: 1"])


def test_a_stored_run_of_pytest_benchmark_is_shown_beside(project: Project) -> None:
    assert project.measure(*HERE, "--benchmark-autosave").ret == 0
    result = project.measure(*HERE, "--benchmark-compare")
    assert result.ret == 0
    # In any order: pytest-benchmark sorts the rows by time, and which run was faster is chance.
    result.stdout.fnmatch_lines_random(
        ["test_prefill?small-tiny-none? (NOW)*", "test_prefill?small-tiny-none? (0001*"]
    )


@pytest.mark.parametrize("path", ["tests/", "test_mine.py", "test_mine.py::test_prefill", "."])
def test_a_swallowed_path_is_caught(project: Project, path: str) -> None:
    message = project.refused("--pio-model=small", "--benchmark-compare", path)
    assert f"--benchmark-compare took {path!r} for the number of a stored run" in message
    assert f"pytest {path} --benchmark-compare" in message


@pytest.mark.parametrize(
    "value", ["0001", "0001_name", "Linux-CPython-3.11-64bit/0001", "Linux*/0001*", "run.json"]
)
def test_what_names_a_stored_run_is_let_through(project: Project, value: str) -> None:
    (project.path / "run.json").write_text("{}")
    assert not is_path(value, project.path)
