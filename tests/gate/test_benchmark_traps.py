"""Ways in which pytest-benchmark's own comparison passes what it should not, each beside what the gate says.

Every test runs the real pytest-benchmark on the command line, shows its exit code, and gives the same results
(the records under `extra_info`) to the gate.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from benchmark_project import COMPARE, GATED, MORE, SAVE, Project, compare_command, one_record
from gate_records import OTHER_ISA, elsewhere, judged, store
from pytest_benchmark.utils import get_machine_id

from pytest_inferencepio import baselines
from pytest_inferencepio.comparison import compare
from pytest_inferencepio.errors import BaselineError
from pytest_inferencepio.gate_run import RunVerdict, Selection, compare_run
from pytest_inferencepio.record import Record
from pytest_inferencepio.verdict import Status


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with one saved run of two benchmarks."""
    found = Project(tmp_path_factory.mktemp("saved") / "project")
    done = found.run(*SAVE)
    assert done.returncode == 0, done.stdout + done.stderr
    return found.path


@pytest.fixture
def project(saved_once: Path, tmp_path: Path) -> Project:
    """A copy of that project for one test."""
    shutil.copytree(saved_once, tmp_path / "project")
    return Project(tmp_path / "project")


def gate(tmp_path: Path, before: list[Record], after: list[Record], **named: Any) -> RunVerdict:
    """The gate's verdict about a run of `after` when `before` is stored."""
    found = baselines.read(tmp_path / "baselines")
    for one in before:
        found = store(found, one, "2026-01-01T00:00:00Z")
    measured = [(one, judged(found, one)) for one in after]
    return compare_run(measured, found, named.pop("selection", Selection()), **named)


def test_the_control_a_regression_of_the_times_is_seen(project: Project) -> None:
    done = project.run(*COMPARE, WORK=MORE)
    assert done.returncode != 0
    assert "Performance has regressed" in done.stdout + done.stderr


def test_zero_overlap_passes_there_and_fails_here(project: Project, tmp_path: Path) -> None:
    done = project.run(*COMPARE, *SAVE, WORK=MORE, ROWS="fused_ops")
    assert done.returncode == 0
    verdict = gate(tmp_path, project.records(0), project.records(1))
    assert any("nothing was compared" in failure for failure in verdict.failures)


def test_names_follow_the_root_directory_there_and_the_cell_here(project: Project, tmp_path: Path) -> None:
    done = project.run(*COMPARE, *SAVE, f"--rootdir={tmp_path}", WORK=MORE)
    assert done.returncode == 0  # 200 times slower, but under another full name
    assert project.fullnames(1)[0] == f"project/{project.fullnames(0)[0]}"
    verdict = gate(tmp_path, project.records(0), project.records(1))
    assert verdict.failures == ()
    assert [one.status for one in verdict.verdicts] == [Status.PASSED] * 2


def test_a_missing_benchmark_passes_there_and_fails_here(project: Project, tmp_path: Path) -> None:
    done = project.run(*COMPARE, *SAVE, ROWS="weight_int4")
    assert done.returncode == 0
    verdict = gate(tmp_path, project.records(0), project.records(1))
    assert (
        "kv_int8/inference_speed is in the baseline and was selected, but: did not run" in verdict.failures[0]
    )


def test_a_renamed_benchmark_passes_there_and_fails_here(project: Project, tmp_path: Path) -> None:
    done = project.run(*COMPARE, *SAVE, WORK=MORE, ROWS="weight_int4_fast,kv_int8_fast")
    assert done.returncode == 0
    verdict = gate(tmp_path, project.records(0), project.records(1))
    assert any("weight_int4/inference_speed is now called" in failure for failure in verdict.failures)


def test_a_regressed_run_becomes_the_baseline_there_and_not_here(project: Project, tmp_path: Path) -> None:
    assert project.run(*COMPARE, *SAVE, WORK=MORE).returncode != 0
    assert len(project.saved()) == 2  # saved before it was checked
    assert project.run(*COMPARE, WORK=MORE).returncode == 0  # the second time the regression is the baseline

    found = store(baselines.read(tmp_path / "baselines"), one_record(), "2026-01-01T00:00:00Z")
    slower = one_record(speedup=0.5)
    verdict = judged(found, slower)
    with pytest.raises(BaselineError, match="a failing run never becomes a baseline"):
        baselines.update(found, [(slower, verdict)], session="s", failures=[str(verdict.cell)])
    assert judged(baselines.read(found.directory), slower).failed


def test_a_test_that_failed_is_saved_there_and_refused_here(project: Project, tmp_path: Path) -> None:
    assert project.run(*SAVE, BROKEN="1").returncode == 1
    assert project.fullnames(1) == project.fullnames(0)
    measured = [(one, compare(one, None)) for one in project.records(1)]
    with pytest.raises(BaselineError, match="2 failed, nothing was written"):
        baselines.update(
            baselines.read(tmp_path / "baselines"), measured, session="s", failures=project.fullnames(1)
        )
    assert not (tmp_path / "baselines").exists()


def test_extra_info_is_ignored_there_and_gated_here(project: Project, tmp_path: Path) -> None:
    worse = one_record(speedup=0.5, perplexity=90.0)
    done = project.run(*COMPARE, *SAVE, record=worse)
    assert done.returncode == 0
    verdict = gate(tmp_path, project.records(0), project.records(1))
    assert verdict.failed
    assert {finding.metric for finding in verdict.verdicts[0].findings} == {"decode_speedup", "perplexity"}


def test_the_check_hangs_on_the_terminal_summary_there_and_on_the_test_here(
    project: Project, tmp_path: Path
) -> None:
    quiet = ("-p", "no:terminal")
    done = project.run(*COMPARE, *quiet, WORK=MORE)
    assert done.returncode == 0
    found = store(baselines.read(tmp_path / "baselines"), one_record(), "2026-01-01T00:00:00Z")
    gated = Project(tmp_path / "gated", GATED)
    where = {"BASELINES": str(found.directory)}
    assert gated.run(*quiet, **where).returncode == 0
    assert gated.run(*quiet, record=one_record(speedup=0.5), **where).returncode == 1


def test_no_report_knows_of_the_regression_there_and_junit_does_here(
    project: Project, tmp_path: Path
) -> None:
    assert project.run(*COMPARE, "--junitxml=out.xml", WORK=MORE).returncode != 0
    assert junit_failures(project.path / "out.xml") == []
    found = store(baselines.read(tmp_path / "baselines"), one_record(), "2026-01-01T00:00:00Z")
    gated = Project(tmp_path / "gated", GATED)
    done = gated.run("--junitxml=out.xml", record=one_record(speedup=0.5), BASELINES=str(found.directory))
    assert done.returncode == 1
    (failure,) = junit_failures(gated.path / "out.xml")
    assert "regression: qwen3_4b_instruct_2507 tiny, weight_int4, inference_speed: decode_speedup" in failure


def junit_failures(path: Path) -> list[str]:
    return [node.get("message") or "" for node in ET.parse(path).getroot().iter("failure")]


def test_two_processors_share_a_machine_id_there_and_not_here(project: Project, tmp_path: Path) -> None:
    version = ".".join(platform.python_version_tuple()[:2])
    assert get_machine_id() == f"{platform.system()}-CPython-{version}-{platform.architecture()[0]}"
    (saved,) = project.saved()
    data = json.loads(saved.read_text())
    data["machine_info"]["cpu"] = {"brand_raw": "another processor", "arch": "ARM_8"}
    saved.write_text(json.dumps(data))
    done = project.run(*COMPARE, WORK=MORE)
    assert "machine_info is different" in done.stdout + done.stderr
    assert done.returncode != 0  # absolute times of another machine decide

    there = [elsewhere(one, OTHER_ISA) for one in project.records()]
    verdict = gate(tmp_path, there, project.records())
    assert not verdict.failed
    found = baselines.read(tmp_path / "baselines")
    entry = found.entry(project.records()[0])
    assert entry is not None
    assert not any(history.same_machine for history in entry.metrics.values())


def test_no_stored_run_is_a_warning_there_and_a_verdict_here(tmp_path: Path) -> None:
    fresh = Project(tmp_path / "fresh")
    done = fresh.run("--benchmark-compare", *SAVE)
    assert done.returncode == 0
    assert "Can't compare. No benchmark files" in done.stdout + done.stderr
    verdict = gate(tmp_path, [], fresh.records())
    assert [one.status for one in verdict.verdicts] == [Status.NO_BASELINE] * 2
    assert len(verdict.new) == 2


def test_a_damaged_stored_run_is_skipped_there_and_an_error_here(project: Project, tmp_path: Path) -> None:
    (saved,) = project.saved()
    saved.write_text(saved.read_text()[:500])
    done = project.run("--benchmark-compare", WORK=MORE)
    assert done.returncode == 0
    found = store(baselines.read(tmp_path / "baselines"), one_record(), "2026-01-01T00:00:00Z")
    (path,) = found.directory.iterdir()
    path.write_text(path.read_text()[:500])
    with pytest.raises(BaselineError, match="is not valid JSON"):
        baselines.read(found.directory)


def test_disabled_benchmarks_pass_there_and_are_missing_here(project: Project, tmp_path: Path) -> None:
    done = project.run(*COMPARE, "--benchmark-disable", WORK=MORE)
    assert done.returncode == 0
    verdict = gate(tmp_path, project.records(0), [])
    assert len(verdict.failures) == 2


def test_the_command_line_never_fails_on_what_it_compares(project: Project) -> None:
    project.run(*SAVE, WORK=MORE)
    done = compare_command(project.path, *map(str, project.saved()))
    assert done.returncode == 0
    assert "weight_int4" in done.stdout


def test_records_survive_the_benchmark_file(project: Project) -> None:
    expected: Mapping[str, Record] = {
        name: dataclasses.replace(one_record(), optimization=name) for name in ("weight_int4", "kv_int8")
    }
    assert {one.optimization: one for one in project.records()} == expected
