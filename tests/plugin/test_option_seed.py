"""--pio-seed: weights and inputs follow from it, and the record carries it."""

from __future__ import annotations

from inner_pytest import Project


def test_the_workload_carries_it(project: Project) -> None:
    (record,) = project.records("--pio-optimization=none", "--pio-seed=7")
    assert record["workload"]["seed"] == 7


def test_the_ini_is_the_default(project: Project) -> None:
    project.pytester.makeini("[pytest]\npio_seed = 5\n")
    (record,) = project.records("--pio-optimization=none")
    assert record["workload"]["seed"] == 5


def test_what_is_no_seed_is_refused(project: Project) -> None:
    message = project.refused("--pio-model=small", "--pio-seed=-1")
    assert "--pio-seed: '-1' is not a seed; write a whole number from 0 on" in message
