"""--pio-dtype: what the weights are loaded as."""

from __future__ import annotations

import pytest
from inner_pytest import Project

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@pytest.mark.parametrize("dtype", BYTES)
def test_the_model_is_loaded_in_it_and_the_record_says_so(project: Project, dtype: str) -> None:
    (record,) = project.records("--pio-optimization=none", f"--pio-dtype={dtype}")
    (default,) = project.records("--pio-optimization=none")
    assert (record["dtype"], default["dtype"]) == (dtype, "bfloat16")
    weights = [one["metrics"]["weight_memory"]["value"] for one in (record, default)]
    assert weights[0] / weights[1] == pytest.approx(BYTES[dtype] / 2, rel=0.01)  # buffers stay float32


def test_an_unknown_type_is_refused(project: Project) -> None:
    message = project.refused("--pio-model=small", "--pio-dtype=bfloat8")
    assert "--pio-dtype: unknown dtype 'bfloat8'; did you mean bfloat16" in message


def test_only_one_at_a_time(project: Project) -> None:
    message = project.refused("--pio-model=small", "--pio-dtype=all")
    assert "--pio-dtype: one of bfloat16, float16, float32; run pytest once for each" in message
