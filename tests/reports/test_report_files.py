"""summary.json, report.md, coverage.json and the README's table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from report_data import Unmeasured, int4, none, regression, run

from pytest_inferencepio.baselines import cell_of
from pytest_inferencepio.gate_run import RunVerdict
from pytest_inferencepio.record import Record, metric
from pytest_inferencepio.reports import coverage, files, json_report, markdown, tables
from pytest_inferencepio.reports.run_data import RunData
from pytest_inferencepio.verdict import verdict_of


def test_all_three_files_are_written(tmp_path: Path) -> None:
    written = files.write(tmp_path / "deep" / "report", run())
    assert [path.name for path in written] == ["summary.json", "report.md", "coverage.json"]
    assert sorted(path.name for path in (tmp_path / "deep" / "report").iterdir()) == sorted(
        path.name for path in written
    )
    assert json.loads(written[0].read_text()) == json_report.summary(run())
    assert json.loads(written[2].read_text()) == coverage.coverage(run())
    assert written[1].read_text() == markdown.report(run())


def test_writing_again_replaces(tmp_path: Path) -> None:
    files.write(tmp_path, run())
    files.write(tmp_path, RunData([]))
    assert json.loads((tmp_path / "summary.json").read_text())["cells"] == []


class TestSummary:
    def test_every_record_reads_back_from_it(self) -> None:
        cells = json_report.summary(run())["cells"]
        records = []
        for cell in cells:
            assert cell.pop("findings") is not None
            records.append(Record.from_json(cell))
        assert [one.metrics for one in records] == [none().metrics, int4().metrics]
        assert [one.verdict for one in records] == ["passed", "regression"]

    def test_findings_carry_numbers_and_the_message(self) -> None:
        (finding,) = json_report.summary(run())["cells"][1]["findings"]
        assert (finding["metric"], finding["outcome"]) == ("decode_speedup", "regression")
        assert (finding["before"], finding["after"], finding["low"], finding["n"]) == (2.6, 2.36, 2.3, 9)
        assert finding["message"] == str(regression(int4()))

    @pytest.mark.parametrize(
        ("data", "passed"),
        [
            (run(), False),
            (run(findings=()), True),
            (RunData([]), True),
            (RunData([], run=RunVerdict((), {}, {}, (), (), ("zero overlap",), ())), False),
        ],
    )
    def test_passed_says_what_the_gate_says(self, data: RunData, passed: bool) -> None:
        assert json_report.summary(data)["passed"] is passed

    def test_counts_and_the_machine(self) -> None:
        summary = json_report.summary(run())
        assert summary["counts"] == {
            "passed": 1,
            "regression": 1,
            "inconclusive": 0,
            "no_baseline": 0,
            "budget_exceeded": 0,
        }
        assert summary["fingerprint"]["cpu"] == "Example 9000"
        assert summary["seconds"] == 123.4


class TestCoverage:
    def test_each_cell_is_in_one_list_with_its_reason(self) -> None:
        found = coverage.coverage(run())
        assert found["counts"] == {"ran": 2, "refused": 2, "missing": 1, "only_in_baseline": 0}
        assert found["ran"][1]["verdict"] == "regression"
        assert found["ran"][1]["not_measured"] == {"energy_per_token": "no counter is readable"}
        assert found["refused"][0]["reason"] == "the disk is read only"
        assert found["missing"][0]["optimization"] == "kv_int8"

    def test_cells_only_in_the_baseline_are_listed_once(self) -> None:
        here = cell_of(int4())
        gone = dataclasses.replace(here, optimization="weight_int2")
        told = dataclasses.replace(here, optimization="kv_int8")
        verdict = RunVerdict((), {gone: "did not run", told: "refused"}, {}, (), (), (), ())
        refused = Unmeasured(told.model, told.scale, told.optimization, told.category, "refused")
        found = coverage.coverage(dataclasses.replace(run(), run=verdict, refused=[refused]))
        assert [cell["optimization"] for cell in found["only_in_baseline"]] == ["weight_int2"]
        assert coverage.summary(dataclasses.replace(run(), run=verdict)).endswith("2 only in the baseline")


class TestMarkdown:
    def test_sections_hold_what_the_run_found(self) -> None:
        text = markdown.report(run())
        assert "2 ran, 2 refused, 1 missing in 123 s: 1 passed, 1 regression." in text
        assert "Measured on cpu Example 9000, isa avx2, threads 2." in text
        assert "## qwen3_vl_2b, tiny, cpu, bfloat16" in text
        assert f"## Regressions\n\n- {regression(int4())}\n" in text
        assert "- qwen3_vl_2b tiny, layer_streaming (accuracy, throughput): the disk is read only" in text
        assert "## Inconclusive" not in text
        assert text.endswith("\n") and not text.endswith("\n\n")

    def test_every_row_has_every_column(self) -> None:
        rows = [line for line in markdown.report(run()).splitlines() if line.startswith("|")]
        assert len(rows) == 4
        assert {row.count("|") for row in rows} == {11}

    def test_the_readme_table_has_one_row_per_model_and_optimization(self) -> None:
        measured = run().measured
        again = [(dataclasses.replace(one, category="accuracy"), verdict) for one, verdict in measured]
        lines = markdown.results_table([*measured, *again]).splitlines()
        assert len(lines) == 4
        assert lines[3] == (
            "| qwen3_vl_2b | weight_int4(group_size=64) | 1.84x [1.80, 1.88] | 12.3 ms → 5.21 ms | "
            "412 MB → 210 MB (-49 %) | 3.10 MB | preserved: KL 0.00210 nat, top-1 99.1 %, "
            "perplexity 9.15 (+0.33 %), tasks 98.0 % |"
        )

    def test_a_bar_in_a_reason_does_not_end_the_cell(self) -> None:
        assert tables.markdown([("a", "b"), ("x|y", "two\nlines")])[2] == "| x\\|y | two lines |"

    def test_an_empty_run(self) -> None:
        text = markdown.report(RunData([]))
        assert "nothing was measured" in text


def test_text_columns_are_as_wide_as_their_widest_cell() -> None:
    assert tables.aligned([("a", "long heading"), ("wide cell", "b")], indent=" ") == [
        " a          long heading",
        " wide cell  b",
    ]


def test_accuracy_that_was_not_measured_is_not_called_preserved() -> None:
    bare = dataclasses.replace(int4(), metrics={"speedup": int4().metrics["speedup"]})
    text = markdown.results_table([(bare, verdict_of(cell_of(bare), []))])
    assert text.splitlines()[2].endswith("| not measured |")


def test_a_loss_beyond_one_percent_is_within_its_budget_and_not_preserved() -> None:
    worse = dataclasses.replace(
        int4(), metrics={**int4().metrics, "perplexity_ratio": metric("perplexity_ratio", 1.02)}
    )
    text = markdown.results_table([(worse, verdict_of(cell_of(worse), []))])
    assert "| within its budget: KL" in text
