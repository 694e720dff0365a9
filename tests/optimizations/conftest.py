"""Tiny models of every family, one per session, and what a model consists of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from optimizations.runner import Runner
from pytest_inferencepio.catalog.entries import ENTRIES
from pytest_inferencepio.catalog.loading import load
from pytest_inferencepio.catalog.tiny import tiny_config


class Tokenizer:
    """What a runner asks of a tokenizer."""

    pad_token_id = 0
    eos_token_id = 1


@pytest.fixture(scope="session")
def tiny_runner() -> Callable[[str], Runner]:
    """name -> a runner over a tiny random bfloat16 model; the same object every time."""
    made: dict[str, Runner] = {}

    def make(name: str) -> Runner:
        if name not in made:
            torch.manual_seed(7)
            factory: Any = AutoModelForImageTextToText if ENTRIES[name].multimodal else AutoModelForCausalLM
            model = factory.from_config(tiny_config(name)).to(torch.bfloat16).eval()
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = 0
            made[name] = Runner(model, Tokenizer())
        return made[name]

    return make


@pytest.fixture(scope="session")
def trained_runner() -> Callable[[str], Runner]:
    """name -> a runner over the trained bfloat16 reference checkpoint that never stops early; the same object every time."""
    made: dict[str, Runner] = {}

    def make(name: str) -> Runner:
        if name not in made:
            runner = made[name] = load(ENTRIES[name], "tiny").runner
            runner.model.generation_config.eos_token_id = None
        return made[name]

    return make


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Runner], dict[str, Any]]:
    """What an undo must bring back: attributes, parameters (identity and values), hooks, settings."""
    return take_snapshot


def take_snapshot(runner: Runner) -> dict[str, Any]:
    model = runner.model
    state: dict[str, Any] = {
        "server": runner.server,
        "generate_kwargs": dict(runner.generate_kwargs),
        "applied": list(runner.applied),
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
        "attention": runner.text_config._attn_implementation,
        "experts": getattr(runner.text_config, "_experts_implementation", None),
    }
    for name, module in model.named_modules(remove_duplicate=False):
        state[f"{name}:class"] = type(module)
        state[f"{name}:attributes"] = sorted(module.__dict__)
        state[f"{name}:hooks"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
        state[f"{name}:forward"] = module.__dict__.get("forward")
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        state[f"{name}:identity"] = id(tensor)
        state[f"{name}:value"] = (tensor.dtype, tuple(tensor.shape), tensor.detach().double().sum().item())
        state[f"{name}:bits"] = hash(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return state
