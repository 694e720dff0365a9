"""A run with --pio-model beside what else pytest offers."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
from inner_pytest import BENCHMARK, Project

ROWS = "--pio-optimization=none,wide_arithmetic"
FAILS = "\n\ndef test_prefill_fails(pio_measure):\n    raise RuntimeError('no luck')\n"


def test_k_selects_rows(project: Project) -> None:
    nodeids = project.collected("--pio-model=small", ROWS, "-k", "accuracy and wide_arithmetic")
    assert nodeids == [
        "pytest_inferencepio/suite/test_accuracy.py::test_accuracy[small-tiny-wide_arithmetic]"
    ]


def test_m_selects_by_mark(project: Project) -> None:
    marked = BENCHMARK.replace("def test_prefill", "import pytest\n\n\n@pytest.mark.quick\ndef test_prefill")
    project.pytester.makepyfile(test_mine=marked)
    project.pytester.makeini("[pytest]\nmarkers = quick\n")
    nodeids = project.collected("test_mine.py", "--pio-model=small", ROWS, "-m", "quick")
    assert [nodeid.split("[")[0] for nodeid in nodeids] == ["test_mine.py::test_prefill"] * 2


def test_rows_stay_together_with_memory_first(project: Project) -> None:
    nodeids = project.collected("--pio-model=small", ROWS)
    assert [nodeid.endswith("-none]") for nodeid in nodeids] == [True] * 6 + [False] * 6
    assert "test_memory_usage" in nodeids[0]
    assert "test_memory_usage" in nodeids[6]


def test_x_stops_and_lf_repeats_what_failed(project: Project) -> None:
    project.pytester.makepyfile(test_mine=FAILS + BENCHMARK)
    project.run("test_mine.py", "-k", "prefill", "--pio-model=small", ROWS, "-x").assert_outcomes(failed=1)
    result = project.run("test_mine.py", "--pio-model=small", ROWS, "--lf")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*test_prefill_fails?small-tiny-none? - RuntimeError: no luck"])


def test_lf_finds_cells_of_the_suite(project: Project) -> None:
    """Its node ids name no file of the project."""
    text = (project.path / "conftest.py").read_text()
    broken = text.replace("torch.manual_seed(request.seed)", "raise RuntimeError('no weights')")
    project.pytester.makeconftest(broken)
    arguments = ("--pio-model=small", "--pio-optimization=none")
    project.run(*arguments, "-k", "accuracy or throughput").assert_outcomes(failed=2)
    project.run(*arguments, "--lf").assert_outcomes(failed=2)


def test_junitxml_names_cells(project: Project) -> None:
    assert project.measure("--pio-optimization=none", "--junitxml=junit.xml").ret == 0
    (case,) = ElementTree.parse(project.path / "junit.xml").iter("testcase")
    assert case.get("name") == "test_prefill[small-tiny-none]"


def test_collect_only_loads_and_measures_nothing(project: Project) -> None:
    text = (project.path / "conftest.py").read_text()
    project.pytester.makeconftest(text.replace("torch.manual_seed(request.seed)", "raise AssertionError"))
    result = project.run("--collect-only", "--pio-model=small", ROWS)
    assert result.ret == 0
    assert "inference benchmarks" not in result.stdout.str()


@pytest.mark.parametrize("arguments", [["-n", "2"], ["-n2", "--dist=loadscope"]])
def test_xdist_is_refused_in_words(project: Project, arguments: list[str]) -> None:
    message = project.refused("--pio-model=small", *arguments)
    assert "--pio-model cannot run under pytest-xdist" in message
    assert "run without -n" in message


def test_xdist_without_processes_is_fine(project: Project) -> None:
    assert project.collected("--pio-model=small", "--pio-optimization=none", "-p", "xdist", "-n0")


def test_no_pytest_benchmark_is_refused_in_words(project: Project) -> None:
    message = project.refused("--pio-model=small", "-p", "no:benchmark")
    assert "--pio-model needs pytest-benchmark, which -p no:benchmark switched off" in message


@pytest.mark.parametrize("option", ["--benchmark-disable", "--benchmark-skip"])
def test_a_switched_off_benchmark_is_refused_in_words(project: Project, option: str) -> None:
    message = project.refused("--pio-model=small", option)
    assert f"{option} and --pio-model contradict each other: nothing would be measured" in message


def test_ctrl_c_keeps_what_is_measured(project: Project) -> None:
    project.pytester.makepyfile(
        test_mine=BENCHMARK + "\n\ndef test_prefill_z(pio_measure):\n    raise KeyboardInterrupt\n"
    )
    result = project.measure("--pio-optimization=none", "--pio-report=out", "--benchmark-json=bench.json")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    out = project.path / "out"
    (cell,) = json.loads((out / "summary.json").read_text())["cells"]
    assert cell["category"] == "prefill"
    (missing,) = json.loads((out / "coverage.json").read_text())["missing"]
    assert (missing["category"], missing["reason"]) == ("prefill_z", "the run ended before it")
    stored = json.loads((project.path / "bench.json").read_text())["benchmarks"]
    assert "pio" in stored[0]["extra_info"]


def test_warnings_of_libraries_fail_no_cell_of_the_suite(project: Project) -> None:
    text = (project.path / "conftest.py").read_text()
    warning = "import warnings; warnings.warn('from a library')"
    project.pytester.makeconftest(text.replace("torch.manual_seed(request.seed)", warning))
    finder = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"  # of an editable install
    project.pytester.makeini(f"[pytest]\nfilterwarnings =\n    error\n    {finder}\n")
    arguments = ("--pio-model=small", "--pio-optimization=none", "--pio-category=power_efficiency")
    result = project.run(*arguments)
    assert result.ret == 0
    assert "failed" not in result.stdout.str().splitlines()[-1]
