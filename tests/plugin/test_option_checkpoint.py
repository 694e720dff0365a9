"""--pio-checkpoint: which directory or hub id a model's full scale is loaded from."""

from __future__ import annotations

import pytest
from inner_pytest import Project

from pytest_inferencepio.errors import CheckpointError
from pytest_inferencepio.models import CatalogModel, LoadRequest, catalog_models

FULL = ("--pio-scale=full", "--pio-optimization=none", "--pio-category=accuracy")


@pytest.mark.parametrize("text", ["qwen3_vl_2b", "qwen3_vl_2b=", "=weights"])
def test_what_is_no_pair_is_refused(project: Project, text: str) -> None:
    message = project.refused("--pio-model=small", f"--pio-checkpoint={text}")
    assert f"--pio-checkpoint: {text!r} is not a checkpoint; write NAME=DIR_OR_HUB_ID" in message


def test_an_unknown_model_lists_the_near_ones(project: Project) -> None:
    message = project.refused("--pio-model=small", "--pio-checkpoint=qwen3_vl_2=weights")
    assert "--pio-checkpoint: unknown model 'qwen3_vl_2'; did you mean qwen3_vl_2b" in message


def test_a_directory_without_a_model_fails_the_cell_in_words(project: Project) -> None:
    project.pytester.mkdir("weights")
    arguments = ("--pio-model=qwen3_vl_2b", "--pio-checkpoint=Qwen3-VL-2B=weights", *FULL)
    result = project.run(*arguments)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"*qwen3_vl_2b-full-none:*{project.path / 'weights'}*"])


def test_the_command_line_wins_over_the_ini(project: Project) -> None:
    project.pytester.makeini("[pytest]\npio_checkpoint =\n    qwen3_vl_2b=of_ini\n")
    for name in ("of_ini", "of_line"):
        project.pytester.mkdir(name)
    result = project.run("--pio-model=qwen3_vl_2b", *FULL)
    result.stdout.fnmatch_lines([f"*{project.path / 'of_ini'}*"])
    result = project.run("--pio-model=qwen3_vl_2b", "--pio-checkpoint=qwen3_vl_2b=of_line", *FULL)
    result.stdout.fnmatch_lines([f"*{project.path / 'of_line'}*"])


def test_a_model_of_a_conftest_takes_none(project: Project) -> None:
    project.pytester.mkdir("weights")
    result = project.measure("--pio-checkpoint=small=weights", "--pio-scale=full", "--pio-optimization=none")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*small is not of the catalog, its own code loads it*"])


def test_at_the_tiny_scale_the_reference_is_loaded(project: Project) -> None:
    """The option names full-scale weights; the tiny model is what the package ships."""
    model = next(model for model in catalog_models() if model.name == "qwen3_4b_instruct_2507")
    assert isinstance(model, CatalogModel)
    assert model.load(LoadRequest("tiny")).source == "reference"
    with pytest.raises(CheckpointError):
        model.load(LoadRequest("full", checkpoint=str(project.path)))
