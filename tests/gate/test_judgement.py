"""Each rule on records built from numbers: what fails, what passes, what is said."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from gate_records import (
    HERE,
    OTHER_ISA,
    SAME_ISA,
    elsewhere,
    judged,
    only,
    ratio,
    record,
    store,
    stored,
    verdict_about,
)

from optimizations.contract import BITWISE_BUDGET
from pytest_inferencepio.comparison import IDENTICAL, compare
from pytest_inferencepio.gate_rules import RULES, Rule, rule_of
from pytest_inferencepio.record import METRICS, Metric, Record, metric, not_measured
from pytest_inferencepio.verdict import Outcome, Status


def test_every_metric_has_a_rule_or_is_an_absolute_measure() -> None:
    absolute = {name for name, (unit, _) in METRICS.items() if unit in ("s", "1/s", "B/s")}
    # follow from times or adapt to them; judged by the declared budget; a process without a model
    once = {"break_even_tokens", "accepted_tokens_per_step", "task_drop", "process_memory"}
    machine = {"threads", "flops_per_token", "prefill_roofline_share", "decode_roofline_share"}
    assert {name for name in METRICS if rule_of(name) is Rule.INFORMATION} == absolute | once | machine
    assert set(RULES) <= set(METRICS)


class TestAnswers:
    @pytest.mark.parametrize(
        ("name", "before", "kept", "lost"),
        [
            ("perplexity", 9.0, 9.0008, 9.001),
            ("perplexity_ratio", 1.01, 1.0101, 1.0102),
            ("kl_divergence", 0.01, 0.0102, 0.0103),
            ("logit_error", 0.05, 0.0509, 0.0511),
            ("gradient_error", 0.001, 0.00102, 0.00103),
            ("top1_agreement", 0.99, 0.987, 0.98),
            ("generation_match", 0.9, 0.896, 0.89),
            ("task_exact_match", 0.98, 0.965, 0.95),
            ("bytes_read_per_token", 1e6, 1.01e6, 1.03e6),
            ("weight_memory", 123456789, 123456789, 123456790),
            ("weight_memory_ratio", 1 / 3, 1 / 3, 0.3334),
            ("weight_memory_ratio", 1.0, 1.0000008, 1.00001),  # the six digits that are stored
            ("kv_bytes_per_token", 512, 512, 513),
            ("recompilations", 0, 0, 1),
            ("nonfinite_outputs", 0, 0, 1),
        ],
    )
    def test_tolerances_on_the_same_machine(
        self, tmp_path: Path, name: str, before: float, kept: float, lost: float
    ) -> None:
        base = {name: metric(name, before, n=1000)}
        assert (
            verdict_about(tmp_path / "kept", base, {name: metric(name, kept, n=1000)}).status is Status.PASSED
        )
        verdict = verdict_about(tmp_path / "lost", base, {name: metric(name, lost, n=1000)})
        assert verdict.status is Status.REGRESSION
        assert name in verdict.message
        assert "allowed: " in verdict.message

    @pytest.mark.parametrize(
        ("name", "before", "kept", "lost"),
        [
            ("perplexity", 9.0, 9.017, 9.02),
            ("kl_divergence", 0.0001, 0.00021, 0.00023),
            ("top1_agreement", 0.99, 0.975, 0.96),
            ("task_exact_match", 0.98, 0.94, 0.92),
            ("weight_memory", 1000, 1000, 1001),
            ("kv_bytes_per_token", 512, 512, 513),
        ],
    )
    def test_other_machines_may_round_differently_but_count_equal_bytes(
        self, tmp_path: Path, name: str, before: float, kept: float, lost: float
    ) -> None:
        found = stored(tmp_path, record({name: metric(name, before, n=1000)}))
        near, far = (record({name: metric(name, value, n=1000)}) for value in (kept, lost))
        assert judged(found, elsewhere(near, SAME_ISA)).status is Status.PASSED
        verdict = judged(found, elsewhere(far, SAME_ISA))
        assert verdict.status is Status.REGRESSION

    @pytest.mark.parametrize(
        ("name", "before", "kept", "unclear", "lost"),
        [
            ("perplexity", 9.0, 9.017, 9.08, 9.1),
            ("kl_divergence", 0.001, 0.0012, 0.002, 0.0022),
            ("generation_match", 0.99, 0.975, 0.75, 0.73),
        ],
    )
    def test_another_instruction_set_rounds_elsewhere_until_it_has_a_session(
        self, tmp_path: Path, name: str, before: float, kept: float, unclear: float, lost: float
    ) -> None:
        def now(value: float, **changes: Any) -> Record:
            return elsewhere(record({name: metric(name, value, n=1000)}, **changes), OTHER_ISA)

        found = stored(tmp_path, record({name: metric(name, before, n=1000)}))
        assert judged(found, now(kept)).status is Status.PASSED
        verdict = judged(found, now(unclear))
        assert verdict.status is Status.INCONCLUSIVE
        assert "whose kernels round elsewhere by as much; store a session of this one" in only(
            verdict, Outcome.INCONCLUSIVE
        )
        assert judged(found, now(lost)).status is Status.REGRESSION
        own = store(found, now(before), "2026-01-05T00:00:00Z")
        assert judged(own, now(unclear)).status is Status.REGRESSION

    @pytest.mark.parametrize(
        ("name", "before", "lost"),
        [
            ("perplexity", 9.0, 9.02),
            ("top1_agreement", 0.99, 0.96),
            ("task_exact_match", 0.98, 0.92),
            ("weight_memory", 1000, 1001),
        ],
    )
    def test_of_another_instruction_set_all_else_is_as_of_any_other_machine(
        self, tmp_path: Path, name: str, before: float, lost: float
    ) -> None:
        row = "none" if name == "perplexity" else "weight_int4"
        found = stored(tmp_path, record({name: metric(name, before, n=1000)}, optimization=row))
        now = record({name: metric(name, lost, n=1000)}, optimization=row)
        assert judged(found, elsewhere(now, OTHER_ISA)).status is Status.REGRESSION

    def test_better_answers_are_an_improvement_of_an_optimization(self, tmp_path: Path) -> None:
        verdict = verdict_about(
            tmp_path, {"perplexity": metric("perplexity", 9.0)}, {"perplexity": metric("perplexity", 8.0)}
        )
        assert verdict.status is Status.PASSED
        assert verdict.of(Outcome.IMPROVED)

    @pytest.mark.parametrize(
        ("name", "before", "after"), [("perplexity", 9.0, 8.9), ("task_exact_match", 0.9, 0.96)]
    )
    def test_the_unoptimized_model_may_not_answer_differently_at_all(
        self, tmp_path: Path, name: str, before: float, after: float
    ) -> None:
        verdict = verdict_about(
            tmp_path, {name: metric(name, before)}, {name: metric(name, after)}, optimization="none"
        )
        assert verdict.status is Status.REGRESSION
        assert "the answers of the unoptimized model changed" in verdict.message

    @pytest.mark.parametrize(("fingerprint", "kept", "lost"), [(HERE, 31, 30), (OTHER_ISA, 29, 28)])
    def test_few_positions_may_flip_at_near_ties(
        self, tmp_path: Path, fingerprint: dict[str, object], kept: int, lost: int
    ) -> None:
        def agreeing(count: int) -> Record:
            return record({"top1_agreement": metric("top1_agreement", count / 32, n=32)})

        found = stored(tmp_path, agreeing(32))
        assert judged(found, elsewhere(agreeing(kept), fingerprint)).status is Status.PASSED
        assert judged(found, elsewhere(agreeing(lost), fingerprint)).status is Status.REGRESSION

    def test_lost_examples_are_tested_in_pairs(self, tmp_path: Path) -> None:
        def tasks(right: int, total: int = 40) -> dict[str, Metric]:
            samples = tuple([1.0] * right + [0.0] * (total - right))
            return {"task_exact_match": metric("task_exact_match", right / total, samples=samples)}

        few = verdict_about(tmp_path / "few", tasks(40), tasks(38))
        assert few.status is Status.INCONCLUSIVE
        assert "2 examples lost, 0 gained of 40 (McNemar p = 0.25)" in only(few, Outcome.INCONCLUSIVE)
        many = verdict_about(tmp_path / "many", tasks(40), tasks(34))
        assert many.status is Status.REGRESSION
        assert "6 examples lost, 0 gained" in many.message

    def test_examples_of_another_count_are_not_paired(self, tmp_path: Path) -> None:
        before = {"task_exact_match": metric("task_exact_match", 1.0, samples=(1.0,) * 4)}
        after = {"task_exact_match": metric("task_exact_match", 0.8, samples=(1.0,) * 4 + (0.0,))}
        verdict = verdict_about(tmp_path, before, after)
        assert verdict.status is Status.REGRESSION
        assert "McNemar" not in verdict.message


BUDGET = {
    "max_kl_divergence": 0.01,
    "min_top1_agreement": 0.98,
    "max_perplexity_ratio": 1.01,
    "max_task_drop": 0.02,
}


class TestBudget:
    @pytest.mark.parametrize(
        ("name", "within", "beyond"),
        [
            ("kl_divergence", 0.01, 0.0101),
            ("top1_agreement", 0.98, 0.979),
            ("perplexity_ratio", 1.01, 1.0101),
            ("task_drop", 0.02, 0.03),
        ],
    )
    def test_each_bound(self, name: str, within: float, beyond: float) -> None:
        kept = compare(record({name: metric(name, within)}), None, budget=BUDGET)
        assert kept.status is Status.NO_BASELINE
        broken = compare(record({name: metric(name, beyond)}), None, budget=BUDGET)
        assert broken.status is Status.BUDGET_EXCEEDED
        assert broken.failed
        assert "declared budget: at " in broken.message
        assert "a baseline update does not accept this" in broken.message

    def test_it_may_stand_in_the_workload_without_being_part_of_it(self, tmp_path: Path) -> None:
        metrics = {"kl_divergence": metric("kl_divergence", 0.02)}
        found = stored(tmp_path, record(metrics))
        now = record(metrics, workload={"prompt": 64, "new_tokens": 16, "budget": BUDGET})
        verdict = judged(found, now)
        assert verdict.status is Status.BUDGET_EXCEEDED
        assert not verdict.of(Outcome.NO_BASELINE)

    def test_few_positions_do_not_prove_a_broken_budget(self) -> None:
        unproven = record({"top1_agreement": metric("top1_agreement", 0.9375, 0.8, 0.983, 32)})
        verdict = compare(unproven, None, budget=BUDGET)
        assert verdict.status is Status.INCONCLUSIVE
        assert "beyond the declared budget, but the samples do not prove it" in only(
            verdict, Outcome.INCONCLUSIVE
        )
        proven = record({"top1_agreement": metric("top1_agreement", 0.9375, 0.9, 0.979, 320)})
        assert compare(proven, None, budget=BUDGET).status is Status.BUDGET_EXCEEDED

    def test_an_unknown_bound_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="unknown budget 'max_kl'; an accuracy budget has max_kl_div"):
            compare(record({}), None, budget={"max_kl": 1.0})

    def test_a_bitwise_budget_survives_rounding_of_means(self) -> None:
        now = record({"kl_divergence": metric("kl_divergence", 1e-15)})
        assert not compare(now, None, budget={"max_kl_divergence": 0.0}).failed


class TestAbsence:
    def test_a_gated_metric_that_is_gone_fails(self, tmp_path: Path) -> None:
        verdict = verdict_about(tmp_path, ratio(2.0), {})
        assert verdict.status is Status.REGRESSION
        assert "missing: " in verdict.message
        assert "the baseline has it, this run does not" in verdict.message

    def test_a_gated_metric_that_cannot_be_measured_here_fails_only_where_it_could(
        self, tmp_path: Path
    ) -> None:
        found = stored(tmp_path, record({"peak_memory": metric("peak_memory", 1e8)}))
        now = record({"peak_memory": not_measured("peak_memory", "no /proc")})
        assert judged(found, now).status is Status.REGRESSION
        assert "not measured now: no /proc" in judged(found, now).message
        assert judged(found, elsewhere(now, OTHER_ISA)).status is Status.PASSED

    def test_information_that_is_gone_is_a_note(self, tmp_path: Path) -> None:
        times = {"time_to_first_token": metric("time_to_first_token", 0.1)}
        assert verdict_about(tmp_path, times, {}).status is Status.PASSED

    def test_a_new_metric_is_a_note(self, tmp_path: Path) -> None:
        verdict = verdict_about(tmp_path, ratio(2.0), {**ratio(2.0), **ratio(1.5, name="prefill_speedup")})
        assert verdict.status is Status.PASSED
        assert "new metric" in only(verdict, Outcome.NOTE)

    def test_no_baseline_is_said(self) -> None:
        verdict = compare(record(ratio(2.0)), None)
        assert verdict.status is Status.NO_BASELINE
        assert not verdict.failed
        assert "this benchmark has no baseline; store one with --pio-update-baseline" in str(
            verdict.findings[0]
        )

    def test_another_workload_is_not_compared(self, tmp_path: Path) -> None:
        found = stored(tmp_path, record(ratio(2.0)))
        verdict = judged(found, record(ratio(0.1), workload={"prompt": 128, "new_tokens": 16}))
        assert verdict.status is Status.NO_BASELINE
        assert "the workload changed, so nothing was compared: prompt: 64 → 128" in str(verdict.findings[0])


SLOW = {"time_per_output_token": metric("time_per_output_token", 0.02)}
FAST = {"time_per_output_token": metric("time_per_output_token", 0.01)}


class TestInformation:
    def test_absolute_times_inform_on_the_same_machine(self, tmp_path: Path) -> None:
        verdict = verdict_about(tmp_path, FAST, SLOW)
        assert verdict.status is Status.PASSED
        assert "10.0 ms → 20.0 ms (+100 %)" in only(verdict, Outcome.NOTE)
        assert "not gated" in only(verdict, Outcome.NOTE)
        assert verdict_about(tmp_path / "other", SLOW, FAST).findings == ()

    def test_foreign_absolute_times_are_refused(self, tmp_path: Path) -> None:
        found = stored(tmp_path, record(FAST))
        assert judged(found, elsewhere(record(SLOW), SAME_ISA)).findings == ()


def test_a_machine_without_a_class_is_never_the_same(tmp_path: Path) -> None:
    unknown = {key: value for key, value in HERE.items() if key != "machine_class"}
    base = elsewhere(record(ratio(2.0)), unknown)
    verdict = judged(stored(tmp_path, base), elsewhere(record(ratio(1.7)), unknown))
    assert verdict.status is Status.PASSED  # 15 % is within the foreign tolerance


def test_the_gravest_finding_decides(tmp_path: Path) -> None:
    base = {**ratio(2.0), "kl_divergence": metric("kl_divergence", 0.001)}
    now = {**ratio(1.0), "kl_divergence": metric("kl_divergence", 0.5)}
    found = stored(tmp_path, record(base))
    verdict = judged(found, record(now), budget={"max_kl_divergence": 0.01})
    assert verdict.status is Status.BUDGET_EXCEEDED
    assert len(verdict.message.splitlines()) == 3


def test_random_weights_are_held_to_no_budget_but_identity() -> None:
    lossy = {"max_kl_divergence": 0.1, "min_top1_agreement": 0.9}
    metrics = {"kl_divergence": metric("kl_divergence", 1.0), "top1_agreement": metric("top1_agreement", 0.3)}
    for weights, budget, status in (
        ("reference", lossy, Status.BUDGET_EXCEEDED),
        ("random", lossy, Status.NO_BASELINE),
        ("random", IDENTICAL, Status.BUDGET_EXCEEDED),
    ):
        now = record(metrics, workload={"weights": weights})
        assert compare(now, None, budget=budget).status is status


def test_identity_is_the_budget_of_bitwise_techniques() -> None:
    assert dataclasses.asdict(BITWISE_BUDGET) == IDENTICAL
