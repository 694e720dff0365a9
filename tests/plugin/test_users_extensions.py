"""A user's conftest adds a model, an optimization, a workload and a benchmark test."""

from __future__ import annotations

import pytest
from inner_pytest import BENCHMARK, CONFTEST, Project

WORKLOAD = """

def pytest_pio_workloads(config, scale):
    return {"prompt_tokens": 24, "new_tokens": 4, "pairs": 5, "warmup": 1}
"""
FIXTURES = """

def test_prefill_fixtures(pio_model, pio_optimization, pio_runner, pio_reference):
    assert pio_model.name == "small"
    names = [part.name for part in pio_optimization]
    assert names in ([], ["wide_arithmetic"])
    assert [part.name for part in pio_runner.applied] == names
    assert pio_reference is not pio_runner
    assert pio_reference.applied == []
"""


def test_the_users_benchmark_measures_the_users_optimization_on_the_users_model(project: Project) -> None:
    project.pytester.makepyfile(test_mine=BENCHMARK + FIXTURES)
    result = project.measure("--pio-optimization=none,wide_arithmetic")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["*none *A/A*", "*wide_arithmetic *x*"])


def test_what_an_optimization_changes_is_in_the_record(project: Project) -> None:
    plain, wide = project.records("--pio-optimization=none,wide_arithmetic")
    assert [one["optimization"] for one in (plain, wide)] == ["none", "wide_arithmetic"]
    assert [one["category"] for one in (plain, wide)] == ["prefill", "prefill"]
    weights = [one["metrics"]["weight_memory"]["value"] for one in (plain, wide)]
    assert weights[1] == pytest.approx(2 * weights[0], rel=0.01)  # bfloat16 to float32


def test_the_shipped_suite_measures_a_users_model_with_the_users_workload(project: Project) -> None:
    project.pytester.makeconftest(CONFTEST + WORKLOAD)
    arguments = ("--pio-model=small", "--pio-optimization=wide_arithmetic", "-k", "inference_speed")
    result = project.run(*arguments, "--benchmark-json=bench.json")
    result.assert_outcomes(passed=1)
    (record,) = project.stored()
    assert record["workload"]["prompt_tokens"] == 24
    assert record["workload"]["new_tokens"] == 4
    assert record["metrics"]["speedup"]["n"] == 5


def test_peak_memory_of_a_users_model_is_missing_with_the_reason(project: Project) -> None:
    project.pytester.makeconftest(CONFTEST + WORKLOAD)
    result = project.run(
        "--pio-model=small", "--pio-optimization=none", "-k", "memory_usage", "--benchmark-json=bench.json"
    )
    result.assert_outcomes(passed=1)
    (record,) = project.stored()
    assert record["metrics"]["peak_memory"]["value"] is None
    assert "small is not of the catalog" in record["metrics"]["peak_memory"]["reason"]
    assert (
        record["metrics"]["kv_bytes_per_token"]["value"] == 2 * 16 * 2
    )  # keys and values, one head of 16, bf16


def test_one_window_of_text_is_enough_for_accuracy(project: Project) -> None:
    little = "{'task_distance': 64, 'task_examples': 4, 'heldout_tokens': 512, 'generations': 1}"
    project.pytester.makeconftest(f"{CONFTEST}\n\ndef pytest_pio_workloads(scale): return {little}\n")
    arguments = ("--pio-optimization=wide_arithmetic", "--pio-category=accuracy")
    result = project.run("--pio-model=small", *arguments, "--benchmark-json=bench.json")
    result.assert_outcomes(passed=1)
    (record,) = project.stored()
    assert record["workload"]["heldout_tokens"] == 512
    assert record["metrics"]["kl_divergence"]["value"] is not None
    assert record["metrics"]["perplexity"]["n"] == 511 + 64


def test_an_optimization_that_breaks_its_budget_fails_without_a_baseline(project: Project) -> None:
    head = "runner.model.lm_head.weight.data"
    project.pytester.makeconftest(CONFTEST.replace("runner.model.float()", f"{head} = {head}.roll(1, 0)"))
    result = project.run("--pio-model=small", "--pio-optimization=wide_arithmetic", "--pio-category=accuracy")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*budget exceeded: small tiny, wide_arithmetic, accuracy: *"])


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("def pytest_pio_models(): return ['small']", "pytest_pio_models returned 'small'"),
        (
            "def pytest_pio_models(): return [CustomModel('qwen3_vl_2b', make_config, make_runner)]",
            "pytest_pio_models: a model called 'qwen3_vl_2b' exists already; rename yours",
        ),
        ("def pytest_pio_optimizations(): return [int]", "pytest_pio_optimizations returned <class 'int'>"),
        (
            "def pytest_pio_optimizations(): return [type('Mine', (WideArithmetic,), {'name': 'weight_int4'})]",
            "pytest_pio_optimizations: two optimizations are named 'weight_int4'",
        ),
        (
            "def pytest_pio_workloads(scale): return {'prompt_token': 1}",
            "pytest_pio_workloads: unknown field 'prompt_token'; did you mean prompt_tokens",
        ),
        (
            "def pytest_pio_workloads(scale): return {'decoded_tokens': 0}",
            "pytest_pio_workloads: decoded_tokens must be at least 2, got 0",
        ),
        (
            "def pytest_pio_workloads(scale): return {'pairs': 'many'}",
            "pytest_pio_workloads: pairs must be a number, got 'many'",
        ),
    ],
)
def test_what_a_hook_may_not_return_is_said(project: Project, addition: str, message: str) -> None:
    project.pytester.makeconftest(f"{CONFTEST}\n\n{addition}\n")
    assert message in project.refused("--pio-model=small")


def test_what_a_technique_imports_is_imported_before_anything_is_measured(project: Project) -> None:
    """Whatever warnings a library has, and whether or not it is there."""
    project.pytester.makepyfile(
        warns_at_import="import warnings; warnings.warn('deprecated', DeprecationWarning)"
    )
    imports = 'imports = ("no_such_module", "warns_at_import")\n    refused_type:'
    project.pytester.makeconftest(CONFTEST.replace("refused_type:", imports, 1))
    project.pytester.makeini("[pytest]\nfilterwarnings = error::DeprecationWarning\n")
    project.pytester.makepyfile(
        test_mine="import sys\n\ndef test_there(pio_model):\n    assert 'warns_at_import' in sys.modules\n"
    )
    project.run(
        "test_mine.py", "-k", "test_there", "--pio-model=small", "--pio-optimization=wide_arithmetic"
    ).assert_outcomes(passed=1)
