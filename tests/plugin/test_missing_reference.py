"""Where the unoptimized model does not fit beside the optimized one, the latter is measured alone, in words."""

from __future__ import annotations

import json

import pytest
from inner_pytest import BENCHMARK, CONFTEST, Project

# The optimized side is loaded first; every later load of the same process is a reference.
NO_ROOM = """
from pytest_inferencepio.errors import NotEnoughMemory

load_anyway, loads = make_runner, []


def make_runner(request):
    loads.append(request)
    if len(loads) > 1:
        raise NotEnoughMemory("needs 57 GiB, 22 GiB are there")
    return load_anyway(request)


def pytest_pio_models():
    return [CustomModel("small", make_config, make_runner)]


def pytest_pio_workloads(scale):
    return {"prompt_tokens": 24, "new_tokens": 4, "pairs": 5, "warmup": 1}
"""
REASON = "the unoptimized model does not fit beside the optimized one: needs 57 GiB, 22 GiB are there"
RATIOS = {
    "inference_speed": "speedup",
    "optimization_impact": "decode_speedup",
    "accuracy": "kl_divergence",
    "throughput": "throughput_ratio",
    "memory_usage": "weight_memory_ratio",
}


@pytest.mark.parametrize("category", RATIOS)
def test_ratios_are_missing_with_the_reason(project: Project, category: str) -> None:
    project.pytester.makeconftest(CONFTEST + NO_ROOM)
    result = project.run(
        "--pio-model=small",
        "--pio-optimization=wide_arithmetic",
        f"--pio-category={category}",
        "--benchmark-json=bench.json",
    )
    result.assert_outcomes(passed=1)
    (record,) = project.stored()
    ratio = record["metrics"].get(RATIOS[category])
    assert ratio is None or (ratio["value"] is None and ratio["reason"])
    assert REASON in record["notes"]


def test_a_test_that_needs_the_reference_is_skipped_in_words(project: Project) -> None:
    project.pytester.makeconftest(CONFTEST + NO_ROOM)
    project.pytester.makepyfile(test_mine="def test_prefill(pio_reference, pio_runner): pass\n")
    result = project.measure("--pio-optimization=wide_arithmetic", "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines([f"SKIPPED*{REASON}"])


def test_an_optimized_model_that_does_not_fit_fails_in_words(project: Project) -> None:
    project.pytester.makeconftest(CONFTEST + NO_ROOM.replace("len(loads) > 1", "loads"))
    project.pytester.makepyfile(test_mine=BENCHMARK)
    result = project.measure("--pio-optimization=wide_arithmetic", "--pio-report=out")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["small-tiny-wide_arithmetic: needs 57 GiB, 22 GiB are there"])
    (missing,) = json.loads((project.path / "out" / "coverage.json").read_text())["missing"]
    assert missing["reason"].endswith("needs 57 GiB, 22 GiB are there")


def test_a_catalog_model_that_does_not_fit_fails_before_anything_is_allocated(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is a fact about the machine that this test makes smaller; no weight is made."""
    monkeypatch.setattr(
        "pytest_inferencepio.catalog.memory.check_memory.__defaults__", ((), 1, lambda device: 2**30)
    )
    result = project.run(
        "--pio-model=qwen3_4b_instruct_2507",
        "--pio-scale=full",
        "--pio-optimization=none",
        "--pio-category=memory_usage",
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["qwen3_4b_instruct_2507-full-none: *needs * GiB*are missing*"])
