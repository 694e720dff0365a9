"""--pio-optimization: names, compositions, settings, none, all, default, and what cannot be read."""

from __future__ import annotations

import pytest
from inner_pytest import Project

from optimizations.registry import techniques


def specs(project: Project, *arguments: str) -> list[str]:
    nodeids = project.collected("--pio-model=small", "--pio-category=accuracy", *arguments)
    return [nodeid.split("[small-tiny-")[1].removesuffix("]") for nodeid in nodeids]


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (["none"], ["none"]),
        (["wide_arithmetic"], ["wide_arithmetic"]),
        (["wide_arithmetic,none"], ["none", "wide_arithmetic"]),
        (["wide_arithmetic", "none", "none"], ["none", "wide_arithmetic"]),
        (["wide_arithmetic + prompt_lookup"], ["wide_arithmetic+prompt_lookup"]),
        (["prompt_lookup+wide_arithmetic"], ["wide_arithmetic+prompt_lookup"]),
        (["wide_arithmetic(refused_type=llama)"], ["wide_arithmetic(refused_type=llama)"]),
        (
            ["weight_int4(group_size=64,symmetric=true)+prompt_lookup,none"],
            ["none", "weight_int4(group_size=64,symmetric=true)+prompt_lookup"],
        ),
    ],
)
def test_reads_specs(project: Project, texts: list[str], wanted: list[str]) -> None:
    if "symmetric" in wanted[-1]:
        known = techniques()["weight_int4"].from_settings({}).__dataclass_fields__
        texts = [text.replace(",symmetric=true", "") for text in texts] if "symmetric" not in known else texts
        wanted = (
            [text.replace(",symmetric=true", "") for text in wanted] if "symmetric" not in known else wanted
        )
    assert specs(project, *(f"--pio-optimization={text}" for text in texts)) == wanted


@pytest.mark.parametrize("arguments", [[], ["--pio-optimization=all"], ["--pio-optimization=default"]])
def test_all_is_the_unoptimized_model_and_every_technique_alone(
    project: Project, arguments: list[str]
) -> None:
    found = specs(project, *arguments)
    assert found[0] == "none"
    assert set(found[1:]) == {*techniques(), "wide_arithmetic"}


def test_default_is_what_the_ini_says(project: Project) -> None:
    project.pytester.makeini("[pytest]\npio_optimization = none, wide_arithmetic\n")
    assert specs(project) == ["none", "wide_arithmetic"]
    assert specs(project, "--pio-optimization=default,prompt_lookup") == [
        "none",
        "wide_arithmetic",
        "prompt_lookup",
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wide_arithmetics", "unknown optimization 'wide_arithmetics'; did you mean wide_arithmetic"),
        ("wide_arithmetic(bits=3)", "wide_arithmetic has no setting 'bits'; it has: refused_type"),
        ("wide_arithmetic(", "unbalanced parentheses"),
        ("wide_arithmetic+wide_arithmetic", "wide_arithmetic is named twice in one composition"),
        ("wide arithmetic", "cannot read 'wide arithmetic'"),
    ],
)
def test_what_cannot_be_read_is_said_before_any_work(project: Project, spec: str, message: str) -> None:
    told = project.refused("--pio-model=small", f"--pio-optimization={spec}")
    assert f"--pio-optimization: {message}" in told


def test_a_refused_pair_is_collected_and_skipped_with_its_reason(project: Project) -> None:
    arguments = ("--pio-model=glm_4_7", "--pio-optimization=wide_arithmetic", "--pio-category=accuracy")
    assert len(project.collected(*arguments)) == 1
    result = project.run(*arguments, "-rs", "--pio-report=out")
    result.assert_outcomes(skipped=1)
    reason = "wide_arithmetic refuses glm_4_7_flash: glm4_moe_lite is not for it"
    result.stdout.fnmatch_lines([f"SKIPPED*{reason}"])
    assert reason in (project.path / "out" / "report.md").read_text()
    assert reason in (project.path / "out" / "coverage.json").read_text()
