"""--pio-model: names, aliases, lists, all, default, and names that do not exist."""

from __future__ import annotations

import pytest
from inner_pytest import Project

ONE = ("--pio-optimization=none", "--pio-category=accuracy")
ALL = ["glm_4_7_flash", "qwen3_4b_instruct_2507", "qwen3_coder_30b", "qwen3_vl_2b", "small"]


def models_of(nodeids: list[str]) -> list[str]:
    return [nodeid.split("[")[1].split("-")[0] for nodeid in nodeids if "test_accuracy" in nodeid]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--pio-model=small"], ["small"]),
        (["--pio-model=glm_4_7"], ["glm_4_7_flash"]),
        (["--pio-model=GLM-4.7-Flash-Flash"], ["glm_4_7_flash"]),
        (["--pio-model=Qwen/Qwen3-VL-2B-Instruct"], ["qwen3_vl_2b"]),
        (["--pio-model=qwen3_vl_2b, small"], ["qwen3_vl_2b", "small"]),
        (["--pio-model=small", "--pio-model=glm_4_7"], ["glm_4_7_flash", "small"]),
        (["--pio-model=all"], ALL),
        (["--pio-model=default"], ALL),
        (["--pio-model=all,small"], ALL),
    ],
)
def test_chooses_models_in_the_catalogs_order(
    project: Project, arguments: list[str], wanted: list[str]
) -> None:
    assert models_of(project.collected(*ONE, *arguments)) == wanted


def test_default_is_what_the_ini_says(project: Project) -> None:
    project.pytester.makeini("[pytest]\npio_model = small, qwen3_vl_2b\n")
    assert models_of(project.collected(*ONE, "--pio-model=default")) == ["qwen3_vl_2b", "small"]


def test_the_ini_alone_starts_nothing(project: Project) -> None:
    project.pytester.makeini("[pytest]\npio_model = small\n")
    assert project.collected() == ["test_mine.py::test_prefill[no-model]"]


def test_an_unknown_name_lists_the_near_ones_before_any_work(project: Project) -> None:
    message = project.refused("--pio-model=qwen3_coder_30")
    assert "--pio-model: unknown model 'qwen3_coder_30'; did you mean qwen3_coder_30b" in message
    assert (
        "known: glm_4_7_flash, qwen3_4b_instruct_2507, qwen3_coder_30b, qwen3_vl_2b, small (or all)"
        in message
    )


def test_the_suite_alone_runs_and_testpaths_are_left_out(project: Project) -> None:
    project.pytester.makeini("[pytest]\ntestpaths = other\n")
    project.pytester.mkdir("other").joinpath("test_other.py").write_text("def test_other(): pass\n")
    nodeids = project.collected(*ONE, "--pio-model=small")
    assert nodeids == ["pytest_inferencepio/suite/test_accuracy.py::test_accuracy[small-tiny-none]"]


def test_paths_given_are_run_too(project: Project) -> None:
    nodeids = project.collected(*ONE, "--pio-model=small", "test_mine.py")
    assert nodeids == [
        "pytest_inferencepio/suite/test_accuracy.py::test_accuracy[small-tiny-none]",
        "test_mine.py::test_prefill[small-tiny-none]",
    ]


def test_a_node_id_of_the_suite_is_understood_in_any_directory(project: Project) -> None:
    nodeid = "pytest_inferencepio/suite/test_throughput.py::test_throughput[small-tiny-none]"
    assert project.collected(nodeid, "--pio-model=small") == [nodeid]


def test_pyargs_reaches_the_suite_under_the_same_names(project: Project) -> None:
    nodeids = project.collected(*ONE, "--pio-model=small", "--pyargs", "pytest_inferencepio.suite")
    assert nodeids == ["pytest_inferencepio/suite/test_accuracy.py::test_accuracy[small-tiny-none]"]


@pytest.mark.parametrize("option", ["--pio-scale=full", "--pio-optimization=none", "--pio-update-baseline"])
def test_other_options_need_it(project: Project, option: str) -> None:
    message = project.refused(option)
    assert f"{option.split('=')[0]} says how to measure, but nothing says which models" in message
    assert "add --pio-model=all" in message
