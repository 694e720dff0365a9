"""--pio-device: where the models live."""

from __future__ import annotations

import pytest
import torch
from inner_pytest import Project


def test_the_record_names_the_device(project: Project) -> None:
    (record,) = project.records("--pio-optimization=none", "--pio-device=cpu")
    assert record["device"] == "cpu"


def test_an_unknown_device_is_refused(project: Project) -> None:
    assert "--pio-device: unknown device 'tpu'" in project.refused("--pio-model=small", "--pio-device=tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so that nothing is missing")
def test_a_device_that_is_not_there_is_said(project: Project) -> None:
    message = project.refused("--pio-model=small", "--pio-device=cuda")
    assert "--pio-device=cuda: torch" in message
    assert "sees no such device here; use --pio-device=cpu" in message


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured(project: Project) -> None:
    (record,) = project.records("--pio-optimization=none", "--pio-device=cuda")
    assert record["device"] == "cuda"
