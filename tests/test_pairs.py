"""The loaded models of a run: what is released is gone, since what comes next may need its room."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from optimizations.registry import parse
from pytest_inferencepio.models import catalog_models, choose
from pytest_inferencepio.pairs import Pairs
from pytest_inferencepio.selection import Row


@pytest.mark.parametrize("spec", ["weight_int4", "weight_int8+kv_int8", "weight_int4+native_decoder"])
def test_both_models_are_gone_once_released(spec: str) -> None:
    settings: Any = SimpleNamespace(device="cpu", dtype="bfloat16", seed=0)
    (model,) = choose(["qwen3_coder_30b"], catalog_models())
    pairs = Pairs(settings, {})
    pair = pairs.get(Row(model, "tiny", tuple(parse(spec))))
    assert pair.before is not None
    kept = [weakref.ref(runner.model) for runner in (pair.before, pair.after)]
    del pair
    gc.disable()  # as in the rounds of a measurement: nobody collects later
    try:
        pairs.release()
        assert [model() for model in kept] == [None, None]
    finally:
        gc.enable()
