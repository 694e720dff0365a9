"""Writes a model as a self-contained reference directory."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

PATCH = 8
IMAGE_SIDE = 128
TOKENIZER = Path(__file__).with_name("vocabulary")
# The hub's Qwen3-VL names a torchvision class; this names the pair that AutoProcessor resolves without it.
PROCESSOR = {"processor_class": "Qwen3VLProcessor"}


def image_processor() -> Qwen2VLImageProcessorPil:
    """Patches of 8 pixels merged 2 × 2; images keep their size from 64 × 64 to 256 × 256 pixels."""
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 64 * 64, "longest_edge": 256 * 256},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def save_reference(model: nn.Module, directory: Path, figures: dict[str, Any]) -> None:
    """Saves bf16 weights, config, tokenizer, generation settings, processor (vision) and figures.json."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{type(model).__name__} is no transformers model; pass the model itself.")
    shipped = copy.deepcopy(model).to(torch.bfloat16)
    shipped.generation_config = GenerationConfig(
        eos_token_id=0, pad_token_id=0, bos_token_id=0, do_sample=False
    )
    shipped.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(directory)
    if hasattr(model.config, "vision_config"):
        save_processor(directory)
    (directory / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


def save_processor(directory: Path) -> None:
    """Adds what AutoProcessor needs, images only."""
    image_processor().save_pretrained(directory)
    path = directory / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **PROCESSOR}, indent=2) + "\n")
