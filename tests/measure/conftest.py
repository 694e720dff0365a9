"""A two-layer model of random weights with a real tokenizer: measured, never timed against a limit."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from optimizations.runner import Runner
from pytest_inferencepio.catalog.tiny import reference_directory


@pytest.fixture(scope="session")
def model() -> Qwen3ForCausalLM:
    """float32, untied, so that every count of bytes can be written down."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=1792,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tokenizer() -> object:
    return AutoTokenizer.from_pretrained(reference_directory("qwen3_4b_instruct_2507"), local_files_only=True)


@pytest.fixture
def runner(model: Qwen3ForCausalLM, tokenizer: object) -> Runner:
    return Runner(model, tokenizer)


@pytest.fixture
def perturbed(model: Qwen3ForCausalLM, tokenizer: object) -> Runner:
    """The same model with noise of 30 % of the spread on one weight matrix."""
    changed = copy.deepcopy(model)
    weight = changed.model.layers[0].mlp.down_proj.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        weight.add_(0.3 * weight.std() * noise)
    return Runner(changed, tokenizer)
