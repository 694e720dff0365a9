"""A run against the whole baseline: nothing that should have been compared may go unnoticed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from gate_records import OTHER_ISA, elsewhere, judged, ratio, record, stored

from pytest_inferencepio.baselines import Baselines, cell_of
from pytest_inferencepio.gate_run import RunVerdict, Selection, compare_run
from pytest_inferencepio.record import Record


@dataclasses.dataclass(frozen=True)
class Unmeasured:
    """A cell that was refused."""

    model: str
    scale: str
    optimization: str
    category: str
    reason: str


INT4, KV = record(ratio(2.0)), record(ratio(1.1), optimization="kv_int8")


@pytest.fixture
def found(tmp_path: Path) -> Baselines:
    """Baselines of two cells."""
    return stored(tmp_path, INT4, KV)


def run(
    found: Baselines, *records: Record, selection: Selection | None = None, **named: object
) -> RunVerdict:
    measured = [(one, judged(found, one)) for one in records]
    return compare_run(measured, found, selection or Selection(), **named)  # type: ignore[arg-type]


def test_all_cells_ran(found: Baselines) -> None:
    verdict = run(found, INT4, KV)
    assert not verdict.failed
    assert (verdict.missing, verdict.renamed, verdict.new, verdict.failures, verdict.notes) == (
        {},
        {},
        (),
        (),
        (),
    )


def test_a_regressed_cell_fails_the_run(found: Baselines) -> None:
    assert run(found, record(ratio(1.0)), KV).failed


def test_a_selected_cell_that_did_not_run_fails(found: Baselines) -> None:
    verdict = run(found, INT4)
    assert verdict.failed
    assert verdict.gone == (cell_of(KV),)
    (failure,) = verdict.failures
    assert (
        "qwen3_4b_instruct_2507/tiny/kv_int8/inference_speed is in the baseline and was selected" in failure
    )
    assert "did not run; to accept it: run again with --pio-update-baseline" in failure


@pytest.mark.parametrize(
    "selection",
    [
        Selection(optimizations={"weight_int4"}),
        Selection(deselected=[cell_of(KV)]),
        Selection(models={"qwen3_vl_2b"}),
        Selection(scales={"full"}),
        Selection(categories={"accuracy"}),
        Selection(devices={"cuda"}),
        Selection(dtypes={"float32"}),
    ],
)
def test_what_was_not_selected_is_not_missed(found: Baselines, selection: Selection) -> None:
    assert not run(found, INT4, selection=selection).failed


def test_an_incomplete_run_notes_what_is_missing(found: Baselines) -> None:
    verdict = run(found, INT4, complete=False)
    assert not verdict.failed
    assert verdict.gone == ()
    assert "was not compared: did not run (the run was not completed)" in verdict.notes[0]


def test_a_refusal_of_what_ran_here_before_fails(found: Baselines) -> None:
    refusal = Unmeasured(KV.model, "tiny", "kv_int8", "inference_speed", "needs AVX2")
    verdict = run(found, INT4, refused=[refusal])
    assert "needs AVX2" in verdict.failures[0]


def test_a_refusal_on_another_machine_is_a_note(found: Baselines) -> None:
    refusal = Unmeasured(KV.model, "tiny", "kv_int8", "inference_speed", "needs AVX2")
    verdict = run(found, elsewhere(INT4, OTHER_ISA), refused=[refusal])
    assert not verdict.failed
    assert "was not compared: needs AVX2 (its baseline is of another machine)" in verdict.notes[0]


def test_a_new_cell_is_listed_and_fails_nothing(found: Baselines) -> None:
    new = record(ratio(1.5), optimization="fused_ops")
    verdict = run(found, INT4, KV, new)
    assert (verdict.new, verdict.failed) == ((cell_of(new),), False)


def test_a_renamed_cell_is_recognised_and_fails(found: Baselines) -> None:
    new = record(ratio(2.0), optimization="weight_int4_fast")
    verdict = run(found, new, KV)
    assert verdict.renamed == {cell_of(INT4): cell_of(new)}
    assert verdict.missing == {}
    assert verdict.gone == (cell_of(INT4),)
    assert "weight_int4/inference_speed is now called" in verdict.failures[0]


def test_another_workload_is_no_rename(found: Baselines) -> None:
    new = record(ratio(2.0), optimization="weight_int4_fast", workload={"prompt": 1})
    verdict = run(found, new, KV)
    assert verdict.renamed == {}
    assert list(verdict.missing) == [cell_of(INT4)]


def test_zero_overlap_fails_loudly(found: Baselines) -> None:
    other = record(ratio(2.0), optimization="torch_compile")
    verdict = run(found, other, selection=Selection(optimizations={"torch_compile"}))
    assert verdict.failed
    (failure,) = verdict.failures
    assert "none of the 1 benchmarks of this run is in the baseline" in failure
    assert "torch_compile/inference_speed, the baseline qwen3_4b_instruct_2507/tiny/" in failure


def test_a_run_that_was_not_asked_to_compare_is_only_told_so(found: Baselines) -> None:
    other = record(ratio(2.0), optimization="torch_compile")
    verdict = run(found, other, selection=Selection(optimizations={"torch_compile"}), gated=False)
    assert not verdict.failed
    assert any("none of the 1 benchmarks of this run is in the baseline" in note for note in verdict.notes)


def test_no_baseline_at_all_is_not_zero_overlap(tmp_path: Path) -> None:
    empty = Baselines(tmp_path, {})
    verdict = run(empty, INT4)
    assert (verdict.failed, verdict.new) == (False, (cell_of(INT4),))


def test_a_run_that_measured_nothing_has_no_overlap_to_miss(found: Baselines) -> None:
    verdict = run(found, selection=Selection(models={"qwen3_vl_2b"}))
    assert not verdict.failed
