"""--pio-report: summary.json, report.md, coverage.json."""

from __future__ import annotations

import json

from inner_pytest import Project

FILES = {"summary.json", "report.md", "coverage.json"}


def test_writes_three_files_beside_pytest_benchmarks(project: Project) -> None:
    result = project.measure(
        "--pio-optimization=none,wide_arithmetic", "--pio-report=out", "--benchmark-json=bench.json"
    )
    assert result.ret == 0
    out = project.path / "out"
    assert {path.name for path in out.iterdir()} == FILES
    result.stdout.fnmatch_lines([f"report: {out}/summary.json, report.md, coverage.json"])
    cells = json.loads((out / "summary.json").read_text())["cells"]
    stored = json.loads((project.path / "bench.json").read_text())["benchmarks"]
    measured = [cell["metrics"]["speedup"]["value"] for cell in cells]
    assert measured == [one["extra_info"]["pio"]["metrics"]["speedup"]["value"] for one in stored]
    assert {cell["optimization"] for cell in cells} == {"none", "wide_arithmetic"}
    assert "wide_arithmetic" in (out / "report.md").read_text()


def test_the_ini_is_relative_to_its_directory(project: Project) -> None:
    project.pytester.makeini("[pytest]\npio_report = out\n")
    project.pytester.mkdir("below")
    arguments = ("--pio-model=small", "--pio-optimization=none", "-k", "prefill", "../test_mine.py")
    monkey = project.path / "below"
    with project.pytester._monkeypatch.context() as patch:
        patch.chdir(monkey)
        assert project.run(*arguments, "-c", "../tox.ini", "--rootdir=..").ret == 0
    assert {path.name for path in (project.path / "out").iterdir()} == FILES


def test_what_failed_is_in_the_coverage_with_its_message(project: Project) -> None:
    project.pytester.makepyfile(
        test_mine="def test_prefill(pio_measure):\n    raise RuntimeError('no luck')\n"
    )
    result = project.measure("--pio-optimization=none", "--pio-report=out")
    result.assert_outcomes(failed=1)
    coverage = json.loads((project.path / "out" / "coverage.json").read_text())
    (missing,) = coverage["missing"]
    assert missing["category"] == "prefill"
    assert "RuntimeError: no luck" in missing["reason"]


def test_nothing_is_written_for_a_collection(project: Project) -> None:
    assert project.measure("--pio-report=out", "--collect-only").ret == 0
    assert not (project.path / "out").exists()
