"""--pio-category: which modules of the suite run."""

from __future__ import annotations

import pytest
from inner_pytest import Project

from pytest_inferencepio.naming import CATEGORIES

BASE = ("--pio-model=small", "--pio-optimization=none")


def categories(nodeids: list[str]) -> set[str]:
    return {nodeid.split("::test_")[1].split("[")[0] for nodeid in nodeids}


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], set(CATEGORIES)),
        (["--pio-category=all"], set(CATEGORIES)),
        (["--pio-category=accuracy,memory_usage"], {"accuracy", "memory_usage"}),
        (["--pio-category=accuracy", "--pio-category=throughput"], {"accuracy", "throughput"}),
        (["--pio-category=hardware"], {"hardware"}),
        (["--pio-category=comparative"], {"comparative"}),
        (["--pio-category=all,hardware"], {*CATEGORIES, "hardware"}),
    ],
)
def test_chooses_modules(project: Project, arguments: list[str], wanted: set[str]) -> None:
    assert categories(project.collected(*BASE, *arguments)) == wanted


def test_the_ini_is_the_default(project: Project) -> None:
    project.pytester.makeini("[pytest]\npio_category = power_efficiency\n")
    assert categories(project.collected(*BASE)) == {"power_efficiency"}
    assert categories(project.collected(*BASE, "--pio-category=accuracy")) == {"accuracy"}


def test_an_unknown_category_lists_the_near_ones(project: Project) -> None:
    message = project.refused(*BASE, "--pio-category=acuracy")
    assert "--pio-category: unknown category 'acuracy'; did you mean accuracy" in message
