"""Without a --pio-* option the plugin costs nothing, collects nothing and breaks nobody."""

from __future__ import annotations

import pytest
from inner_pytest import BENCHMARK, Project

# Heavy or ours: none of these may be imported by a plain `pytest`.
LISTED = """
import atexit, sys
HEAVY = ("torch", "transformers", "numpy", "optimizations", "pytest_inferencepio.session")
atexit.register(lambda: print("imported:", [name for name in HEAVY if name in sys.modules]))
"""
SHADOWING = """
import importlib.util, sys
from pathlib import Path

place = Path(__file__).with_name("optimizations")
spec = importlib.util.spec_from_file_location(
    "optimizations", place / "__init__.py", submodule_search_locations=[str(place)]
)
sys.modules["optimizations"] = importlib.util.module_from_spec(spec)
"""


def test_a_plain_run_imports_neither_torch_nor_optimizations(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(LISTED)
    pytester.makepyfile("def test_one(): pass")
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["plugins:*inferencepio*", "imported: ?*"])
    assert "imported: []" in result.outlines


def test_a_plain_run_collects_nothing_of_ours(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess()
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_with_an_option_a_package_that_shadows_ours_is_said(pytester: pytest.Pytester) -> None:
    """As when a conftest's directory, first on the path, has a package of that name."""
    pytester.mkpydir("optimizations")
    pytester.makeconftest(SHADOWING)
    result = pytester.runpytest_subprocess("--pio-model=all", "--collect-only")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    told = result.stderr.str()
    assert "another package named `optimizations` shadows the one of pytest-inferencepio" in told
    assert f"found {pytester.path}/optimizations" in told


def test_benchmarks_of_users_are_skipped_in_words(project: Project) -> None:
    project.pytester.makepyfile(test_mine=BENCHMARK + "\n\ndef test_plain(): pass\n")
    result = project.run("-rs")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*measures models, and --pio-model says which*"])


def test_distribution_over_processes_works_as_ever(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_one(): pass\n\ndef test_two(): pass\n")
    pytester.runpytest_subprocess("-n", "1").assert_outcomes(passed=2)
