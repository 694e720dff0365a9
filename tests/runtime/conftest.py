"""Small models of every family with random weights: enough to drive, nothing to know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from optimizations.runner import Runner
from pytest_inferencepio.catalog.tiny import tiny_config


class Tokenizer:
    """What a runner asks of a tokenizer."""

    pad_token_id = 0
    eos_token_id = 1


def random_runner(name: str, seed: int = 0) -> Runner:
    """A runner over a tiny model in float32 with random weights.

    The standard deviation 0.05 makes greedy text fall into loops after a few tokens, so that there is
    something to look up, without being one constant token from the start.
    """
    torch.manual_seed(seed)
    config = tiny_config(name)
    factory: Any = AutoModelForImageTextToText if name == "qwen3_vl_2b" else AutoModelForCausalLM
    model = factory.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.05)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return Runner(model, Tokenizer())


@pytest.fixture(scope="session")
def make_runner() -> Callable[..., Runner]:
    """`random_runner` as a fixture: test modules import nothing from each other."""
    return random_runner


@pytest.fixture(params=["glm_4_7_flash", "qwen3_4b_instruct_2507", "qwen3_coder_30b", "qwen3_vl_2b"])
def runner(request: pytest.FixtureRequest) -> Runner:
    return random_runner(request.param)
