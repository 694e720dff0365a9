"""The lines at the end of a run: what they say, that they line up, that colour is the terminal's business."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from report_data import Unmeasured, int4, none, one_record, regression, run

from pytest_inferencepio.baselines import cell_of
from pytest_inferencepio.record import Record, metric, not_measured
from pytest_inferencepio.reports import terminal
from pytest_inferencepio.reports.impact import impacts
from pytest_inferencepio.reports.run_data import RunData
from pytest_inferencepio.verdict import Finding, Outcome, Verdict, verdict_of


def text_of(data: RunData) -> list[str]:
    return [line.text for line in terminal.lines(data)]


def section(data: RunData, title: str) -> list[str]:
    """The lines under `title` up to the next empty one."""
    texts = text_of(data)
    start = next(number for number, text in enumerate(texts) if text.startswith(f"{title}: "))
    return texts[start : texts.index("", start)]


def test_before_and_after_of_everything() -> None:
    texts = text_of(run())
    row = next(text for text in texts if text.startswith("  weight_int4"))
    for part in (
        "weight_int4(group_size=64)",
        "1.84x [1.80, 1.88]",
        "182 ms → 99.0 ms",
        "12.3 ms → 5.21 ms",
        "412 MB → 210 MB (-49 %)",
        "regression",
    ):
        assert part in row
    below = texts[texts.index(row) + 1]
    assert (
        "accuracy preserved: KL 0.00210 nat, top-1 99.1 %, perplexity 9.15 (+0.33 %), tasks 98.0 %" in below
    )
    assert "weights 3.10 MB" in below


def test_the_unoptimized_row_shows_its_values_and_the_noise() -> None:
    texts = text_of(run())
    row = next(text for text in texts if text.startswith("  none"))
    assert "A/A 1.00x [0.990, 1.01]" in row
    assert "→" not in row
    assert "accuracy perplexity 9.12, tasks 98.0 %" in texts[texts.index(row) + 1]


def test_columns_line_up() -> None:
    table = [text for text in text_of(run()) if text.startswith("  ") and not text.startswith("      ")][:3]
    assert table[0].split("  ")[1] == "optimization"
    for heading, cell in (
        ("speedup", "1.84x"),
        ("whole", "182 ms →"),
        ("per token", "12.3 ms →"),
        ("gate", "regr"),
    ):
        assert table[0].index(heading) == table[2].index(cell)


def test_accuracy_beyond_the_budget_is_said() -> None:
    over = Finding(cell_of(int4()), "kl_divergence", Outcome.BUDGET, after=0.0021, unit="nat")
    texts = text_of(run(findings=(over,)))
    assert any("accuracy not preserved: KL 0.00210 nat" in text for text in texts)
    assert any(text.startswith("  weight_int4") and text.endswith("budget exceeded") for text in texts)


def test_regressions_carry_their_message_in_red() -> None:
    lines = terminal.lines(run())
    (line,) = [line for line in lines if line.text.startswith("  regression: ")]
    assert line.colour == "red"
    assert line.text.strip() == str(regression(int4()))


def test_every_section_counts_its_lines() -> None:
    assert section(run(), "refused") == [
        "refused: 1",
        "  qwen3_vl_2b tiny, layer_streaming (accuracy, throughput): the disk is read only",
    ]
    assert section(run(), "missing")[1] == (
        "  qwen3_vl_2b tiny, kv_int8 (accuracy): the time budget was used up"
    )
    assert section(run(), "notes") == ["notes: 1", "  a note of the run"]


def test_cells_without_a_baseline_are_joined_by_model_and_optimization() -> None:
    records = [dataclasses.replace(int4(), category=name) for name in ("accuracy", "throughput")]
    measured = [(one, no_baseline(one)) for one in records]
    assert section(RunData(measured), "no baseline")[1] == (
        "  qwen3_vl_2b tiny, weight_int4(group_size=64) (accuracy, throughput): this benchmark has no baseline; store"
    )


def no_baseline(record: Record) -> Verdict:
    finding = Finding(
        cell_of(record),
        "(all)",
        Outcome.NO_BASELINE,
        detail="this benchmark has no baseline",
        advice="store",
    )
    return verdict_of(cell_of(record), [finding])


def test_long_sections_are_cut_and_counted() -> None:
    data = dataclasses.replace(
        run(), missing=[Unmeasured("qwen3_vl_2b", "tiny", f"o{n}", "accuracy", "x") for n in range(30)]
    )
    found = section(data, "missing")
    assert (found[0], found[-1]) == ("missing: 30", "  and 10 more, listed by --pio-report=DIR")


def test_the_closing_line_counts_cells_and_verdicts() -> None:
    assert text_of(run())[-1] == (
        "coverage: 2 ran, 2 refused, 1 missing; verdicts: 1 passed, 1 regression; 123 s"
    )
    assert "--benchmark-compare makes these regressions fail" in text_of(run(gated=False))[-1]


def test_a_run_that_measured_nothing_says_so() -> None:
    assert text_of(RunData([])) == ["coverage: 0 ran, 0 refused, 0 missing; verdicts: none; 0 s"]


@pytest.mark.parametrize(("colour", "coded"), [("yes", True), ("no", False), ("auto", False)])
def test_colour_is_left_to_the_terminal(pytester: pytest.Pytester, colour: str, coded: bool) -> None:
    """`auto` is what a pipe gets."""
    pytester.makeconftest(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})

        def pytest_terminal_summary(terminalreporter):
            from report_data import run
            from pytest_inferencepio.reports import terminal
            terminal.write(terminalreporter, run())
    """)
    done = pytester.runpytest_subprocess(f"--color={colour}", "-p", "no:cacheprovider")
    (line,) = [line for line in done.outlines if "regression: qwen3_vl_2b" in line]
    assert line.startswith("\x1b[31m") == coded
    assert ("\x1b" in done.stdout.str()) == coded


def test_the_category_made_for_a_metric_is_shown() -> None:
    speed = dataclasses.replace(none(), category="inference_speed")
    later = dataclasses.replace(none(), metrics={"total_time": metric("total_time", 9.0)})
    cell = cell_of(none())
    (row,) = impacts([(speed, verdict_of(cell, [])), (later, verdict_of(cell, []))])
    assert row.metrics["total_time"].value == 0.182


def test_numbers_of_random_weights_say_nothing_about_answers() -> None:
    metrics = {
        "kl_divergence": metric("kl_divergence", 0.2),
        "top1_agreement": metric("top1_agreement", 0.06),
    }
    unknown = {name: not_measured(name, "random weights") for name in ("perplexity_ratio", "task_drop")}
    row = one_record("weight_int4", metrics | unknown)
    (impact,) = impacts([(row, verdict_of(cell_of(row), []))])
    assert impact.accuracy() == "of answers not measured (numbers alone: KL 0.200 nat, top-1 6.00 %)"
