"""The published dimensions: counted exactly on the meta device, nothing allocated."""

from __future__ import annotations

import pytest
import torch

from pytest_inferencepio.catalog.configs import FULL, full_config, meta_model, parameter_count
from pytest_inferencepio.catalog.entries import ENTRIES
from pytest_inferencepio.errors import UnknownName

EXPECTED = {
    "glm_4_7_flash": 29_943_390_976,
    "qwen3_4b_instruct_2507": 4_022_468_096,
    "qwen3_coder_30b": 30_532_122_624,
    "qwen3_vl_2b": 2_127_532_032,
}


def test_every_entry_has_a_published_configuration():
    assert sorted(FULL) == sorted(ENTRIES) == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_parameter_counts_are_exact(name):
    assert parameter_count(name) == ENTRIES[name].parameters == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_meta_models_are_of_the_named_class_and_hold_no_memory(name):
    entry = ENTRIES[name]
    model = meta_model(entry, full_config(name), torch.bfloat16)
    assert type(model).__name__ == entry.architecture
    assert model.config.model_type == entry.model_type
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(buffer.is_meta for buffer in model.buffers())
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", EXPECTED)
def test_embeddings_are_tied_as_published(name):
    model = meta_model(ENTRIES[name], full_config(name), torch.bfloat16)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name in {"qwen3_4b_instruct_2507", "qwen3_vl_2b"})


def test_published_dimensions():
    glm, dense, coder, vl = (full_config(name) for name in EXPECTED)
    assert (glm.n_routed_experts, glm.num_experts_per_tok, glm.n_shared_experts) == (64, 4, 1)
    assert (glm.kv_lora_rank, glm.qk_head_dim, glm.v_head_dim) == (512, 256, 256)
    assert (dense.hidden_size, dense.num_hidden_layers, dense.head_dim) == (2560, 36, 128)
    assert (coder.num_experts, coder.num_experts_per_tok, coder.norm_topk_prob) == (128, 8, True)
    assert vl.text_config.rope_parameters["mrope_section"] == [24, 20, 20]
    assert vl.vision_config.deepstack_visual_indexes == [5, 11, 17]


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UnknownName, match="no published configuration is called 'gpt'; known: glm_4_7_flash"):
        full_config("gpt")
