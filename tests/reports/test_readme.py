"""The README's table comes from a run's summary and replaces what stands between the markers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_inferencepio.errors import RecordError
from pytest_inferencepio.record import Record, metric
from pytest_inferencepio.reports.readme import main, replace_between_markers, table_of

README = "# Title\n\n<!-- results: begin (by a command) -->\nold\n<!-- results: end -->\nafter\n"


def summary() -> dict[str, object]:
    record = Record(
        model="qwen3_4b_instruct_2507",
        scale="tiny",
        optimization="weight_int4",
        category="optimization_impact",
        device="cpu",
        dtype="bfloat16",
        workload={},
        metrics={"speedup": metric("speedup", 1.44, 1.34, 1.94, 9)},
        fingerprint={"cpu": "a processor", "cores": 2, "isa": "avx512", "commit": "0123456789abcdef"},
    )
    return {"cells": [{**record.to_json(), "findings": []}], "seconds": 12.3}


def test_the_table_says_where_it_was_measured() -> None:
    table = table_of(summary())
    assert "commit `0123456789` on a processor, 2 cores, avx512; 1 cells in 12 s" in table
    assert "| qwen3_4b_instruct_2507" in table
    assert "1.44x [1.34, 1.94]" in table


def test_only_what_is_between_the_markers_changes(tmp_path: Path) -> None:
    readme, file = tmp_path / "README.md", tmp_path / "summary.json"
    readme.write_text(README)
    file.write_text(json.dumps(summary()))
    assert main([str(file), str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n\n<!-- results: begin (by a command) -->\n")
    assert text.endswith("<!-- results: end -->\nafter\n")
    assert "old" not in text
    assert main([str(file), str(readme)]) == 0
    assert readme.read_text() == text


def test_missing_markers_are_said() -> None:
    with pytest.raises(ValueError, match="expected one line starting with"):
        replace_between_markers("# Title\n", "table")


def test_a_summary_without_cells_is_refused() -> None:
    with pytest.raises(RecordError, match="run with --pio-report=DIR first"):
        table_of({"cells": []})


def test_wrong_usage_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "python -m pytest_inferencepio.reports.readme" in capsys.readouterr().err
