"""--pio-scale: tiny, full, or both."""

from __future__ import annotations

import pytest
from inner_pytest import Project

BASE = ("--pio-model=small", "--pio-optimization=none", "--pio-category=accuracy")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], ["tiny"]),
        (["--pio-scale=full"], ["full"]),
        (["--pio-scale=full,tiny"], ["tiny", "full"]),
        (["--pio-scale=all"], ["tiny", "full"]),
    ],
)
def test_names_stand_in_the_node_ids(project: Project, arguments: list[str], wanted: list[str]) -> None:
    nodeids = project.collected(*BASE, *arguments)
    assert [nodeid.split("[small-")[1] for nodeid in nodeids] == [f"{scale}-none]" for scale in wanted]


def test_the_ini_is_the_default(project: Project) -> None:
    project.pytester.makeini("[pytest]\npio_scale = full\n")
    assert project.collected(*BASE)[0].endswith("[small-full-none]")


def test_an_unknown_scale_lists_the_known(project: Project) -> None:
    message = project.refused(*BASE, "--pio-scale=ful")
    assert "--pio-scale: unknown scale 'ful'; did you mean full? known: tiny, full" in message


def test_a_scale_that_a_model_has_not_is_refused_in_words(project: Project) -> None:
    conftest = (project.path / "conftest.py").read_text()
    project.pytester.makeconftest(conftest.replace('("tiny", "full")', '("tiny",)'))
    result = project.run(*BASE, "--pio-scale=full", "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*small has no full scale; it has: tiny"])
