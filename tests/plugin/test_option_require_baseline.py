"""--pio-require-baseline: a cell that is compared with nothing fails."""

from __future__ import annotations

from inner_pytest import Project

HERE = ("--pio-optimization=none", "--pio-baseline-dir=stored")


def test_a_cell_without_a_baseline_fails(project: Project) -> None:
    result = project.measure(*HERE, "--pio-require-baseline")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*no baseline: small tiny, none, prefill*(--pio-require-baseline)"])


def test_without_it_the_cell_passes_and_is_told(project: Project) -> None:
    result = project.measure(*HERE, "--benchmark-compare")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["no baseline: 1", "*small tiny, none*has no baseline*"])


def test_the_ini_requires_it_too(project: Project) -> None:
    project.pytester.makeini("[pytest]\npio_require_baseline = true\n")
    project.measure(*HERE).assert_outcomes(failed=1)


def test_storing_one_satisfies_it(project: Project) -> None:
    assert project.measure(*HERE, "--pio-require-baseline", "--pio-update-baseline").ret == 0
    assert project.measure(*HERE, "--pio-require-baseline").ret == 0
