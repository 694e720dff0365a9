"""Tiny models of every family, one per session and dtype, and their twins with dequantized weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from optimizations.runner import Runner
from optimizations.weights.kept import packed_modules
from pytest_inferencepio.catalog.configs import model_class
from pytest_inferencepio.catalog.entries import ENTRIES
from pytest_inferencepio.catalog.tiny import tiny_config


class Tokenizer:
    """What a runner asks of a tokenizer."""

    pad_token_id = 0
    eos_token_id = 1


def random_runner(name: str, dtype: torch.dtype = torch.float32) -> Runner:
    """A tiny model with the values its architecture starts training from, the same every time.

    Untrained sigmoid routers choose among equals, so rounding flips experts and errors of 0.5 % become 15 %: a
    spread correction bias settles the choice.
    """
    torch.manual_seed(7)
    model = model_class(ENTRIES[name])._from_config(tiny_config(name), dtype=dtype).eval()
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape) * 4)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return Runner(model, Tokenizer())


@pytest.fixture(scope="session")
def new_runner() -> Callable[..., Runner]:
    """`random_runner`: a fresh tiny model, for tests that do not undo."""
    return random_runner


@pytest.fixture(scope="session")
def runners() -> Callable[[str], Runner]:
    """name -> a float32 runner, the same object every time; tests leave it as they found it."""
    made: dict[str, Runner] = {}

    def get(name: str) -> Runner:
        if name not in made:
            made[name] = random_runner(name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def dense_twin() -> Callable[[str, torch.nn.Module], torch.nn.Module]:
    """(name, packed model) -> the same model with dense weights whose values are those that it holds packed."""
    return make_twin


@torch.no_grad()
def make_twin(name: str, packed: torch.nn.Module) -> torch.nn.Module:
    twin = random_runner(name).model
    for path, module in packed_modules(packed):
        if not path.endswith(".table"):  # listed as the embedding that owns it
            for parameter, value in module.dequantize().items():
                twin.get_parameter(f"{path}.{parameter}").copy_(value)
    return twin
