"""The tokenizer, or the processor of text and images, stored beside the weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer

from pytest_inferencepio.catalog.entries import ModelEntry
from pytest_inferencepio.catalog.processing import image_text_processor


def load_processor(entry: ModelEntry, directory: Path) -> Any:
    """Processor of a multimodal model (images only where torchvision is missing), tokenizer of the others."""
    if not entry.multimodal:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if importlib.util.find_spec("torchvision") is not None:
        return AutoProcessor.from_pretrained(directory, local_files_only=True)
    return image_text_processor(directory)
