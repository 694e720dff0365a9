"""Fresh tiny models, constructed, or grown from the trained dense one."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from pytest_inferencepio.catalog.tiny import reference_directory, tiny_config
from training.construct import construct

CLASSES = {
    "glm_4_7_flash": "Glm4MoeLiteForCausalLM",
    "qwen3_4b_instruct_2507": "Qwen3ForCausalLM",
    "qwen3_coder_30b": "Qwen3MoeForCausalLM",
    "qwen3_vl_2b": "Qwen3VLForConditionalGeneration",
}


def new_model(name: str, seed: int) -> nn.Module:
    """A randomly initialised tiny model with the construction applied, in float32."""
    torch.manual_seed(seed)
    model = getattr(transformers, CLASSES[name])(tiny_config(name)).float()
    construct(model, seed)
    return model


def load_reference(name: str) -> nn.Module:
    """The shipped checkpoint as transformers loads it, in bfloat16."""
    return getattr(transformers, CLASSES[name]).from_pretrained(reference_directory(name)).eval()
