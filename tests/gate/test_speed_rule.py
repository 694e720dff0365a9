"""The rule for speed ratios: what fails, what is inconclusive, what passes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from gate_records import (
    OTHER_ISA,
    SAME_ISA,
    elsewhere,
    judged,
    only,
    ratio,
    ratio_metric,
    record,
    stored,
    verdict_about,
)

from pytest_inferencepio.comparison import aa_noise, compare, looks_slower
from pytest_inferencepio.gate_rules import Thresholds
from pytest_inferencepio.record import metric
from pytest_inferencepio.verdict import Outcome, Status


def test_equal_ratio_passes(tmp_path: Path) -> None:
    verdict = verdict_about(tmp_path, ratio(2.0, noise=0.02), ratio(2.0, noise=0.02, seed=1))
    assert verdict.status is Status.PASSED
    assert verdict.findings == ()


def test_a_tenth_slower_is_a_regression_that_says_everything(tmp_path: Path) -> None:
    verdict = verdict_about(tmp_path, ratio(2.0, noise=0.01), ratio(1.8, noise=0.01))
    assert verdict.status is Status.REGRESSION
    text = only(verdict, Outcome.REGRESSION)
    assert text == verdict.message
    for part in ("qwen3_4b_instruct_2507 tiny", "weight_int4", "inference_speed", "decode_speedup"):
        assert part in text
    assert re.search(r"1\.99 → 1\.(79|80)\d* \(-10 %\) \[1\.\d+, 1\.\d+\] from 20 samples", text), text
    assert re.search(r"allowed: 9\.\d % slower \(1 stored session\(s\), 1\.5 % between them\)", text), text
    assert "--pio-update-baseline" in text


def test_worse_at_the_median_but_not_proven_is_inconclusive(tmp_path: Path) -> None:
    now = {"decode_speedup": ratio_metric("decode_speedup", [1.7] * 5 + [2.1] * 4)}
    verdict = verdict_about(tmp_path, ratio(2.0), now)
    assert verdict.status is Status.INCONCLUSIVE
    assert "the samples do not prove it" in only(verdict, Outcome.INCONCLUSIVE)


def test_too_wide_an_interval_is_inconclusive_not_a_pass(tmp_path: Path) -> None:
    now = {"decode_speedup": ratio_metric("decode_speedup", [1.2] * 4 + [2.0] + [3.0] * 4)}
    verdict = verdict_about(tmp_path, ratio(2.0), now)
    assert verdict.status is Status.INCONCLUSIVE
    assert "too wide" in only(verdict, Outcome.INCONCLUSIVE)


@pytest.mark.parametrize("pairs", [1, 4])
def test_fewer_than_five_pairs_prove_nothing(tmp_path: Path, pairs: int) -> None:
    verdict = verdict_about(tmp_path, ratio(2.0), ratio(1.0, pairs=pairs))
    assert verdict.status is Status.INCONCLUSIVE


def test_five_equal_pairs_prove_a_halving(tmp_path: Path) -> None:
    assert verdict_about(tmp_path, ratio(2.0), ratio(1.0, pairs=5)).status is Status.REGRESSION


def test_an_interval_without_samples_is_used(tmp_path: Path) -> None:
    now = {"decode_speedup": metric("decode_speedup", 1.5, 1.45, 1.55, 20)}
    assert verdict_about(tmp_path, ratio(2.0), now).status is Status.REGRESSION
    wide = {"decode_speedup": metric("decode_speedup", 2.0, 0.0, 3.0, 20)}
    assert verdict_about(tmp_path / "wide", ratio(2.0), wide).status is Status.INCONCLUSIVE


def test_faster_is_reported_and_passes(tmp_path: Path) -> None:
    verdict = verdict_about(tmp_path, ratio(2.0), ratio(2.6, noise=0.01))
    assert verdict.status is Status.PASSED
    assert "decode_speedup; 2.00 → 2.59 (+29 %)" in only(verdict, Outcome.IMPROVED)


def test_a_lower_is_better_ratio_is_not_needed_but_zero_is_not_a_crash(tmp_path: Path) -> None:
    now = {"decode_speedup": metric("decode_speedup", 0.0)}
    assert verdict_about(tmp_path, ratio(2.0), now).status is Status.INCONCLUSIVE


def test_noise_of_the_machine_widens_the_threshold(tmp_path: Path) -> None:
    found = stored(tmp_path, record(ratio(2.0, noise=0.01)))
    now = record(ratio(1.8, noise=0.01))
    noisy = Thresholds(aa_noise=0.12)
    assert judged(found, now).status is Status.REGRESSION
    assert judged(found, now, thresholds=noisy).status is Status.INCONCLUSIVE


def test_noise_of_the_run_widens_the_threshold(tmp_path: Path) -> None:
    found = stored(tmp_path, record(ratio(2.0, noise=0.01)))
    verdict = judged(found, record(ratio(1.75, noise=0.15, seed=2)))
    assert verdict.status is Status.INCONCLUSIVE
    assert "widened by the noise of this run" in only(verdict, Outcome.INCONCLUSIVE)


def test_sessions_that_agree_tighten_the_threshold(tmp_path: Path) -> None:
    now = record(ratio(1.89, noise=0.002))
    one, five = (stored(tmp_path / str(n), record(ratio(2.0)), sessions=n) for n in (1, 5))
    assert judged(one, now).status is Status.PASSED  # 5.8 % is within what one session may be off by
    assert judged(five, now).status is Status.REGRESSION


@pytest.mark.parametrize(
    ("fingerprint", "kept", "lost"), [(SAME_ISA, 1.6, 1.45), (OTHER_ISA, 1.1, 0.9)], ids=["isa", "other"]
)
def test_a_foreign_machine_keeps_part_of_the_gain(
    tmp_path: Path, fingerprint: dict[str, object], kept: float, lost: float
) -> None:
    found = stored(tmp_path, record(ratio(2.0)))
    assert judged(found, elsewhere(record(ratio(kept)), fingerprint)).status is Status.PASSED
    verdict = judged(found, elsewhere(record(ratio(lost)), fingerprint))
    assert verdict.status is Status.REGRESSION
    assert "baseline of another" in verdict.message


def test_same_machine_can_be_overridden(tmp_path: Path) -> None:
    found, now = stored(tmp_path, record(ratio(2.0))), record(ratio(1.7))
    entry = found.entry(now)
    assert compare(now, entry, same_machine=True).status is Status.REGRESSION
    assert compare(now, entry, same_machine=False).status is Status.PASSED


def test_the_unoptimized_model_against_itself_never_regresses(tmp_path: Path) -> None:
    verdict = verdict_about(tmp_path, ratio(1.0), ratio(0.8), optimization="none")
    assert verdict.status is Status.PASSED
    assert "too noisy" in only(verdict, Outcome.NOTE)


def test_aa_noise_is_the_largest_ratio_of_the_unoptimized_rows() -> None:
    same = metric("speedup", 0.95, 0.94, 1.02, 9)
    other = metric("speedup", 3.0, 2.0, 4.0, 9)
    records = [record({"speedup": same}, optimization="none"), record({"speedup": other})]
    assert aa_noise(records) == pytest.approx(1 / 0.95 - 1)
    assert aa_noise([]) == 0.0


@pytest.mark.parametrize(
    ("worse", "wanted"),
    [
        (0.90, False),
        (0.99, False),
        (1.02, False),
        (1.05, True),
        (1.5, True),
    ],  # one stored session leaves 9 % open
)
def test_more_pairs_are_worth_it_from_half_of_what_is_open(
    tmp_path: Path, worse: float, wanted: bool
) -> None:
    baselines = stored(tmp_path, record(ratio(2.0)))
    now = record(ratio(2.0 / worse))
    entry = baselines.entry(now)
    assert entry is not None
    assert looks_slower(now, entry, Thresholds()) is wanted


def test_no_pairs_are_added_for_equal_models_or_other_workloads(tmp_path: Path) -> None:
    baselines = stored(tmp_path, record(ratio(2.0)))
    slow = record(ratio(1.0))
    entry = baselines.entry(slow)
    assert entry is not None
    assert not looks_slower(dataclasses.replace(slow, optimization="none"), entry, Thresholds())
    other = dataclasses.replace(slow, workload={**slow.workload, "new_tokens": 99})
    assert not looks_slower(other, entry, Thresholds())
