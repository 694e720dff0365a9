"""A random tiny Qwen3-VL in float32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_fixtures import isa
from transformers import Qwen3VLForConditionalGeneration

from optimizations.runner import Runner
from pytest_inferencepio.catalog.tiny import tiny_config

__all__ = ["isa"]


@pytest.fixture(scope="session")
def vision_model() -> Any:
    torch.manual_seed(0)
    config = tiny_config("qwen3_vl_2b")
    config.dtype = torch.float32
    model = Qwen3VLForConditionalGeneration(config).float().eval()
    model.generation_config.eos_token_id = None  # every generation runs to its length
    return model


@pytest.fixture
def runner(vision_model: Any) -> Runner:
    return Runner(vision_model, SimpleNamespace(pad_token_id=0, eos_token_id=0))
