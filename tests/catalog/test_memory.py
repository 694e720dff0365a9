"""The need is computed without allocating, and the error says what is missing and what would fit."""

from __future__ import annotations

import pytest
import torch

from optimizations.registry import parse
from optimizations.weights.weight_int4 import WeightInt4
from pytest_inferencepio.catalog.configs import full_config
from pytest_inferencepio.catalog.entries import ENTRIES
from pytest_inferencepio.catalog.loading import load
from pytest_inferencepio.catalog.memory import (
    WORKING_MEMORY,
    available_memory,
    check_memory,
    memory_need,
    weight_bytes,
)
from pytest_inferencepio.errors import NotEnoughMemory

GIB = 2**30


def check(name: str, have: int, optimizations=()) -> None:
    check_memory(
        ENTRIES[name], full_config(name), "cpu", "bfloat16", optimizations, available=lambda device: have
    )


def test_need_of_an_unconverted_model_is_weights_one_tensor_and_working_memory():
    entry = ENTRIES["qwen3_4b_instruct_2507"]
    embedding = 151936 * 2560 * 2
    expected = entry.parameters * 2 + embedding + WORKING_MEMORY
    assert abs(memory_need(entry, "full") - expected) < 4096  # rotary frequencies


def test_tied_weights_count_once():
    linear = torch.nn.Linear(8, 8, bias=False)
    model = torch.nn.ModuleList([linear, torch.nn.Linear(8, 8, bias=False)])
    model[1].weight = linear.weight
    assert weight_bytes(model) == 8 * 8 * 4


@pytest.mark.parametrize("name", ["glm_4_7_flash", "qwen3_coder_30b"])
def test_the_30b_models_fit_into_22_gib_as_int4_and_not_otherwise(name):
    entry = ENTRIES[name]
    assert memory_need(entry, "full", optimizations=[WeightInt4()]) < 22 * GIB
    assert memory_need(entry, "full") > 55 * GIB


def test_error_names_need_available_missing_and_what_fits():
    with pytest.raises(NotEnoughMemory) as caught:
        check("qwen3_coder_30b", 22 * GIB)
    message = str(caught.value)
    assert message.startswith("qwen3_coder_30b with none in bfloat16 needs ")
    assert "22.00 GiB are available on cpu" in message
    assert "GiB are missing. What would fit: " in message
    assert "weight_int4 (" in message and "weight_nf4 (" in message
    assert "weight_int8" not in message  # 32 GB would not fit either


def test_suggestions_follow_the_machine():
    with pytest.raises(NotEnoughMemory) as caught:
        check("qwen3_coder_30b", 45 * GIB)
    assert "weight_int4" in str(caught.value) and "weight_int8" in str(caught.value)


def test_where_nothing_fits_the_tiny_scale_is_offered():
    with pytest.raises(
        NotEnoughMemory, match=r"No optimization makes it fit \(the smallest, \w+.*--pio-scale=tiny needs"
    ):
        check("glm_4_7_flash", GIB)


def test_ring_buffers_of_streamed_layers_count():
    entry = ENTRIES["glm_4_7_flash"]
    two, four = (
        memory_need(entry, "full", optimizations=parse(f"layer_streaming(buffers={n})")) for n in (2, 4)
    )
    layer = 64 * 3 * 1536 * 2048 * 2  # its routed experts, the bulk of a layer
    assert 2 * layer < four - two < 2.2 * layer


def test_enough_memory_passes():
    check("qwen3_coder_30b", 22 * GIB, [WeightInt4()])


def test_available_memory_is_what_the_machine_reports():
    assert 0 < available_memory() < 2**50


def test_load_checks_before_it_allocates(monkeypatch):
    monkeypatch.setattr("pytest_inferencepio.catalog.loading.check_memory", check_with_nothing)
    with pytest.raises(NotEnoughMemory, match=r"0.00 GiB are available"):
        load(ENTRIES["qwen3_coder_30b"], "full")


def check_with_nothing(*arguments) -> None:
    check_memory(*arguments, available=lambda device: 0)
