"""Tiny random models of all four families whose attention is far from uniform, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from optimizations.runner import Runner
from pytest_inferencepio.catalog.tiny import tiny_config

FAMILIES = ["qwen3_4b_instruct_2507", "qwen3_coder_30b", "glm_4_7_flash", "qwen3_vl_2b"]


def build(name: str, dtype: torch.dtype) -> Runner:
    torch.manual_seed(5)
    factory: Any = AutoModelForImageTextToText if "vl" in name else AutoModelForCausalLM
    model = factory.from_config(tiny_config(name)).to(dtype).eval()
    for part in model.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.weight.data.uniform_(0.7, 1.3)
        if hasattr(part, "e_score_correction_bias"):
            part.e_score_correction_bias.data.uniform_(-0.3, 0.3)
    model.get_decoder().norm.weight.data.mul_(4)  # logits spread out, as trained ones are
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return Runner(model, None)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Runner]:
    """(name, dtype=float32) -> a runner; the same object every time."""
    made: dict[tuple[str, torch.dtype], Runner] = {}

    def make(name: str, dtype: torch.dtype = torch.float32) -> Runner:
        if (name, dtype) not in made:
            made[name, dtype] = build(name, dtype)
        runner = made[name, dtype]
        if "vl" in name:
            runner.model.model.rope_deltas = (
                None  # Qwen3-VL keeps those of the last prompt, of another test's batch
            )
        return runner

    return make


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def random_prompts(rows: int, tokens: int, padding: int = 0) -> dict[str, Tensor]:
    """Random prompts; the first row is padded on the left."""
    ids = torch.randint(8, 1792, (rows, tokens), generator=torch.Generator().manual_seed(rows * tokens))
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def prompts() -> Callable[..., dict[str, Tensor]]:
    """(rows, tokens, padding=0) -> model inputs."""
    return random_prompts
